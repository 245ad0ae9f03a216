"""A client and what may lie between it and its server: virtual hosts, proxies, sockets, HTTP fronts."""

from __future__ import annotations

import itertools
import logging
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from beam_triton import TritonClient
from beam_triton.errors import (
    ConnectError,
    ConnectTimeoutError,
    InferenceError,
    ServerUnavailableError,
    TritonError,
)
from beam_triton.options import InferenceOptions
from beam_triton.testing import FakeModel, FakeTriton
from tests.support import faults
from tests.support.answers import Answer, always, forward_to
from tests.support.fault_server import Exchange, Fault, FaultServer, serve
from tests.support.tinyproxy import Tinyproxy

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


def not_loopback(endpoint: str) -> str:
    """The same server by an address that the environment's proxies are for."""
    return endpoint.replace("127.0.0.1", "0.0.0.0")


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


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no proxies."""
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)
    return monkeypatch


@pytest.mark.usefixtures("no_proxies")
def test_plain_requests_give_a_proxy_the_whole_url(front: FaultServer) -> None:
    """Inference, metadata and health alike; here the server is taken for a proxy."""
    proxy = front.endpoint.replace("//", "//user:s3cret@")
    with (
        FaultServer(forward_to(front.port)) as relay,
        TritonClient(
            "http://triton.example/team", proxies={"http": proxy.replace(str(front.port), str(relay.port))}
        ) as client,
    ):
        client.is_server_ready()
        with pytest.raises(TritonError):
            client.infer("m", {"x": X})
        asked = relay.requests
    assert {request.target.partition("/v2")[0] for request in asked} == {"http://triton.example/team"}
    assert {request.header("Host") for request in asked} == {"triton.example"}
    assert {request.header("Proxy-Authorization") for request in asked} == {"Basic dXNlcjpzM2NyZXQ="}


@pytest.mark.tinyproxy
def test_plain_requests_go_through_the_proxy_of_the_environment(
    front: FaultServer, no_proxies: pytest.MonkeyPatch
) -> None:
    """All of them; none with ``trust_env=False``, or where NO_PROXY or ``proxies`` says so, or for
    a loopback address."""
    endpoint = not_loopback(front.endpoint)
    with Tinyproxy() as proxy:
        no_proxies.setenv("HTTP_PROXY", proxy.url)
        with TritonClient(endpoint) as client:
            assert client.is_model_ready("m") and scores(client)
        through = len(proxy.requests())
        assert through == len(front.requests) >= 5
        assert all(request.header("Via") for request in front.requests)
        for options in (
            {"trust_env": False},
            {"proxies": {"http": None}},
            {"proxies": {"no_proxy": "0.0.0.0"}},
        ):
            with TritonClient(endpoint, **options) as client:
                assert scores(client)
        with TritonClient(front.endpoint) as client:
            assert scores(client)
        no_proxies.setenv("NO_PROXY", "0.0.0.0")
        with TritonClient(endpoint) as client:
            assert scores(client)
        assert len(proxy.requests()) == through < len(front.requests)


@pytest.mark.tinyproxy
@pytest.mark.usefixtures("no_proxies")
def test_direct_and_forwarded_connections_are_never_mixed_up(
    front: FaultServer, no_proxies: pytest.MonkeyPatch
) -> None:
    """Two clients share a pool, and the environment changes between them."""
    endpoint = not_loopback(front.endpoint)
    with Tinyproxy() as proxy, TritonClient(endpoint) as direct:
        assert scores(direct) and not front.requests[-1].header("Via")
        no_proxies.setenv("http_proxy", proxy.url)
        with TritonClient(endpoint) as forwarded:
            assert scores(forwarded) and front.requests[-1].header("Via")
            assert scores(direct) and not front.requests[-1].header("Via")
        no_proxies.delenv("http_proxy")
        with TritonClient(endpoint) as direct_again:
            assert scores(direct_again) and not front.requests[-1].header("Via")


@pytest.mark.tinyproxy
@pytest.mark.usefixtures("no_proxies")
def test_credentials_of_a_proxy_are_used_and_shown_nowhere(
    front: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in logs, errors, reprs or display data; a proxy that misses them says so."""
    with Tinyproxy(credentials=("user", "s3cret")) as proxy, caplog.at_level(logging.DEBUG):
        options = InferenceOptions(
            endpoint=front.endpoint, proxies={"http": proxy.url_with_credentials, "https": "env:TEAM_PROXY"}
        )
        with TritonClient.from_inference_options(options) as client:
            assert scores(client)
        shown = [repr(options), str(options.shown()), repr(client), repr(options.network)]
        assert not any(request.header("Proxy-Authorization") for request in front.requests)
        assert options.shown()["proxies"] == f"http: http://***@127.0.0.1:{proxy.port}, https: env:TEAM_PROXY"
        wrong = proxy.url_with_credentials.replace("s3cret", "s3cret-of-old")
        for url, endpoint in (
            (proxy.url, front.endpoint),
            (wrong, front.endpoint),
            (proxy.url, "https://127.0.0.1:1"),
            (wrong, "https://127.0.0.1:1"),
        ):
            proxies = {"http": url, "https": url}
            with TritonClient(endpoint, proxies=proxies) as client, pytest.raises(TritonError) as raised:
                client.infer("m", {"x": X})
            assert "407" in str(raised.value) or "401" in str(raised.value)
            assert "proxy" in str(raised.value)
            shown += [str(raised.value), repr(raised.value), str(pickle.dumps(raised.value))]
    text = "\n".join([*shown, caplog.text])
    assert "s3cret" not in text and "dXNlcjpzM2NyZXQ" not in text


