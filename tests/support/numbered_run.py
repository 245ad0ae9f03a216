"""Runs of many numbered elements: each must come out exactly once, whatever happens to servers meanwhile."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_triton.testing import LocalTriton

MODEL = "echo_variable"
_BLOCK = 500


class Progress:
    """The number of elements that a run has fed into its transform so far."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._count = 0
        self._over = False

    def add(self, count: int) -> None:
        with self._condition:
            self._count += count
            self._condition.notify_all()

    def end(self) -> None:
        with self._condition:
            self._over = True
            self._condition.notify_all()

    def reached(self, count: int) -> bool:
        """Wait until this many elements were fed; False if the run ended first."""
        with self._condition:
            self._condition.wait_for(lambda: self._over or self._count >= count)
            return not self._over

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """For runs that are fed long before they are scored. AssertionError if the run ends first."""
        while not condition():
            time.sleep(0.1)
            assert not self._over, "the run ended too early, which would prove nothing"


# FnApiRunner runs a pipeline in this process but pickles its functions, so they find their run by number.
_runs: dict[int, Progress] = {}
_run_numbers = itertools.count()


class Feed(beam.DoFn):
    """Turns the number of a block into its elements: FP32 arrays of shape [1] with the element's number."""

    def __init__(self, run: int, pace_seconds: float) -> None:
        self._run = run
        self._pace_seconds = pace_seconds

    def process(self, block: int) -> Iterator[npt.NDArray[np.float32]]:
        for number in range(block * _BLOCK, (block + 1) * _BLOCK):
            yield np.array([number], np.float32)
        progress = _runs.get(self._run)
        if progress is not None:
            progress.add(_BLOCK)
        time.sleep(self._pace_seconds)


@dataclass(frozen=True)
class Outcome:
    """Counts of the results of ``expected`` numbered elements."""

    expected: int
    results: int
    missing: int
    repeated: int
    wrong: int


class CountOutcome(beam.CombineFn):
    """Combines the `PredictionResult`s of an echo model into one `Outcome`."""

    def __init__(self, expected: int) -> None:
        self._expected = expected

    def create_accumulator(self) -> tuple[list[int], int]:
        return [], 0

    def add_input(
        self, accumulator: tuple[list[int], int], result: PredictionResult
    ) -> tuple[list[int], int]:
        numbers, wrong = accumulator
        example: Any = result.example
        inference: Any = result.inference
        number = int(example[0])
        numbers.append(number)
        return numbers, wrong + (int(inference["y"][0]) != number)

    def merge_accumulators(self, accumulators: Iterable[tuple[list[int], int]]) -> tuple[list[int], int]:
        numbers: list[int] = []
        wrong = 0
        for some, some_wrong in accumulators:
            numbers += some
            wrong += some_wrong
        return numbers, wrong

    def extract_output(self, accumulator: tuple[list[int], int]) -> Outcome:
        numbers, wrong = accumulator
        counts = np.bincount(numbers, minlength=self._expected)
        return Outcome(
            self._expected,
            len(numbers),
            int((counts == 0).sum()),
            int((counts > 1).sum()),
            wrong,
        )


@dataclass(frozen=True)
class Run:
    """A finished run: its counters in the namespace ``beam_triton``, and its duration."""

    counters: dict[str, int]
    seconds: float


def run_numbered(
    transform: beam.PTransform[Any, Any],
    elements: int,
    *,
    meanwhile: Callable[[Progress], None] | None = None,
    options: Iterable[str] = (),
    bundles: bool = False,
    pace_seconds: float = 0.0,
) -> Run:
    """Run ``elements`` (whole blocks of 500) through ``transform`` and assert that each has one result.

    ``meanwhile`` runs on a thread beside the pipeline and may wait for its progress; its errors are raised
    here. With ``bundles`` the elements come in several bundles instead of one. With ``pace_seconds`` the feed
    pauses after each block, so that the run is long enough for ``meanwhile``.
    """
    assert elements % _BLOCK == 0
    number = next(_run_numbers)
    progress = _runs[number] = Progress()
    pipeline = beam.Pipeline("FnApiRunner", options=PipelineOptions(list(options)))
    outcome = (
        pipeline
        | beam.Create(range(elements // _BLOCK), reshuffle=bundles)
        | beam.ParDo(Feed(number, pace_seconds))
        | transform
        | beam.CombineGlobally(CountOutcome(elements))
    )
    assert_that(outcome, equal_to([Outcome(elements, elements, 0, 0, 0)]))
    started = time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        beside = threads.submit(meanwhile or (lambda progress: None), progress)
        try:
            result = pipeline.run()
            result.wait_until_finish()
        finally:
            progress.end()
            del _runs[number]
        beside.result()
    return Run(counters_of(result), time.monotonic() - started)


def counters_of(result: beam.runners.runner.PipelineResult) -> dict[str, int]:
    """The library's counters of a finished pipeline, by name."""
    chosen = MetricsFilter().with_namespace("beam_triton")
    totals: dict[str, int] = {}
    for counter in result.metrics().query(chosen)["counters"]:
        totals[counter.key.metric.name] = totals.get(counter.key.metric.name, 0) + counter.result
    return totals


def repeat_during_run(times: int, elements: int, action: Callable[[], None]) -> Callable[[Progress], None]:
    """For ``meanwhile``: call ``action`` at even intervals. AssertionError if the run ends too early."""

    def meanwhile(progress: Progress) -> None:
        for number in range(1, times + 1):
            reached = progress.reached(number * elements // (times + 1))
            assert reached, f"the run ended before action {number}, which would prove nothing"
            action()

    return meanwhile


def kill_and_restart(server: LocalTriton, down_seconds: float = 0.5) -> Callable[[], None]:
    """An action for `repeat_during_run`: the server is down for a while."""

    def action() -> None:
        server.kill()
        time.sleep(down_seconds)
        server.start()

    return action
