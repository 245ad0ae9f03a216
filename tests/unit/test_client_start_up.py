"""Opening a model on a server that is starting: what is waited for, and what is told soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from beam_triton import TritonClient
from beam_triton.errors import (
    ConnectError,
    DeadlineExceededError,
    ModelNotFoundError,
    ModelNotReadyError,
    ServerUnavailableError,
    TritonError,
)
from tests.support import faults
from tests.support.answers import Answer, Request
from tests.support.fault_server import FaultServer

METADATA = {
    "name": "m",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [4]}],
}
NOT_FOUND = Answer(404, json.dumps({"error": "Request for unknown model: 'm' is not found"}).encode())


def origin(request: Request) -> Answer:
    """A server that lists no models."""
    if request.target == "/v2":
        return Answer(body=json.dumps({"name": "scripted", "extensions": []}).encode())
    return Answer(body=json.dumps(METADATA).encode()) if request.target == "/v2/models/m" else NOT_FOUND


def open_model(endpoint: str, **breaker: Any) -> None:
    with TritonClient(endpoint, timeout_seconds=0.4, circuit_breaker=breaker) as client:
        client.open_model("m", wait_seconds=0.4).close()


def kserve(status: int, message: str) -> Callable[[Any], None]:
    return faults.answered(Answer(status, json.dumps({"error": message}).encode()))


STARTING = [
    kserve(503, "Model with name m is not ready."),
    kserve(400, "Model m is not ready yet."),
    kserve(502, "no healthy upstream"),
    faults.silence,
]


@pytest.mark.parametrize("fault", STARTING, ids=["kserve", "mlserver", "ingress", "held"])
def test_server_that_is_starting_is_waited_for_longer_than_a_deadline(fault: Callable[[Any], None]) -> None:
    """With default options for ten minutes; here until it is ready after about a second."""
    ready_at = time.monotonic() + 1.2

    def until_ready(exchange: Any) -> None:
        if time.monotonic() < ready_at:
            fault(exchange)
        else:
            exchange.send(exchange.answer().encode())

    with FaultServer(origin, until_ready) as server:
        open_model(server.endpoint)
    assert time.monotonic() >= ready_at


@pytest.mark.parametrize(
    ("fault", "sees"),
    list(
        zip(STARTING, [ModelNotReadyError] * 2 + [ServerUnavailableError, DeadlineExceededError], strict=True)
    ),
    ids=["kserve", "mlserver", "ingress", "held"],
)
def test_wait_for_a_starting_server_is_bounded(fault: Callable[[Any], None], sees: type[TritonError]) -> None:
    """``max_wait_seconds`` bounds it; a policy that does not wait leaves ``timeout_seconds``."""
    for breaker, bound in (({"max_wait_seconds": 1.0}, 1.0), ({"when_open": "fail"}, 0.4)):
        with FaultServer(origin, fault) as server:
            started = time.monotonic()
            with pytest.raises(sees):
                open_model(server.endpoint, **breaker)
            assert time.monotonic() - started < bound + 1.0


def test_wrong_address_or_name_is_told_within_the_timeout() -> None:
    """Nothing is there that could become ready."""
    started = time.monotonic()
    with faults.refusing_port() as port, pytest.raises(ConnectError):
        open_model(f"http://127.0.0.1:{port}")
    with FaultServer(origin, faults.answered(NOT_FOUND)) as server, pytest.raises(ModelNotFoundError):
        open_model(server.endpoint)
    assert time.monotonic() - started < 2.0


def test_model_that_the_server_lists_as_unavailable_is_told_within_the_timeout() -> None:
    """It failed to load, and is not loading."""
    unavailable = json.dumps([{"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "broken"}])

    def answer(request: Request) -> Answer:
        if request.target == "/v2/repository/index":
            return Answer(body=unavailable.encode())
        error = "Request for unknown model: 'm' has no available versions"
        return Answer(404, json.dumps({"error": error}).encode())

    with FaultServer(answer) as server:
        started = time.monotonic()
        with pytest.raises(ModelNotReadyError, match="m \\(unavailable\\)"):
            open_model(server.endpoint)
        assert time.monotonic() - started < 1.5


def test_wait_for_a_held_request_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale from zero: nothing comes back for longer than the pause between two lines (10 s)."""
    monkeypatch.setattr("beam_triton.client._LOG_EVERY_SECONDS", 0.2)
    ready_at = time.monotonic() + 1.0

    def held(exchange: Any) -> None:
        time.sleep(max(0.0, ready_at - time.monotonic()))
        exchange.send(exchange.answer().encode())

    with FaultServer(origin, held) as server, TritonClient(server.endpoint) as client:
        client.open_model("m", wait_seconds=30.0).close()
    lines = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert 2 <= len(lines) <= 5
    assert lines[-1].endswith("so far: no answer yet")