@pytest.mark.tinyproxy
@pytest.mark.usefixtures("no_proxies")
def test_errors_say_that_a_proxy_is_on_the_way(front: FaultServer) -> None:
    """Whether it is down itself, cannot reach the server, or the server refuses behind it."""
    quick = {"timeout_seconds": 2.0, "retry": {"max_retries": 0}, "circuit_breaker": None}
    with faults.refusing_port() as nobody, Tinyproxy() as proxy:
        down = {"http": f"http://127.0.0.1:{nobody}"}
        with (
            TritonClient(front.endpoint, proxies=down, **quick) as client,
            pytest.raises(ConnectError) as raised,
        ):
            client.infer("m", {"x": X})
        assert f"the proxy http://127.0.0.1:{nobody}" in str(raised.value)
        through = {"http": proxy.url}
        with (
            TritonClient(f"http://127.0.0.1:{nobody}", proxies=through, **quick) as client,
            pytest.raises(ServerUnavailableError, match=f"through the proxy {proxy.url}"),
        ):
            client.infer("m", {"x": X})
        with TritonClient(front.endpoint, proxies=through, **quick) as client:
            assert scores(client)
            front.play(faults.answered(Answer(400, b'{"error": "no"}')))
            with pytest.raises(InferenceError, match=rf"endpoint=.* \(through the proxy {proxy.url}\)"):
                client.infer("m", {"x": X})


@pytest.mark.tinyproxy
@pytest.mark.usefixtures("no_proxies")
def test_server_that_is_down_behind_a_proxy_is_waited_for(triton: FakeTriton) -> None:
    """tinyproxy answers 500 for it, which is no model's doing."""
    with (
        Tinyproxy() as proxy,
        TritonClient(triton.endpoint, proxies={"http": proxy.url}, timeout_seconds=5.0) as client,
    ):
        assert scores(client)
        triton.stop()
        restart = threading.Timer(0.5, triton.start)
        restart.start()
        assert scores(client)
        restart.join()


