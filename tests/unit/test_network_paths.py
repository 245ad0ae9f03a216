"""A client and what may lie between it and its server: virtual hosts, proxies, sockets, HTTP fronts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from beam_triton import TritonClient
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.answers import forward_to
from tests.support.fault_server import FaultServer

X = np.arange(4, dtype=np.float32).reshape(1, 4)


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    doubling = FakeModel(
        lambda inputs: {"y": 2 * inputs["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])}
    )
    with FakeTriton({"m": doubling}) as running:
        yield running


@pytest.fixture
def front(triton: FakeTriton) -> Iterator[FaultServer]:
    """In front of it, byte by byte what a test wants."""
    with FaultServer(forward_to(port_of(triton))) as running:
        yield running


def port_of(triton: FakeTriton) -> int:
    return int(triton.endpoint.rpartition(":")[2])


def scores(client: TritonClient) -> bool:
    return bool(np.array_equal(client.infer("m", {"x": X}).outputs["y"], 2 * X))


def test_a_given_host_is_sent_with_every_request(front: FaultServer) -> None:
    """An ingress routes metadata and health by it as well as inference."""
    host = "m.default.example.com"
    with TritonClient(front.endpoint, headers={"Host": host}) as client:
        assert client.is_server_ready() and client.is_model_ready("m")
        assert client.repository_index()[0]["name"] == "m"
        assert scores(client)
    assert len(front.requests) >= 6
    assert {request.header("Host") for request in front.requests} == {host}
