"""The library itself, with its defaults unless the workload sets options.

The server on loopback stands for one on another machine: shared memory is used only where that is the
question.
"""

from __future__ import annotations

from typing import Any

import apache_beam as beam

from beam_triton import TritonBatchInference, TritonClient, TritonInference
from benchmarks.peers.peer import PipelinePeer
from benchmarks.workload import Array, Target, Workload


class _Client:
    def __init__(self, target: Target, **options: Any) -> None:
        self._client = TritonClient(target.endpoint, **{"shared_memory": "never", **options})
        self._model_name = target.model_name

    def infer(self, batch: Array) -> Array:
        return self._client.infer(self._model_name, {"x": batch}).outputs["y"]

    def close(self) -> None:
        self._client.close()


class BeamTriton(PipelinePeer):
    """``shares_memory``: with the default, which is shared memory for what is large."""

    def __init__(self, *, shares_memory: bool = False) -> None:
        self._options = {"shared_memory": "auto"} if shares_memory else {}
        self.name = "beam_triton, shared memory" if shares_memory else "beam_triton"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        target = workload.target
        return TritonInference(target.endpoint, target.model_name, **_options(workload))

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        target = workload.target
        return TritonBatchInference(target.endpoint, target.model_name, **_options(workload))

    def open_client(self, target: Target, **options: Any) -> _Client:
        return _Client(target, **{**self._options, **options})


def _options(workload: Workload) -> dict[str, Any]:
    options = {"shared_memory": "never", **workload.options}
    if workload.batch_size is not None:
        options["batching"] = {"max_batch_size": workload.batch_size, **options.get("batching", {})}
    return options