@pytest.mark.usefixtures("no_proxies")
def test_ipv6_addresses_are_endpoints(triton: FakeTriton) -> None:
    """In brackets, as URLs have them, and so in the Host header."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(FaultServer(forward_to(port_of(triton)), address="::1"))
        except OSError:
            pytest.skip("this machine has no IPv6")
        client = stack.enter_context(TritonClient(server.endpoint))
        assert client.is_model_ready("m") and scores(client)
        assert {request.header("Host") for request in server.requests} == {f"[::1]:{server.port}"}


def test_unix_sockets_are_endpoints(
    triton: FakeTriton, no_proxies: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For all requests, whatever proxies there are; connections are kept, and long deadlines do no harm."""
    no_proxies.setenv("ALL_PROXY", "http://127.0.0.1:1")
    path = str(tmp_path / "My server.sock")
    with (
        FaultServer(forward_to(port_of(triton)), address=path) as server,
        TritonClient(server.endpoint, timeout_seconds=120.0, discovery="dns") as client,
    ):
        assert client.is_model_ready("m") and client.repository_index()
        assert all(scores(client) for _ in range(3))
        assert {request.header("Host") for request in server.requests} == {"localhost"}
        assert server.opened == 1
        server.drop_connections()
        assert scores(client)
        server.play([faults.reset_after_reading])
        assert scores(client)


def test_unix_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    """As an endpoint that refuses; one that takes no connection ends in time."""
    path = tmp_path / "no.sock"
    endpoint = f"http+unix://{quote(str(path), safe='')}"
    with TritonClient(endpoint, retry={"max_retries": 0}) as client, pytest.raises(ConnectError) as raised:
        client.infer("m", {"x": X})
    assert f"cannot connect to {endpoint}: [Errno 2]" in str(raised.value)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as occupant:
        listener.bind(str(path))
        listener.listen(0)
        occupant.connect(str(path))
        started = time.monotonic()
        with TritonClient(endpoint, timeout_seconds=0.6) as client, pytest.raises(ConnectTimeoutError):
            client.infer("m", {"x": X})
        assert 0.3 <= time.monotonic() - started < 1.5


SECRETS = {"X-Key": "s3cret"}


def to(location: str, status: int = 308) -> Fault:
    return faults.answered(Answer(status, b"", (("Location", location),)))


