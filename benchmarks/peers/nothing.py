"""A DoFn that does nothing: what Beam itself costs, above which no transform can come."""

from __future__ import annotations

from typing import Any

import apache_beam as beam

from benchmarks.batch_workload import BatchDoFn
from benchmarks.peers.peer import PipelinePeer
from benchmarks.workload import Array, Workload


class _PassOn(beam.DoFn):
    def process(self, element: Array) -> list[Array]:
        return [element]


class _PassOnBatches(BatchDoFn):
    def answer(self, batch: Array) -> Array:
        return batch


class Nothing(PipelinePeer):
    name = "a DoFn that does nothing"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_PassOn())  # type: ignore[no-untyped-call]

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_PassOnBatches(workload))
