"""64 DoFn instances in one process: their connections and their memory."""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass
from functools import partial

from beam_triton import ConnectionPoolConfig
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale, take_turns
from benchmarks.peers import BEAM_TRITON, NO_OP, TRITONCLIENT_GRPC, TRITONCLIENT_HTTP
from benchmarks.peers.peer import ClientPerInstance, PipelinePeer
from benchmarks.process import peak_bytes, run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO, target
from benchmarks.workload import Workload, run_pipeline
from tests.support.sockets import established

_CONNECTIONS, _MEMORY, _ADDED = "most connections", "peak MB", "MB beyond a DoFn that does nothing"
_MB = 1e6


@dataclass(frozen=True)
class _Usage:
    connections: int
    peak_bytes: int


def _many_instances(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """64 worker threads with a DoFn instance each; each tritonclient instance has its own client."""
    workers = scale.count(64, least=4)
    work = Workload(
        target(server, ECHO),
        scale.count(200_000, least=100 * workers),
        workers=workers,
    )
    http, grpc = ClientPerInstance(TRITONCLIENT_HTTP), ClientPerInstance(TRITONCLIENT_GRPC)
    peers: tuple[PipelinePeer, ...] = (BEAM_TRITON, http, grpc, NO_OP)
    port = int(server.endpoint.rpartition(":")[2])
    grpc_port = int(server.grpc_endpoint.rpartition(":")[2])
    measures = {}
    for peer in peers:
        peer_port = grpc_port if peer is grpc else port
        measures[peer.name] = partial(run_in_fresh_process, _measure, peer, work, peer_port)
    taken = take_turns(rounds, measures)
    beam_alone = taken[NO_OP.name]
    values = {
        name: {
            _CONNECTIONS: [float(run.connections) for run in runs],
            _MEMORY: [run.peak_bytes / _MB for run in runs],
            _ADDED: [
                (run.peak_bytes - alone.peak_bytes) / _MB for run, alone in zip(runs, beam_alone, strict=True)
            ],
        }
        for name, runs in taken.items()
    }
    ours, theirs = values[BEAM_TRITON.name], values[http.name]
    max_total = ConnectionPoolConfig().max_total
    figures = [
        Figure("connections (limit: max_total)", "at most", max_total, max(ours[_CONNECTIONS])),
        Figure.of_rounds(
            f"total memory relative to {http.name}", "at most", 0.5, ratios(ours[_MEMORY], theirs[_MEMORY])
        ),
        Figure(
            f"memory beyond Beam's own relative to {http.name}",
            "at most",
            0.5,
            # Of the medians: within a single round, so small a difference may be zero or below it.
            statistics.median(ours[_ADDED]) / max(1.0, statistics.median(theirs[_ADDED])),
        ),
    ]
    least = statistics.median(ratios(values[NO_OP.name][_MEMORY], theirs[_MEMORY]))
    notes = [f"total memory of {NO_OP.name} relative to {http.name}: {least:.2f}; no client can take less"]
    rows = [Row.of(name, measured) for name, measured in values.items()]
    return CaseResult(CASE.name, CASE.title, rows, figures, notes=notes, rounds=rounds)


def _measure(peer: PipelinePeer, work: Workload, port: int) -> _Usage:
    """The highest number of connections to the server, and this process's peak memory."""
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
    return _Usage(most, peak_bytes())


CASE = Case("many_instances", "64 DoFn instances in one process", _many_instances)
