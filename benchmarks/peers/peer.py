"""What every peer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import apache_beam as beam

from benchmarks.batch_workload import run_batches
from benchmarks.workload import Array, Target, Throughput, Workload, run_pipeline


class PeerMissing(Exception):
    """A peer is not installed here; the message says how to get it."""


class Client(Protocol):
    """Asks the model, one request at a time."""

    def infer(self, batch: Array) -> Array:
        """The model's answer to an array with its batch dimension."""

    def close(self) -> None:
        """Gives everything back."""


class Peer(ABC):
    """``name`` is what it is called in tables and charts. Instances are pickled into other processes."""

    name: str

    @property
    def name_in_pipelines(self) -> str:
        """Its name where a pipeline is built around it."""
        return self.name

    @abstractmethod
    def score(self, workload: Workload) -> Throughput:
        """Score all elements, in this process.

        Raises:
            AssertionError: a result was lost or wrong.
        """

    def score_batches(self, workload: Workload) -> Throughput:
        """The same with NumPy batches in and out; only some can."""
        raise NotImplementedError(f"{self.name} takes no batches")

    def check_installed(self) -> None:  # noqa: B027
        """Raise `PeerMissing` where it is not installed."""

    def open_client(self, target: Target) -> Client:
        """Its client, without Beam; only some have one."""
        raise NotImplementedError(f"{self.name} has no client")


class PipelinePeer(Peer):
    """A peer that is a transform of a pipeline."""

    @abstractmethod
    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        """Elements to results."""

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        """NumPy batches of elements to NumPy batches of results."""
        raise NotImplementedError(f"{self.name} takes no batches")

    def score(self, workload: Workload) -> Throughput:
        return run_pipeline(self.transform(workload), workload)

    def score_batches(self, workload: Workload) -> Throughput:
        return run_batches(self.batch_transform(workload), workload)
