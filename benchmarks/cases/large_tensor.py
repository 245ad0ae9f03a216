"""A request and an answer of 16 MB: the memory they take in addition to the tensors themselves."""

from __future__ import annotations

from functools import partial

import numpy as np

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale, take_turns
from benchmarks.peers import BEAM_TRITON, REQUESTS_POST, TRITONCLIENT_GRPC, TRITONCLIENT_HTTP
from benchmarks.peers.peer import Peer
from benchmarks.process import peak_bytes, reset_peak, resident_bytes, run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row
from benchmarks.server import ECHO_VARIABLE, target
from benchmarks.workload import Target, Workload

_ROWS = 64
_EXTRA = "peak beyond the answer, payloads"


def _large_tensor(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Peak resident memory during a fresh process's first large request, less the answer's size."""
    width = scale.count(65_536, least=16_384)
    peers: tuple[Peer, ...] = (BEAM_TRITON, TRITONCLIENT_HTTP, TRITONCLIENT_GRPC, REQUESTS_POST)
    echo = target(server, ECHO_VARIABLE)
    measures = {peer.name: partial(run_in_fresh_process, _extra_memory, peer, echo, width) for peer in peers}
    taken = take_turns(rounds, measures)
    rows = [Row.of(name, {_EXTRA: values}) for name, values in taken.items()]
    figure = Figure.of_rounds(
        "peak extra memory beyond the answer, in payloads", "at most", 0.1, taken[BEAM_TRITON.name]
    )
    return CaseResult(CASE.name, CASE.title, rows, [figure], rounds=rounds, chosen=_EXTRA)


def _extra_memory(peer: Peer, echo: Target, width: int) -> float:
    """Extra memory at the peak, as a multiple of the payload."""
    batch = Workload(echo, _ROWS, width).pattern(_ROWS)
    client = peer.open_client(echo)
    client.infer(batch[:1, :16])
    reset_peak()
    before = resident_bytes()
    answer = client.infer(batch)
    extra = peak_bytes() - before - batch.nbytes
    if not np.array_equal(answer, batch):
        raise AssertionError(f"{peer.name} returned an answer that differs from what it sent")
    return extra / batch.nbytes


CASE = Case("large_tensor", "16 MB there and 16 MB back: memory", _large_tensor)
