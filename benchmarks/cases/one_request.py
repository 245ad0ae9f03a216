"""One request at a time, client only: wall time, and the client's own CPU time."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale
from benchmarks.peers import BEAM_TRITON, REQUESTS_POST, TRITONCLIENT_GRPC, TRITONCLIENT_HTTP, WRK
from benchmarks.peers.peer import Client, Peer, PeerMissing
from benchmarks.peers.wrk import post_for
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO_VARIABLE, target
from benchmarks.workload import Array, Target, Workload

WALL, CPU = "wall us", "CPU us"

_PEERS: tuple[Peer, ...] = (BEAM_TRITON, TRITONCLIENT_HTTP, TRITONCLIENT_GRPC, REQUESTS_POST)


@dataclass(frozen=True)
class Size:
    """``blocks`` turns of ``requests`` each a round.

    ``wall`` and ``cpu`` are the required shares of tritonclient.http's time.
    """

    rows: int
    width: int
    blocks: int
    requests: int
    wall: float
    cpu: float | None = None

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.width}"


_SIZES = (
    Size(1, 16, 40, 50, wall=1.0),
    Size(64, 128, 40, 50, wall=0.85, cpu=0.6),
    Size(64, 3072, 40, 10, wall=0.65),
    Size(64, 65536, 15, 2, wall=0.6),
)


@dataclass
class Times:
    """Median wall time and mean CPU time of a request in microseconds, one value a block.

    A load generator has one wall time a round, and no CPU time.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def _one_request(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Clients take turns in one process, in blocks of requests on open connections; then wrk runs."""
    echo = target(server, ECHO_VARIABLE)
    measured: dict[str, dict[str, Sequence[float]]] = {}
    figures, notes = [], []
    try:
        WRK.check_installed()
        has_wrk = True
    except PeerMissing as missing:
        has_wrk = False
        notes.append(f"left out: {missing}")
    for size in _SIZES:
        blocks = scale.count(size.blocks, least=2)
        taken = in_rounds(echo, size, _PEERS, rounds, blocks, scale.seconds(2, least=1) if has_wrk else None)
        for name, times in taken.items():
            own = measured.setdefault(name, {})
            own[f"{size.name} {WALL}"] = times.wall
            if times.cpu:
                own[f"{size.name} {CPU}"] = times.cpu
        ours, theirs = taken[BEAM_TRITON.name], taken[TRITONCLIENT_HTTP.name]
        relation = f"relative to {TRITONCLIENT_HTTP.name}, {size.name} FP32"
        wall = ratios(ours.wall, theirs.wall)
        figures.append(Figure.of_rounds(f"median wall time {relation}", "at most", size.wall, wall))
        if size.cpu is not None:
            cpu = ratios(ours.cpu, theirs.cpu)
            figures.append(Figure.of_rounds(f"client CPU time {relation}", "at most", size.cpu, cpu))
    rows = [Row.of(name, quantities) for name, quantities in measured.items()]
    return CaseResult(CASE.name, CASE.title, rows, figures, notes=notes, rounds=rounds)


def in_rounds(
    echo: Target,
    size: Size,
    peers: Sequence[Peer],
    rounds: int,
    blocks: int,
    wrk_seconds: float | None = None,
) -> dict[str, Times]:
    """The times of ``peers`` by name, and with ``wrk_seconds`` those of wrk."""
    taken: dict[str, Times] = {}
    for number in range(1, rounds + 1):
        print(
            f"  {size.name}, round {number}/{rounds}: {blocks} turns of {size.requests} requests",
            file=sys.stderr,
            flush=True,
        )
        for name, times in run_in_fresh_process(_measure, echo, size, peers, blocks).items():
            own = taken.setdefault(name, Times())
            own.wall += times.wall
            own.cpu += times.cpu
        if wrk_seconds is not None:
            load = post_for(wrk_seconds, echo, batch_size=size.rows, width=size.width, connections=1)
            taken.setdefault(WRK.name, Times()).wall.append(1e6 * load.latency_seconds)
    return taken


def _measure(echo: Target, size: Size, peers: Sequence[Peer], blocks: int) -> dict[str, Times]:
    batch = Workload(echo, size.rows, size.width).pattern(size.rows)
    clients = {peer.name: peer.open_client(echo) for peer in peers}
    taken = {name: Times() for name in clients}
    for client in clients.values():
        _send(client, batch, 1)
    for _ in range(blocks):
        for name, client in clients.items():
            wall, cpu = _send(client, batch, size.requests)
            taken[name].wall.append(wall)
            taken[name].cpu.append(cpu)
    for client in clients.values():
        client.close()
    return taken


def _send(client: Client, batch: Array, requests: int) -> tuple[float, float]:
    """Median wall time and mean CPU time of a request, in microseconds."""
    walls = []
    cpu_before = time.process_time()
    for _ in range(requests):
        before = time.perf_counter()
        answer = client.infer(batch)
        walls.append(1e6 * (time.perf_counter() - before))
    cpu = 1e6 * (time.process_time() - cpu_before) / requests
    if not np.array_equal(answer, batch):
        raise AssertionError(f"{client!r} returned an answer that differs from what it sent")
    return statistics.median(walls), cpu


CASE = Case("one_request", "One request at a time, client only", _one_request)
