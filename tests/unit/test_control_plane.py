"""Requests of the control plane: which endpoint gets them, in which order, and for how long."""

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
    """A server that answers only requests for its metadata and readiness."""
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


def test_frozen_server_costs_its_share_of_the_time_once(good: FaultServer) -> None:
    """Half of the time for the first request, and nothing for the following ones."""
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


def test_readiness_is_checked_at_the_other_endpoints(good: FaultServer) -> None:
    """A frozen endpoint leaves time for the others, and the one that answers is remembered."""
    with (
        FaultServer(origin, faults.silence) as frozen,
        control_plane(frozen, good, timeout_seconds=1.0) as control,
    ):
        assert control.is_ok("/v2/health/ready")
        control.get("/v2", what="server metadata")
        assert len(frozen.requests) == 1 and len(good.requests) == 2


def test_every_endpoint_is_tried_within_timeout_seconds() -> None:
    """If all are frozen the request takes ``timeout_seconds``, and the error keeps all their errors."""
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


def test_time_not_used_by_a_failed_endpoint_is_left_to_the_others(good: FaultServer) -> None:
    """After an endpoint that fails at once, a slow one has nearly all of the time."""
    good.play(faults.late(0.7))
    with (
        FaultServer(origin, faults.closed_without_answer) as broken,
        control_plane(broken, good, timeout_seconds=1.0) as control,
    ):
        assert control.get("/v2", what="server metadata")["name"] == "triton"


def test_endpoint_that_answered_is_preferred_until_it_fails(good: FaultServer) -> None:
    """When it fails the others are tried again, and the one that answers then is preferred."""
    with (
        FaultServer(origin, [faults.closed_without_answer, serve]) as other,
        control_plane(other, good, timeout_seconds=2.0) as control,
    ):
        control.get("/v2", what="server metadata")
        good.play([faults.closed_without_answer, faults.closed_without_answer])
        for _ in range(2):
            control.get("/v2", what="server metadata")
        assert (len(other.requests), len(good.requests)) == (3, 3)


def test_model_not_found_counts_as_an_answer(good: FaultServer) -> None:
    """An endpoint that says the model does not exist is preferred next time, and its answer is final."""
    with (
        FaultServer(origin, faults.closed_without_answer) as broken,
        control_plane(broken, good, timeout_seconds=2.0) as control,
    ):
        for _ in range(2):
            with pytest.raises(ModelNotFoundError):
                control.get("/v2/models/m", what="metadata", model_name="m")
        assert len(broken.requests) == 1


def test_single_endpoint_gets_the_whole_timeout() -> None:
    """The message contains the user's own number."""
    with (
        FaultServer(origin, faults.silence) as frozen,
        control_plane(frozen, timeout_seconds=0.3) as control,
        pytest.raises(TransportError, match=r"within 0\.3 s"),
    ):
        control.get("/v2", what="server metadata")


def test_stale_connection_is_replaced(good: FaultServer) -> None:
    """A connection that ends before a byte of the answer is replaced; one that ends within it fails."""
    good.play([serve, faults.closed_without_answer, serve, faults.truncated(10)])
    with control_plane(good, timeout_seconds=2.0) as control:
        for _ in range(2):
            assert control.get("/v2", what="server metadata")["name"] == "triton"
        with pytest.raises(ConnectionLostError):
            control.get("/v2", what="server metadata")
