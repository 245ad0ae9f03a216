"""Tensors in memory that client and server share, beside the same tensors over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Sequence

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale
from benchmarks.cases.one_request import CPU, WALL, Size, in_rounds
from benchmarks.peers import (
    BEAM_TRITON,
    BEAM_TRITON_SHARED,
    TRITONCLIENT_GRPC,
    TRITONCLIENT_GRPC_SHARED,
    TRITONCLIENT_HTTP,
    TRITONCLIENT_HTTP_SHARED,
)
from benchmarks.peers.peer import Peer
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO_VARIABLE, target

_PEERS: tuple[Peer, ...] = (
    BEAM_TRITON_SHARED,
    BEAM_TRITON,
    TRITONCLIENT_HTTP_SHARED,
    TRITONCLIENT_GRPC_SHARED,
    TRITONCLIENT_HTTP,
    TRITONCLIENT_GRPC,
)
# ``wall`` is the required share of tritonclient.http's time, ``cpu`` that of the library's own over HTTP.
_SIZES = (
    Size(64, 512, 40, 20, wall=1.0),
    Size(64, 3072, 40, 10, wall=0.5, cpu=0.5),
    Size(64, 65536, 15, 2, wall=0.35),
)


def _shared_memory(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Clients take turns in one process, in blocks of requests, one at a time."""
    echo = target(server, ECHO_VARIABLE)
    measured: dict[str, dict[str, Sequence[float]]] = {}
    figures = []
    for size in _SIZES:
        taken = in_rounds(echo, size, _PEERS, rounds, scale.count(size.blocks, least=2))
        for name, times in taken.items():
            own = measured.setdefault(name, {})
            own[f"{size.name} {WALL}"], own[f"{size.name} {CPU}"] = times.wall, times.cpu
        shared, http = taken[BEAM_TRITON_SHARED.name], taken[BEAM_TRITON.name]
        wall = ratios(shared.wall, taken[TRITONCLIENT_HTTP.name].wall)
        relation = f"relative to {TRITONCLIENT_HTTP.name}, {size.name} FP32"
        figures.append(Figure.of_rounds(f"median wall time {relation}", "at most", size.wall, wall))
        if size.cpu is not None:
            name = f"client CPU time relative to HTTP, {size.name} FP32"
            figures.append(Figure.of_rounds(name, "at most", size.cpu, ratios(shared.cpu, http.cpu)))
    rows = [Row.of(name, quantities) for name, quantities in measured.items()]
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


CASE = Case("shared_memory", "Shared memory, one request at a time, client only", _shared_memory)
