"""64 DoFn instances in one process: the connections they hold, and the memory they take."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import PredictionResult

from beam_triton import ConnectionPoolConfig
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, isolated, take_turns
from benchmarks.memory import peak_bytes
from benchmarks.peers import BEAM_TRITON, NOTHING, TRITONCLIENT_GRPC, TRITONCLIENT_HTTP
from benchmarks.peers.peer import Peer, PipelinePeer
from benchmarks.results import CaseResult, Figure, Row, ratio
from benchmarks.scale import Scale
from benchmarks.server import ECHO, target
from benchmarks.workload import Array, Workload, run_pipeline
from tests.support.sockets import established

_CONNECTIONS, _MEMORY, _ADDED = "most connections", "peak MB", "MB beyond a DoFn that does nothing"
_MB = 1e6


@dataclass(frozen=True)
class _Held:
    connections: int
    peak_bytes: int


def _many_instances(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """64 worker threads, each with DoFns of its own; each tritonclient DoFn with a client of its own."""
    workers = scale.count(64, least=4)
    work = Workload(
        target(server, ECHO),
        scale.count(200_000, least=100 * workers),
        workers=workers,
    )
    http, grpc = _ClientEach(TRITONCLIENT_HTTP), _ClientEach(TRITONCLIENT_GRPC)
    peers: tuple[PipelinePeer, ...] = (BEAM_TRITON, http, grpc, NOTHING)
    port = int(server.endpoint.rpartition(":")[2])
    grpc_port = int(server.grpc_endpoint.rpartition(":")[2])
    taken = take_turns(
        rounds,
        {peer.name: isolated(_held, peer, work, grpc_port if peer is grpc else port) for peer in peers},
    )
    rows = []
    floor = [held.peak_bytes for held in taken[NOTHING.name]]
    for name, runs in taken.items():
        added = [(held.peak_bytes - nothing) / _MB for held, nothing in zip(runs, floor, strict=True)]
        rows.append(
            Row(
                name,
                {
                    _CONNECTIONS: [float(held.connections) for held in runs],
                    _MEMORY: [held.peak_bytes / _MB for held in runs],
                    _ADDED: added,
                },
            )
        )
    by_name = {row.name: row for row in rows}
    ours, theirs, bare = by_name[BEAM_TRITON.name], by_name[http.name], by_name[NOTHING.name]
    figures = [
        Figure(
            "connections (max_total)",
            "at most",
            ConnectionPoolConfig().max_total,
            max(ours.measured[_CONNECTIONS]),
        ),
        Figure(
            f"total memory, of {http.name}'s",
            "at most",
            0.5,
            ratio(ours.measured[_MEMORY], theirs.measured[_MEMORY]),
        ),
        Figure(
            f"memory beyond Beam's own, of {http.name}'s",
            "at most",
            0.5,
            statistics.median(ours.measured[_ADDED]) / max(1.0, statistics.median(theirs.measured[_ADDED])),
        ),
    ]
    least = ratio(bare.measured[_MEMORY], theirs.measured[_MEMORY])
    notes = [f"total memory of {NOTHING.name}, of {http.name}'s: {least:.2f}; no client can take less"]
    return CaseResult(CASE.name, CASE.title, rows, figures, notes=notes, rounds=rounds)


class _ScoreBatch(beam.DoFn):
    def __init__(self, peer: Peer, workload: Workload) -> None:
        self._peer = peer
        self._workload = workload

    def setup(self) -> None:
        self._client = self._peer.open_client(self._workload.target)

    def process(self, batch: list[Array]) -> Iterator[PredictionResult]:
        answers = self._client.infer(np.stack(batch))
        for example, answer in zip(batch, answers, strict=True):
            yield PredictionResult(example, answer, self._workload.target.model_name)


class _BatchAndScore(beam.PTransform[Any, Any]):
    def __init__(self, peer: Peer, workload: Workload) -> None:
        super().__init__()
        self._peer = peer
        self._workload = workload

    def expand(self, elements: Any) -> Any:
        size = self._workload.batch_size or 64
        return elements | beam.BatchElements(size, size) | beam.ParDo(_ScoreBatch(self._peer, self._workload))


class _ClientEach(PipelinePeer):
    """A peer's client in every DoFn instance."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.name = f"{peer.name}, a client each"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return _BatchAndScore(self._peer, workload)


def _held(peer: PipelinePeer, work: Workload, port: int) -> _Held:
    """The most connections to the server at a time, and this process's peak memory."""
    most = 0
    over = threading.Event()
    before = established(port)

    def watch() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, established(port) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_pipeline(peer.transform(work), work)
    finally:
        over.set()
        watcher.join()
    return _Held(most, peak_bytes())


CASE = Case("many_instances", "64 DoFn instances in one process", _many_instances)
