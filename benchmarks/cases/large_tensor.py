"""A request and an answer of 16 MB: how much memory they take beside the tensors themselves."""

from __future__ import annotations

import statistics

import numpy as np

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, isolated, take_turns
from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from benchmarks.peers import BEAM_TRITON, REQUESTS_POST, TRITONCLIENT_GRPC, TRITONCLIENT_HTTP
from benchmarks.peers.peer import Peer
from benchmarks.results import CaseResult, Figure, Row
from benchmarks.scale import Scale
from benchmarks.server import ECHO_VARIABLE, target
from benchmarks.workload import Target, Workload

_ROWS = 64
_BEYOND = "peak beyond the answer, payloads"


def _large_tensor(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Peak resident memory during the first large request of a fresh process, the answer's size taken off."""
    width = scale.count(65_536, least=16_384)
    peers: tuple[Peer, ...] = (BEAM_TRITON, TRITONCLIENT_HTTP, TRITONCLIENT_GRPC, REQUESTS_POST)
    echo = target(server, ECHO_VARIABLE)
    taken = take_turns(rounds, {peer.name: isolated(_beyond_answer, peer, echo, width) for peer in peers})
    rows = [Row(name, {_BEYOND: values}) for name, values in taken.items()]
    reached = statistics.median(taken[BEAM_TRITON.name])
    figure = Figure("peak extra memory of the payload, beyond the answer", "at most", 0.1, reached)
    return CaseResult(CASE.name, CASE.title, rows, [figure], rounds=rounds, chosen=_BEYOND)


def _beyond_answer(peer: Peer, echo: Target, width: int) -> float:
    """Extra memory at the peak, in payloads."""
    batch = Workload(echo, _ROWS, width).pattern(_ROWS)
    client = peer.open_client(echo)
    client.infer(batch[:1, :16])
    reset_peak()
    before = resident_bytes()
    answer = client.infer(batch)
    extra = peak_bytes() - before - batch.nbytes
    if not np.array_equal(answer, batch):
        raise AssertionError(f"{peer.name} gave another answer than what it sent")
    return extra / batch.nbytes


CASE = Case("large_tensor", "16 MB there and 16 MB back: memory", _large_tensor)