def by_path(server: FaultServer) -> Fault:
    """Redirects to the same path of another server."""

    def play(exchange: Exchange) -> None:
        request = exchange.request()
        to(f"{server.endpoint}{request.target}", 307)(exchange)

    return play


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("status", [307, 308])
def test_redirects_keep_method_and_body(
    front: FaultServer, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of inference, the repository index and health; the log says once what saves the detour."""
    with (
        FaultServer(always(Answer(404))) as ingress,
        TritonClient(ingress.endpoint, headers=SECRETS, auth_token="s3cret") as client,
    ):
        ingress.play(by_path(front))
        assert client.is_model_ready("m") and client.repository_index()
        assert scores(client) and scores(client)
        assert [request.method for request in front.requests].count("POST") == 3
        assert ingress.requests[-1].header("X-Key") == "s3cret"
        for request in front.requests:
            assert not request.header("X-Key") and not request.header("Authorization")
            assert request.header("Host") == f"127.0.0.1:{front.port}"
    warnings = [record.getMessage() for record in caplog.records if "redirects to" in record.getMessage()]
    assert warnings == [
        f"{ingress.endpoint} redirects to {front.endpoint}: as endpoint, it gets each request once"
    ]


@pytest.mark.usefixtures("no_proxies")
def test_redirect_within_a_server_keeps_credentials(front: FaultServer) -> None:
    """As one that adds a slash, or leads around."""
    with TritonClient(front.endpoint, headers=SECRETS) as client:
        client.model_metadata("m")
        front.play([to("/v2/models/m?slash=1", 301)])
        assert client.model_metadata("m")["name"] == "m"
        assert front.requests[-1].target == "/v2/models/m?slash=1"
        detour = [to("/a"), to("/b"), to("/v2/models/m/infer")]
        front.play(itertools.chain(itertools.repeat(serve, 3), detour))
        assert scores(client)
    assert {request.header("X-Key") for request in front.requests} == {"s3cret"}


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("status", [301, 302, 303])
def test_redirect_that_drops_the_body_is_an_error_that_says_so(front: FaultServer, status: int) -> None:
    """And says which endpoint helps; metadata follow it."""
    with TritonClient(front.endpoint) as client:
        assert scores(client)
        front.play(to("https://user:pw@m.example/v2/models/m/infer", status))
        with pytest.raises(InferenceError, match=f"A {status} makes a GET of a request") as raised:
            client.infer("m", {"x": X})
        assert "redirected to https://m.example/v2/models/m/infer" in str(raised.value)
        assert "pw" not in str(raised.value) and raised.value.attempt_count == 1


@pytest.mark.usefixtures("no_proxies")
def test_redirects_are_bounded(front: FaultServer) -> None:
    """A loop ends, for inference, metadata and readiness."""
    with TritonClient(front.endpoint) as client:
        assert scores(client)
        before = len(front.requests)
        front.play(to("/round"))
        with pytest.raises(InferenceError, match="5 redirects in a row"):
            client.infer("m", {"x": X})
        assert len(front.requests) - before == 6
        with pytest.raises(InferenceError, match="redirected to /round"):
            client.model_metadata("m")
        assert not client.is_server_ready()
        assert len(front.requests) - before == 18


@pytest.mark.usefixtures("no_proxies")
def test_server_behind_a_redirect_may_restart(triton: FakeTriton, front: FaultServer) -> None:
    """Requests are repeated from the first endpoint on; its health checks follow the redirect."""
    with (
        FaultServer(always(Answer(404)), by_path(front)) as ingress,
        TritonClient(
            ingress.endpoint,
            timeout_seconds=2.0,
            circuit_breaker={"minimum_requests": 1, "open_seconds": 30.0},
        ) as client,
    ):
        assert scores(client)
        front.play(faults.answered(Answer(503)))
        healing = threading.Timer(0.5, front.play, [()])
        healing.start()
        assert scores(client)
        healing.join()
        assert any(request.target == "/v2/health/ready" for request in front.requests)


def closing(exchange: Exchange) -> None:
    """Announces the end of the connection with each answer, and ends it."""
    answer = exchange.answer()
    exchange.send(replace(answer, headers=(*answer.headers, ("Connection", "close"))).encode())
    exchange.close()


def http_1_0(exchange: Exchange) -> None:
    """An answer of HTTP/1.0 that ends with its connection."""
    answer = exchange.answer()
    head = answer.head().replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    exchange.send(b"\r\n".join(lines) + answer.body)
    exchange.close()


def chunked(exchange: Exchange) -> None:
    """An answer whose length is not known beforehand, in chunks with extensions and trailers."""
    answer = exchange.answer()
    head = replace(answer, headers=(*answer.headers, ("Transfer-Encoding", "chunked"))).head()
    pieces = [answer.body[start : start + 50] for start in range(0, len(answer.body), 50)]
    body = b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    exchange.send(head + body + b"0\r\nX-Trailer: 1\r\n\r\n")


def continuing(exchange: Exchange) -> None:
    """Interim answers before the answer, as for Expect: 100-continue and early hints."""
    exchange.read_head()
    exchange.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    exchange.send(exchange.answer().encode())


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("front_kind", "reuses"), [(closing, False), (http_1_0, False), (chunked, True), (continuing, True)]
)
def test_fronts_answer_as_http_allows(front: FaultServer, front_kind: Fault, reuses: bool) -> None:
    """All kinds of requests, many of them, and large tensors; nothing is counted as a failure."""
    large = np.arange(40_000, dtype=np.float32).reshape(10_000, 4)
    front.play(front_kind)
    with TritonClient(front.endpoint, retry={"max_retries": 0}, circuit_breaker=None) as client:
        assert client.is_model_ready("m") and client.repository_index()
        assert all(scores(client) for _ in range(20))
        assert np.array_equal(client.infer("m", {"x": large}).outputs["y"], 2 * large)
    assert (front.opened < len(front.requests) / 2) is reuses
