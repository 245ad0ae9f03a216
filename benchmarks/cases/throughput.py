"""Elements a second of whole pipelines, on a slow model and on a fast one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import ELEMENTS_PER_SECOND, Case, Scale, rates, score_in_turns, throughput_row
from benchmarks.peers import (
    BEAM_TRITON,
    NO_OP,
    REQUESTS_POST,
    TRITONCLIENT_GRPC,
    TRITONCLIENT_HTTP,
    WRK,
)
from benchmarks.results import CaseResult, Figure, ratios
from benchmarks.server import ECHO, REMOTE_LIKE, target
from benchmarks.workload import Throughput, Workload

BATCH_SIZE = 64
_FEWER_ELEMENTS = "slow peers score fewer elements (see the column), which does not change their rates"


def _remote_like_work(server: LocalTriton, scale: Scale) -> Workload:
    return Workload(
        target(server, REMOTE_LIKE),
        scale.count(200_000, least=2_000),
        batch_size=BATCH_SIZE,
        load_connections=16,
        load_seconds=scale.seconds(5),
    )


def _echo_work(server: LocalTriton, scale: Scale) -> Workload:
    return Workload(
        target(server, ECHO),
        scale.count(400_000, least=2_000),
        batch_size=BATCH_SIZE,
        load_connections=4,
        load_seconds=scale.seconds(5),
    )


def _remote_like(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """One request at a time waits 20 ms for each 64 elements, so requests in flight set the rate."""
    return _beside_peers(
        REMOTE_LIKE_CASE,
        rounds,
        _remote_like_work(server, scale),
        peer_elements=scale.count(50_000, least=500),
        required=(12, 0.95),
    )


def _echo(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The model costs nothing, so the client's cost of a request and an element sets the rate."""
    return _beside_peers(
        ECHO_CASE,
        rounds,
        _echo_work(server, scale),
        peer_elements=scale.count(400_000, least=2_000),
        required=(2, 0.55),
    )


def _beside_peers(
    case: Case,
    rounds: int,
    work: Workload,
    *,
    peer_elements: int,
    required: tuple[float, float],
) -> CaseResult:
    """The library scores ``work``; peers that send one request at a time score fewer elements.

    ``required`` are the least ratios to ``RunInference`` and to wrk.
    """
    one_at_a_time = replace(work, elements=peer_elements)
    runs, left_out = score_in_turns(
        rounds,
        {
            BEAM_TRITON: work,
            TRITONCLIENT_HTTP: one_at_a_time,
            TRITONCLIENT_GRPC: one_at_a_time,
            REQUESTS_POST: one_at_a_time,
            NO_OP: work,
            WRK: work,
        },
    )
    figures = [
        *_rate_figures(runs, TRITONCLIENT_HTTP.name_in_pipelines, required[0]),
        *_rate_figures(runs, WRK.name, required[1], f" -c{work.load_connections}"),
    ]
    return _result(case, rounds, runs, figures, [*left_out, _FEWER_ELEMENTS])


def _echo_batches(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Whole arrays travel, so no element costs anything by itself."""
    work = Workload(
        target(server, ECHO),
        scale.count(400_000, least=6_400),
        batch_size=BATCH_SIZE,
        in_batches=True,
        load_connections=4,
        load_seconds=scale.seconds(5),
    )
    peers = (BEAM_TRITON, TRITONCLIENT_HTTP, NO_OP, WRK)
    runs, left_out = score_in_turns(rounds, dict.fromkeys(peers, work))
    figures = _rate_figures(runs, WRK.name, 0.8, f" -c{work.load_connections}")
    return _result(ECHO_BATCHES_CASE, rounds, runs, figures, left_out)


def _rate_figures(
    runs: Mapping[str, Sequence[Throughput]], peer: str, required: float, suffix: str = ""
) -> list[Figure]:
    """The library's elements a second over the peer's, where the peer is installed."""
    if peer not in runs:
        return []
    reached = ratios(rates(runs[BEAM_TRITON.name]), rates(runs[peer]))
    return [Figure.of_rounds(f"elements/s relative to {peer}{suffix}", "at least", required, reached)]


def _result(
    case: Case,
    rounds: int,
    runs: Mapping[str, Sequence[Throughput]],
    figures: Sequence[Figure],
    notes: Sequence[str],
) -> CaseResult:
    return CaseResult(
        case.name,
        case.title,
        [throughput_row(name, taken) for name, taken in runs.items()],
        figures,
        notes=notes,
        chosen=ELEMENTS_PER_SECOND,
        rounds=rounds,
    )


REMOTE_LIKE_CASE = Case(
    "remote_like", "A model that takes 20 ms, 16 requests at a time; batches of 64", _remote_like
)
ECHO_CASE = Case("echo", "A model that costs nothing; 64 x 128 FP32 a request", _echo)
ECHO_BATCHES_CASE = Case("echo_batches", "The same, NumPy batches of 64 x 128 in and out", _echo_batches)

COMPARED_WORK = {ECHO_CASE.name: _echo_work, REMOTE_LIKE_CASE.name: _remote_like_work}
"""The workloads for comparing two checkouts of the library."""
