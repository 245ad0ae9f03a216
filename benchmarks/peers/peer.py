"""What every peer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import PredictionResult

from benchmarks.numpy_workload import run_batches
from benchmarks.workload import Array, Target, Throughput, Workload, run_pipeline


class PeerMissing(Exception):
    """A peer is not installed here; the message says how to get it."""


class Client(Protocol):
    """Sends one request at a time to the model."""

    def infer(self, batch: Array) -> Array:
        """The model's answer to an array with its batch dimension."""

    def close(self) -> None:
        """Close its connections."""


class Peer(ABC):
    """``name`` stands in tables and charts. Instances are pickled into other processes."""

    name: str

    @property
    def name_in_pipelines(self) -> str:
        """The name in tables of whole pipelines."""
        return self.name

    @abstractmethod
    def score(self, workload: Workload) -> Throughput:
        """Score all elements in this process; as NumPy batches for a workload that is ``in_batches``.

        Raises:
            AssertionError: a result was lost or wrong.
        """

    def check_installed(self) -> None:  # noqa: B027
        """Raise `PeerMissing` where it is not installed."""

    def open_client(self, target: Target) -> Client:
        """The peer's client without Beam, where it has one."""
        raise NotImplementedError(f"{self.name} has no client")


class PipelinePeer(Peer):
    """A peer that is a transform of a pipeline."""

    @abstractmethod
    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        """From elements to results."""

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        """From NumPy batches of elements to NumPy batches of results."""
        raise NotImplementedError(f"{self.name} takes no batches")

    def score(self, workload: Workload) -> Throughput:
        if workload.in_batches:
            return run_batches(self.batch_transform(workload), workload)
        return run_pipeline(self.transform(workload), workload)


class ClientPerInstance(PipelinePeer):
    """A DoFn behind ``BatchElements`` in which every instance opens the client of ``peer``."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.name = f"{peer.name}, a client each"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return _BatchAndScore(self._peer, workload)


class _BatchAndScore(beam.PTransform[Any, Any]):
    def __init__(self, peer: Peer, workload: Workload) -> None:
        super().__init__()
        self._peer = peer
        self._workload = workload

    def expand(self, elements: Any) -> Any:
        size = self._workload.request_elements
        score = beam.ParDo(_ScoreBatch(self._peer, self._workload.target))
        return elements | beam.BatchElements(size, size) | score


class _ScoreBatch(beam.DoFn):
    def __init__(self, peer: Peer, target: Target) -> None:
        self._peer = peer
        self._target = target

    def setup(self) -> None:
        self._client = self._peer.open_client(self._target)

    def process(self, batch: list[Array]) -> Iterator[PredictionResult]:
        answers = self._client.infer(np.stack(batch))
        for example, answer in zip(batch, answers, strict=True):
            yield PredictionResult(example, answer, self._target.model_name)
