"""Five million elements in one bundle: does memory grow, does the rate fall?"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale, take_turns
from benchmarks.peers import BEAM_TRITON
from benchmarks.process import resident_bytes, run_in_fresh_process
from benchmarks.results import CaseResult, Curves, Figure, Point, Row
from benchmarks.server import ECHO, target
from benchmarks.workload import Check, Workload

_SAMPLES = 200
_CHECK_EVERY = 100
_MB = 1e6
_RESIDENT, _RATE = "resident MB", "elements/s"
_STEPS = 10


class _Sample(NamedTuple):
    elements: int
    seconds: float
    resident: int


def _long_run(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The library with its defaults, in one round: the run is compared with its own beginning."""
    elements = scale.count(5_000_000, least=20_000)
    work = Workload(target(server, ECHO), elements, batch_size=None, check_every=_CHECK_EVERY)
    measure = partial(run_in_fresh_process, _sampled, work)
    (samples,) = take_turns(1, {BEAM_TRITON.name: measure})[BEAM_TRITON.name]
    settled = [sample for sample in samples if sample.elements >= elements / 10]
    most = max(sample.resident for sample in settled) / settled[0].resident
    rates = _rates(settled)
    quarter = max(1, len(rates) // 4)
    slowing = statistics.median(rates[-quarter:]) / statistics.median(rates[:quarter])
    after = f"after {elements // 10:,} elements"
    figures = [
        Figure(f"peak resident memory relative to that {after}", "at most", 1.1, most),
        Figure(f"elements/s of the last quarter relative to the first, {after}", "at least", 0.9, slowing),
    ]
    row = Row.of(
        BEAM_TRITON.name,
        {_RESIDENT: [sample.resident / _MB for sample in settled], _RATE: rates},
    )
    return CaseResult(CASE.name, CASE.title, [row], figures, curves=_curves(samples))


def _sampled(work: Workload) -> list[_Sample]:
    """Samples of this process while it scores, evenly spaced by elements."""
    samples: list[_Sample] = []
    over = threading.Event()
    step = max(_CHECK_EVERY, work.elements // _SAMPLES)
    started = time.perf_counter()

    def watch() -> None:
        due = step
        while not over.wait(0.01):
            if Check.seen >= due:
                samples.append(_Sample(Check.seen, time.perf_counter() - started, resident_bytes()))
                due = Check.seen + step

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        BEAM_TRITON.score(work)
    finally:
        over.set()
        watcher.join()
    samples.append(_Sample(work.elements, time.perf_counter() - started, resident_bytes()))
    return samples


def _rates(samples: Sequence[_Sample]) -> list[float]:
    """Elements a second over ``_STEPS`` equal parts; the rate between single samples is too noisy."""
    marks = [samples[round(index * (len(samples) - 1) / _STEPS)] for index in range(_STEPS + 1)]
    return [
        (after.elements - before.elements) / (after.seconds - before.seconds)
        for before, after in itertools.pairwise(marks)
        if after.elements > before.elements
    ]


def _curves(samples: Sequence[_Sample]) -> list[Curves]:
    resident = [Point(sample.elements, _RESIDENT, sample.resident / _MB) for sample in samples]
    rates = [
        Point(after.elements, _RATE, (after.elements - before.elements) / (after.seconds - before.seconds))
        for before, after in zip(samples, samples[5:], strict=False)
        if after.elements > before.elements
    ]
    return [
        Curves(f"{CASE.name}_memory", "Resident memory", "elements scored", "MB", resident, False, False, 0),
        Curves(f"{CASE.name}_rate", "Elements a second", "elements scored", _RATE, rates, False, False, 0),
    ]


CASE = Case("long_run", "5,000,000 elements in one bundle", _long_run)
