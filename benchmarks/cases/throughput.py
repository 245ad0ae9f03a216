"""Elements a second of whole pipelines, on a slow model and on a fast one."""

from __future__ import annotations

from dataclasses import replace

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import ELEMENTS_PER_SECOND, Case, score_in_turns
from benchmarks.peers import (
    BEAM_TRITON,
    NOTHING,
    ONE_ROW_ONE_REQUEST,
    REQUESTS_POST,
    TRITONCLIENT_GRPC,
    TRITONCLIENT_HTTP,
    WRK,
)
from benchmarks.results import CaseResult, Figure, Row, ratio
from benchmarks.scale import Scale
from benchmarks.server import ECHO, REMOTE_LIKE, target
from benchmarks.workload import Workload

BATCH_SIZE = 64
_SHORTER = "slow peers score fewer elements than the library, as the column says: their rates do not change"


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
    """One request at a time waits 20 ms for each 64 elements; requests in flight decide."""
    return _beside_peers(
        REMOTE_LIKE_CASE,
        rounds,
        _remote_like_work(server, scale),
        of_peers=scale.count(50_000, least=500),
        of_one_row_requests=scale.count(500, least=20),
        required=(12, 0.95),
    )


def _echo(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The model costs nothing; what a request and an element cost decides."""
    return _beside_peers(
        ECHO_CASE,
        rounds,
        _echo_work(server, scale),
        of_peers=scale.count(400_000, least=2_000),
        of_one_row_requests=scale.count(5_000, least=50),
        required=(2, 0.4),
    )


def _beside_peers(
    case: Case,
    rounds: int,
    work: Workload,
    *,
    of_peers: int,
    of_one_row_requests: int,
    required: tuple[float, float],
) -> CaseResult:
    """The library's ``work`` beside fewer elements for those who send one request at a time.

    ``required`` are the least ratios to ``RunInference`` and to wrk.
    """
    one_at_a_time = replace(work, elements=of_peers)
    rows, left_out = score_in_turns(
        rounds,
        {
            BEAM_TRITON: work,
            TRITONCLIENT_HTTP: one_at_a_time,
            TRITONCLIENT_GRPC: one_at_a_time,
            REQUESTS_POST: one_at_a_time,
            ONE_ROW_ONE_REQUEST: replace(work, elements=of_one_row_requests),
            NOTHING: work,
            WRK: work,
        },
    )
    rates = {row.name: row.measured[ELEMENTS_PER_SECOND] for row in rows}
    peer = TRITONCLIENT_HTTP.name_in_pipelines
    reached = ratio(rates[BEAM_TRITON.name], rates[peer])
    figures = [
        Figure(f"elements/s of {peer}'s", "at least", required[0], reached),
        *_figure_of_wrk(rows, required[1], connections=work.load_connections),
    ]
    return CaseResult(
        case.name,
        case.title,
        rows,
        figures,
        notes=[*left_out, _SHORTER],
        chosen=ELEMENTS_PER_SECOND,
        rounds=rounds,
    )


def _echo_batches(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Nothing is paid for single elements: whole arrays travel."""
    work = Workload(
        target(server, ECHO),
        scale.count(400_000, least=6_400),
        batch_size=BATCH_SIZE,
        in_batches=True,
        load_connections=4,
        load_seconds=scale.seconds(5),
    )
    peers = (BEAM_TRITON, TRITONCLIENT_HTTP, NOTHING, WRK)
    rows, notes = score_in_turns(rounds, dict.fromkeys(peers, work))
    return CaseResult(
        ECHO_BATCHES_CASE.name,
        ECHO_BATCHES_CASE.title,
        rows,
        _figure_of_wrk(rows, 0.7, connections=4),
        notes=notes,
        chosen=ELEMENTS_PER_SECOND,
        rounds=rounds,
    )


def _figure_of_wrk(rows: list[Row], required: float, *, connections: int) -> list[Figure]:
    """The library's elements a second over wrk's, where there is a wrk."""
    rates = {row.name: row.measured[ELEMENTS_PER_SECOND] for row in rows}
    if WRK.name not in rates:
        return []
    reached = ratio(rates[BEAM_TRITON.name], rates[WRK.name])
    return [Figure(f"elements/s of wrk -c{connections}'s", "at least", required, reached)]


REMOTE_LIKE_CASE = Case(
    "remote_like", "A model that takes 20 ms, 16 requests at a time; batches of 64", _remote_like
)
ECHO_CASE = Case("echo", "A model that costs nothing; 64 x 128 FP32 a request", _echo)
ECHO_BATCHES_CASE = Case("echo_batches", "The same, NumPy batches of 64 x 128 in and out", _echo_batches)

COMPARED_WORK = {ECHO_CASE.name: _echo_work, REMOTE_LIKE_CASE.name: _remote_like_work}
"""What two checkouts of the library are compared by."""
