"""What a case is, and how its peers take turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from beam_triton.testing import LocalTriton
from benchmarks.isolation import in_own_process
from benchmarks.peers.peer import Peer, PeerMissing
from benchmarks.results import CaseResult, Row
from benchmarks.scale import Scale
from benchmarks.workload import Throughput, Workload

T = TypeVar("T")

ELEMENTS_PER_SECOND = "elements/s"
CPU_MICROSECONDS = "CPU us/element"
ELEMENTS = "elements"


class CaseLeftOut(Exception):
    """A case cannot run here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Case:
    """A case: a name for the command line, and the function that measures it.

    ``measure`` takes the server, the number of rounds and the scale. It raises `CaseLeftOut` where
    something is not installed, and `AssertionError` or `MeasurementError` where results are wrong.
    """

    name: str
    title: str
    measure: Callable[[LocalTriton, int, Scale], CaseResult]


def take_turns(rounds: int, measures: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Call each measure once a round, in order: whatever drifts, drifts for all of them."""
    taken: dict[str, list[T]] = {name: [] for name in measures}
    for number in range(1, rounds + 1):
        for name, measure in measures.items():
            print(f"  round {number}/{rounds}: {name}", file=sys.stderr, flush=True)
            taken[name].append(measure())
    return taken


def score_in_turns(rounds: int, peers: Mapping[Peer, Workload]) -> tuple[list[Row], list[str]]:
    """Throughput of each peer, each run in a process of its own; and notes on those that are missing.

    Where a workload is one ``in_batches``, batches are scored.
    """
    notes = []
    measures: dict[str, Callable[[], Throughput]] = {}
    for peer, workload in peers.items():
        try:
            peer.check_installed()
        except PeerMissing as missing:
            notes.append(f"left out: {missing}")
            continue
        if workload.in_batches:
            measures[peer.name] = isolated(peer.score_batches, workload)
        else:
            measures[peer.name_in_pipelines] = isolated(peer.score, workload)
    taken = take_turns(rounds, measures)
    return [throughput_row(name, runs) for name, runs in taken.items()], notes


def throughput_row(name: str, runs: list[Throughput]) -> Row:
    """A row of what all throughput is told by."""
    measured = {
        ELEMENTS_PER_SECOND: [run.elements_per_second for run in runs],
        ELEMENTS: [float(run.elements) for run in runs],
    }
    if all(run.cpu_seconds for run in runs):
        measured[CPU_MICROSECONDS] = [1e6 * run.cpu_seconds / run.elements for run in runs]
    return Row(name, measured)


def isolated(function: Callable[..., T], *args: Any) -> Callable[[], T]:
    """The call ``function(*args)``, to be made in a process of its own."""
    return lambda: in_own_process(function, *args)
