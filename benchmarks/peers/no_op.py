"""A DoFn that does nothing: Beam's own cost, the upper limit of any transform's rate."""

from __future__ import annotations

from typing import Any

import apache_beam as beam

from benchmarks.numpy_workload import BatchDoFn
from benchmarks.peers.peer import PipelinePeer
from benchmarks.workload import Array, Workload


class _PassThrough(beam.DoFn):
    def process(self, element: Array) -> list[Array]:
        return [element]


class _PassBatchesThrough(BatchDoFn):
    def infer(self, batch: Array) -> Array:
        return batch


class NoOp(PipelinePeer):
    name = "a DoFn that does nothing"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_PassThrough())  # type: ignore[no-untyped-call]

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_PassBatchesThrough(workload))
