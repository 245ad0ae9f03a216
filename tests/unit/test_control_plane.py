"""Requests beside inference: which endpoint is asked, in which order, and for how long."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from beam_triton.control_plane import ControlPlane
from beam_triton.errors import (
    ConnectionLostError,
    DeadlineExceededError,
    ModelNotFoundError,
    TransportError,
)
from beam_triton.options import InferenceOptions
from beam_triton.transport.session import acquire_session
from tests.support import faults
from tests.support.answers import Answer, Request
from tests.support.fault_server import FaultServer, serve


def origin(request: Request) -> Answer:
    """As much of a server as says who it is."""
    if request.target in ("/v2", "/v2/health/ready"):
        return Answer(body=json.dumps({"name": "triton", "extensions": []}).encode())
    return Answer(404, json.dumps({"error": f"Request for unknown model: {request.target}"}).encode())


@contextmanager
def control_plane(*servers: FaultServer, timeout_seconds: float) -> Iterator[ControlPlane]:
    options = InferenceOptions(
        endpoint=[server.endpoint for server in servers], timeout_seconds=timeout_seconds
    )
    lease = acquire_session(options.pool, options.tls)
    try:
        yield ControlPlane(options, lease)
    finally:
        lease.release()


@pytest.fixture
def good() -> Iterator[FaultServer]:
    with FaultServer(origin) as server:
        yield server


def test_a_frozen_server_costs_its_share_once(good: FaultServer) -> None:
    """Half of the time for the first request, and nothing for those that follow."""
    with (
        FaultServer(origin, faults.silence) as frozen,
        control_plane(frozen, good, timeout_seconds=1.0) as control,
    ):
        started = time.monotonic()
        for _ in range(3):
            assert control.get("/v2", what="server metadata")["name"] == "triton"
            assert control.is_ok("/v2/health/ready")
        assert 0.5 <= time.monotonic() - started < 1.0
        assert len(frozen.requests) == 1 and len(good.requests) == 6


def test_a_frozen_server_is_no_reason_to_be_unready(good: FaultServer) -> None:
    """Health is asked of the others within the time, too, and that answer is remembered as well."""
    with (
        FaultServer(origin, faults.silence) as frozen,
        control_plane(frozen, good, timeout_seconds=1.0) as control,
    ):
        assert control.is_ok("/v2/health/ready")
        control.get("/v2", what="server metadata")
        assert len(frozen.requests) == 1 and len(good.requests) == 2


def test_all_have_their_turn_within_the_time() -> None:
    """Where all are frozen the whole takes ``timeout_seconds``, and the error keeps all of theirs."""
    with (
        FaultServer(origin, faults.silence) as one,
        FaultServer(origin, faults.silence) as two,
        FaultServer(origin, faults.silence) as three,
        control_plane(one, two, three, timeout_seconds=0.9) as control,
    ):
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError) as caught:
            control.get("/v2", what="server metadata")
        assert 0.9 <= time.monotonic() - started < 1.4
        assert len(caught.value.attempts) == 2
        assert [len(server.requests) for server in (one, two, three)] == [1, 1, 1]


def test_the_time_that_a_refusing_server_leaves_is_the_others(good: FaultServer) -> None:
    """One that fails at once leaves its share; a slow one after it has nearly all of the time."""
    good.play(faults.late(0.7))
    with (
        FaultServer(origin, faults.closed_without_answer) as broken,
        control_plane(broken, good, timeout_seconds=1.0) as control,
    ):
        assert control.get("/v2", what="server metadata")["name"] == "triton"


def test_the_one_that_answered_is_left_when_it_fails(good: FaultServer) -> None:
    """The others are asked again as soon as it does, and the one that answers then stays first."""
    with (
        FaultServer(origin, [faults.closed_without_answer, serve]) as other,
        control_plane(other, good, timeout_seconds=2.0) as control,
    ):
        control.get("/v2", what="server metadata")
        good.play([faults.closed_without_answer, faults.closed_without_answer])
        for _ in range(2):
            control.get("/v2", what="server metadata")
        assert (len(other.requests), len(good.requests)) == (3, 3)


def test_a_refusal_is_an_answer(good: FaultServer) -> None:
    """Who says that a model is not there is asked first the next time, and has the last word."""
    with (
        FaultServer(origin, faults.closed_without_answer) as broken,
        control_plane(broken, good, timeout_seconds=2.0) as control,
    ):
        for _ in range(2):
            with pytest.raises(ModelNotFoundError):
                control.get("/v2/models/m", what="metadata", model_name="m")
        assert len(broken.requests) == 1


def test_one_server_has_all_of_the_time() -> None:
    """The message says the user's own number."""
    with (
        FaultServer(origin, faults.silence) as frozen,
        control_plane(frozen, timeout_seconds=0.3) as control,
        pytest.raises(TransportError, match=r"within 0\.3 s"),
    ):
        control.get("/v2", what="server metadata")


def test_a_stale_connection_is_replaced(good: FaultServer) -> None:
    """A connection that ends before a byte of the answer is replaced; one that ends within it fails."""
    good.play([serve, faults.closed_without_answer, serve, faults.truncated(10)])
    with control_plane(good, timeout_seconds=2.0) as control:
        for _ in range(2):
            assert control.get("/v2", what="server metadata")["name"] == "triton"
        with pytest.raises(ConnectionLostError):
            control.get("/v2", what="server metadata")
