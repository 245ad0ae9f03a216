"""The hook for a request: what it is given, what it may change, and what is said where it fails."""

from __future__ import annotations

import hashlib
import hmac
import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import requests.auth
from apache_beam.internal import pickler
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.transforms.display import DisplayData
from requests import PreparedRequest

from beam_triton import ConfigurationError, InferenceError, TritonClient, TritonInference
from beam_triton.auth.hook import authorized
from beam_triton.testing import FakeModel, FakeTriton
from tests.support import faults
from tests.support.answers import Answer, Request, forward_to
from tests.support.fault_server import FaultServer, serve

KEY = b"k3y-of-the-signature"
SECRET = "s3cret-of-the-hook"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
ECHO = FakeModel(lambda given: {"y": given["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])})


def signature(method: str, target: str, content_type: str, body: bytes) -> str:
    text = b"\n".join([method.encode(), target.encode(), content_type.encode(), body])
    return hmac.new(KEY, text, hashlib.sha256).hexdigest()


def sign(method: str, url: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
    target = "/" + url.split("://")[1].partition("/")[2]
    return {"X-Signature": signature(method, target, headers.get("Content-Type", ""), body)}


class Signer(requests.auth.AuthBase):
    """The same, as users of requests write it."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        body = request.body or b""
        assert isinstance(body, bytes) and request.method is not None
        content_type = str(request.headers.get("Content-Type", ""))
        request.headers["X-Signature"] = signature(request.method, request.path_url, content_type, body)
        return request


class Counting:
    """Another header at each call."""

    calls = 0

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        self.calls += 1
        return {"Authorization": f"Bearer {SECRET}-{self.calls}"}


def assert_signed(request: Request) -> None:
    expected = signature(request.method, request.target, request.header("Content-Type"), request.body)
    assert request.header("X-Signature") == expected, f"{request.method} {request.target}"


@pytest.mark.parametrize("auth", [sign, Signer()], ids=["callable", "AuthBase"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_every_request_is_signed(auth: Any, compression: str | None) -> None:
    """Metadata, configuration, health, index and inference, over the bytes that are sent."""
    with (
        FakeTriton({"echo": ECHO}) as triton,
        FaultServer(forward_to(int(triton.endpoint.rpartition(":")[2]))) as server,
        TritonClient(server.endpoint, auth=auth, compression=compression) as client,
    ):
        assert client.is_server_ready() and client.is_model_ready("echo")
        client.repository_index()
        np.testing.assert_array_equal(client.infer("echo", {"x": X}).outputs["y"], X)
        large = np.zeros((64, 4), np.float32)
        client.infer("echo", {"x": large})
        targets = {request.target for request in server.requests}
        for request in server.requests:
            assert_signed(request)
    assert targets >= {"/v2", "/v2/models/echo", "/v2/models/echo/config", "/v2/models/echo/infer"}


def test_parts_of_a_body_are_given_as_one() -> None:
    """Large elements are sent from where they lie; the hook sees them joined."""
    wide = FakeModel(
        lambda given: {"y": given["x"][:, :1]}, inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [1])}
    )
    elements = [np.full(20_000, value, np.float32) for value in range(3)]
    with FakeTriton({"wide": wide}) as triton:
        port = int(triton.endpoint.rpartition(":")[2])
        with FaultServer(forward_to(port)) as server, TestPipeline() as pipeline:
            _ = pipeline | beam.Create(elements) | TritonInference(server.endpoint, "wide", auth=sign)
        inferences = [request for request in server.requests if request.target.endswith("/infer")]
        assert inferences and max(len(request.body) for request in inferences) > 80_000
        for request in server.requests:
            assert_signed(request)


def test_each_attempt_is_signed_anew() -> None:
    """A signature may hold the time: a retry does not send the old one."""
    with (
        FakeTriton({"echo": ECHO}) as triton,
        TritonClient(
            triton.endpoint, auth=Counting(), retry={"initial_backoff_seconds": 0.01}, timeout_seconds=20
        ) as client,
    ):
        triton.fail_next(2, status=503)
        client.infer("echo", {"x": X})
        tokens = [request.headers["Authorization"] for request in triton.requests]
    assert len(tokens) == len(set(tokens)) == 3


def test_health_checks_are_signed() -> None:
    """What a breaker sends to a server that was down."""
    with FakeTriton({"echo": ECHO}) as triton:
        port = int(triton.endpoint.rpartition(":")[2])
        with (
            FaultServer(forward_to(port)) as server,
            TritonClient(
                server.endpoint,
                auth=sign,
                retry={"max_retries": 1, "initial_backoff_seconds": 0.01},
                circuit_breaker={
                    "minimum_requests": 1,
                    "open_seconds": 1,
                    "health_check_interval_seconds": 0.05,
                },
            ) as client,
        ):
            client.infer("echo", {"x": X})
            server.play([faults.answered(Answer(503))] * 2)
            before = len(server.requests)
            client.infer("echo", {"x": X})
            targets = [request.target for request in server.requests[before:]]
            for request in server.requests:
                assert_signed(request)
    assert "/v2/health/ready" in targets


class Renewable(Counting):
    """Gives the token that it keeps until it is asked to renew it."""

    token = "old"

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def renew(self) -> None:
        self.token = "new"


@pytest.mark.parametrize("auth", [Renewable(), Counting()], ids=["renewed", "differs"])
def test_refused_request_is_sent_once_more(auth: Any) -> None:
    """A 401 has the hook asked again, and renewed before where it can be."""
    with FakeTriton({"echo": ECHO}) as triton:
        port = int(triton.endpoint.rpartition(":")[2])
        with (
            FaultServer(forward_to(port), when=lambda line: b"/infer" in line) as server,
            TritonClient(server.endpoint, auth=auth, retry={"max_retries": 0}) as client,
        ):
            server.play([faults.answered(Answer(401)), serve])
            client.infer("echo", {"x": X})
            server.play(faults.answered(Answer(401)))
            before = len(server.requests)
            with pytest.raises(InferenceError, match="401"):
                client.infer("echo", {"x": X})
            assert len(server.requests) - before <= 2


def adds_a_key(request: PreparedRequest) -> PreparedRequest:
    request.prepare_url(request.url, {"key": "1"})
    return request


class Changing(requests.auth.AuthBase):
    """Changes the request as a function says."""

    def __init__(self, change: Callable[[PreparedRequest], Any]) -> None:
        self.change = change

    def __call__(self, request: PreparedRequest) -> Any:
        return self.change(request)


def test_query_may_be_added() -> None:
    """Gateways take a key there."""
    seen = authorized(Changing(adds_a_key), "POST", "http://h:8000", "/v2", {"Host": "h:8000"}, [b"{}"])
    assert seen.target == "/v2?key=1" and seen.headers == {"Host": "h:8000"}


def test_basic_authorization_of_requests_works() -> None:
    """The class that users of requests know best."""
    auth = requests.auth.HTTPBasicAuth("user", SECRET)
    with FakeTriton({"echo": ECHO}) as triton, TritonClient(triton.endpoint, auth=auth) as client:
        client.infer("echo", {"x": X})
        assert triton.requests[0].headers["Authorization"].startswith("Basic ")


def fails(method: str, url: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
    raise KeyError(f"{SECRET} {headers}")


def waits_for_an_answer(request: PreparedRequest) -> PreparedRequest:
    request.hooks["response"].append(lambda response, **options: response)
    return request


def to_another_host(request: PreparedRequest) -> PreparedRequest:
    request.url = "http://elsewhere.example/v2"
    return request


def another_body(request: PreparedRequest) -> PreparedRequest:
    request.body = b"other"
    return request


WRONG: dict[str, tuple[Any, str]] = {
    "raises": (fails, r"auth \(fails\) raised KeyError at .*test_hook.py:\d+"),
    "nothing": (lambda *given: None, "returned a NoneType, and must return the header fields"),
    "number": (lambda *given: {"X-Number": 1}, "header X-Number is a int"),
    "line end": (lambda *given: {"X-Key": f"{SECRET}\n"}, "header X-Key holds a line end"),
    "name": (lambda *given: {"X Key": SECRET}, "header name 'X Key' is not valid"),
    "length": (lambda *given: {"Content-Length": "1"}, "changed content-length, which the library sets"),
    "hook": (Changing(waits_for_an_answer), "waits for the server's answer"),
    "host": (Changing(to_another_host), "changed the request's host"),
    "body": (Changing(another_body), "changed the request's body"),
    "request": (Changing(lambda request: None), "returned a NoneType, and must return the request"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_the_hook_did_wrong(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """With its name and the place, and nothing of what it knows."""
    caplog.set_level(logging.DEBUG)
    auth, message = WRONG[name]
    with FakeTriton({"echo": ECHO}) as triton, TritonClient(triton.endpoint, auth=auth) as client:
        with pytest.raises(ConfigurationError, match=message) as caught:
            client.infer("echo", {"x": X})
        assert not triton.requests
    shown = (
        f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r} {caplog.text} {client!r}"
    )
    assert SECRET not in shown


NOT_AUTH: dict[str, tuple[Any, str]] = {
    "tuple": (("user", SECRET), "not a tuple; for a user and a password give requests.auth.HTTPBasicAuth"),
    "string": (SECRET, "not a str; for a bearer token give auth_token"),
    "class": (Signer, "not the class Signer: give an object of it"),
    "digest": (requests.auth.HTTPDigestAuth("user", SECRET), "HTTPDigestAuth answers a challenge"),
    "number": (3, "not a int"),
}


@pytest.mark.parametrize("name", NOT_AUTH)
def test_what_is_no_hook_is_refused_at_construction(name: str) -> None:
    """Before a job starts, and without the secret."""
    auth, message = NOT_AUTH[name]
    with pytest.raises(ConfigurationError, match=message) as caught:
        TritonClient("http://triton:8000", auth=auth)
    assert SECRET not in str(caught.value)


def test_hook_travels_in_the_pipeline_and_is_shown_by_name() -> None:
    """Its class is in the display data, its values are not."""
    transform = TritonInference("http://triton:8000", "echo", auth=requests.auth.HTTPBasicAuth("u", SECRET))
    shown = str(DisplayData.create_from(transform).items)
    assert "HTTPBasicAuth" in shown and SECRET not in shown
    assert pickle.loads(pickle.dumps(transform)) is not None

    def of_this_test(method: str, url: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
        return {}

    assert pickler.loads(pickler.dumps(TritonInference("http://t:8000", "m", auth=of_this_test))) is not None
