"""The benchmark of engines, on the one that needs nothing installed; the others' are in ``tests/engines``."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from benchmarks.cases import engines
from benchmarks.cases.case import SMOKE, CaseLeftOut
from benchmarks.peers import BEAM_TRITON, TRITONCLIENT_HTTP
from benchmarks.peers.peer import Peer
from benchmarks.server import REMOTE_LIKE, SLOW, target
from engines import DirectRunner
from engines.processes import EngineError

# Enough for a run that lasts several times as long as connections are looked at apart.
ELEMENTS = 5_000


@pytest.mark.parametrize("peer", [BEAM_TRITON, TRITONCLIENT_HTTP], ids=lambda peer: peer.name)
def test_a_peer_on_an_engine(peer: Peer, triton: LocalTriton, tmp_path: Path) -> None:
    """Requests and connections are the server's own count, and the time leaves out the start."""
    with DirectRunner(tmp_path) as engine:
        started = time.monotonic()
        run = engines.score_on(engine, peer, target(triton, REMOTE_LIKE), ELEMENTS)
        elapsed = time.monotonic() - started
    assert run.throughput.elements == ELEMENTS
    assert run.requests == -(-ELEMENTS // 64)
    assert 0 < run.connections <= run.requests + 2
    # One request alone takes 20 ms; what the job took beside them, its start most of all, is left out.
    assert 0.02 <= run.throughput.seconds < elapsed


def test_a_job_that_fails_gives_no_figure(triton: LocalTriton, tmp_path: Path) -> None:
    """A model that takes other elements ends the measurement, with what the pipeline said of them."""
    with DirectRunner(tmp_path) as engine, pytest.raises(EngineError, match=r"takes FP32 of shape \[1\]"):
        engines.score_on(engine, BEAM_TRITON, target(triton, SLOW), ELEMENTS)


def test_missing_tools_are_told_in_one_line(triton: LocalTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Java, Maven and Go the case is left out, and names all three."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(CaseLeftOut, match=r"Java 17.*Maven.*Go") as left_out:
        engines.CASE.measure(triton, 1, SMOKE)
    assert "\n" not in str(left_out.value)
