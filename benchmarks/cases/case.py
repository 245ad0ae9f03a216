"""What a case is, how much of it is measured, and how its peers take turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from beam_triton.testing import LocalTriton
from benchmarks.peers.peer import Peer, PeerMissing
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Row
from benchmarks.workload import Throughput, Workload

T = TypeVar("T")

ELEMENTS_PER_SECOND = "elements/s"
CPU_MICROSECONDS = "CPU us/element"
ELEMENTS = "elements"

# Below this factor, sweeps measure their first two places only.
_FULL_SWEEP = 0.01


@dataclass(frozen=True)
class Scale:
    """How much a run measures: ``factor`` 1 is all of it, 0 the least that every case can do."""

    factor: float = 1.0

    def count(self, full: int, *, least: int = 1) -> int:
        """The number of elements or requests that takes the place of ``full``."""
        return max(min(full, least), round(full * self.factor))

    def seconds(self, full: float, *, least: float = 0.2) -> float:
        """The duration that takes the place of ``full``."""
        return max(least, full * self.factor)

    def points(self, values: Sequence[T]) -> Sequence[T]:
        """The values of a sweep."""
        return values if self.factor >= _FULL_SWEEP else values[:2]


FULL = Scale(1.0)
QUICK = Scale(0.05)
"""Minutes instead of an hour; its ratios are hints."""
SMOKE = Scale(0.0)
"""Just enough to see that a case works."""


class CaseLeftOut(Exception):
    """A case cannot run here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Case:
    """A name for the command line, and the function that measures.

    ``measure`` takes the server, the number of rounds and the scale. It raises `CaseLeftOut` where
    something is not installed, and `AssertionError` or `MeasurementError` where results are wrong.
    """

    name: str
    title: str
    measure: Callable[[LocalTriton, int, Scale], CaseResult]


def take_turns(rounds: int, measures: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Call each measure once a round, in order, so that a drift of the machine affects all of them."""
    taken: dict[str, list[T]] = {name: [] for name in measures}
    for number in range(1, rounds + 1):
        for name, measure in measures.items():
            print(f"  round {number}/{rounds}: {name}", file=sys.stderr, flush=True)
            taken[name].append(measure())
    return taken


def score_in_turns(
    rounds: int, peers: Mapping[Peer, Workload]
) -> tuple[dict[str, list[Throughput]], list[str]]:
    """Runs of each peer, each in a fresh process; and notes on peers that are not installed."""
    notes = []
    measures: dict[str, Callable[[], Throughput]] = {}
    for peer, workload in peers.items():
        try:
            peer.check_installed()
        except PeerMissing as missing:
            notes.append(f"left out: {missing}")
            continue
        name = peer.name if workload.in_batches else peer.name_in_pipelines
        measures[name] = partial(run_in_fresh_process, peer.score, workload)
    return take_turns(rounds, measures), notes


def rates(runs: Sequence[Throughput]) -> list[float]:
    """Elements a second of each run."""
    return [run.elements_per_second for run in runs]


def throughput_row(name: str, runs: Sequence[Throughput]) -> Row:
    """Elements a second, elements, and CPU time where it is known."""
    measured = {ELEMENTS_PER_SECOND: rates(runs), ELEMENTS: [float(run.elements) for run in runs]}
    if all(run.cpu_seconds for run in runs):
        measured[CPU_MICROSECONDS] = [1e6 * run.cpu_seconds / run.elements for run in runs]
    return Row.of(name, measured)
