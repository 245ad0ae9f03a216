"""The workload as NumPy batches: whole arrays go in and come out, through Beam's batched DoFns."""

# No postponed annotations here: Beam reads the types of batches from them.

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.typehints.batch import N, NumpyArray

from benchmarks.workload import Array, Count, Throughput, Workload, numbered, timed_run


class RowsDoFn(beam.DoFn):
    """Base of DoFns whose output batches have rows as wide as the workload's elements."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def get_output_batch_type(self, input_element_type: Any) -> Any:
        return NumpyArray[np.float32, (N, self._workload.width)]

    def infer_output_type(self, input_type: Any) -> Any:
        return NumpyArray[np.float32, (self._workload.width,)]


class BatchDoFn(RowsDoFn):
    """Base of DoFns from batches of a workload's elements to batches of its results."""

    def process_batch(self, batch: np.ndarray) -> Iterator[np.ndarray]:
        yield self.infer(batch)

    def infer(self, batch: Array) -> Array:
        """The model's answer to the batch."""
        raise NotImplementedError

    def get_input_batch_type(self, input_element_type: Any) -> Any:
        return NumpyArray[np.float32, (N, self._workload.width)]


class GenerateBatches(RowsDoFn):
    """From a block's first number and size to one array of its elements."""

    def setup(self) -> None:
        self._pattern = self._workload.pattern(self._workload.block_elements)

    @beam.DoFn.yields_batches  # type: ignore[untyped-decorator]
    def process(self, block: tuple[int, int]) -> Iterator[np.ndarray]:
        first, size = block
        yield numbered(self._pattern, first, size, True)


class CheckBatches(BatchDoFn):
    """Counts rows, sums their numbers, and compares some batches with what was sent."""

    def setup(self) -> None:
        self._pattern = self._workload.pattern(self._workload.block_elements)

    def start_bundle(self) -> None:
        self._count = Count()
        self._batches = 0

    def process_batch(self, batch: np.ndarray) -> Iterator[np.ndarray]:
        self._batches += 1
        self._count.elements += len(batch)
        self._count.number_sum += int(batch[:, 0].sum(dtype=np.float64))
        if self._batches % self._workload.compared_every == 0:
            self._count.wrong += not np.array_equal(batch[:, 1:], self._pattern[: len(batch), 1:])
        yield from ()

    def finish_bundle(self) -> None:
        self._count.report()


def run_batches(transform: beam.PTransform[Any, Any], workload: Workload) -> Throughput:
    """Run batches of ``batch_size`` through ``transform``; a block is a batch.

    Raises:
        AssertionError: a row was lost, duplicated or wrong.
    """
    row_type = NumpyArray[np.float32, (workload.width,)]
    return timed_run(
        lambda pipeline: (
            pipeline
            | beam.Create(workload.blocks(), reshuffle=False)
            | beam.ParDo(GenerateBatches(workload)).with_output_types(row_type)
            | transform
            | beam.ParDo(CheckBatches(workload))
        ),
        workload,
        sums_numbers=True,
    )
