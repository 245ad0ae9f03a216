"""Request heads: how long they are cached, when secrets are read again, and what happens if that fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from beam_triton.dispatch import request_head as module
from beam_triton.dispatch.request_head import HeadWriter, HttpRequest
from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.proxies import Proxy

URL = EndpointUrl.parse("http://triton:8000")
INFER = HttpRequest("POST", "/v2/models/m/infer", (("Content-Type", "a/b"),), (b"body",), 4)
READY = HttpRequest("GET", "/v2/health/ready")


def reading(path: Path) -> Callable[[], Mapping[str, str]]:
    """The headers of a user with a token in a file."""
    return InferenceOptions(endpoint="http://triton:8000", auth_token=f"file:{path}").header_values


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("old")
    return path


def sent_token(writer: HeadWriter, request: HttpRequest = INFER) -> str:
    head = bytes(writer.parts(URL, request)[0]).decode("latin-1")
    return head.partition("Authorization: Bearer ")[2].partition("\r\n")[0]


def test_heads_are_cached_for_a_second(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotated secret is read after a second, not before."""
    writer = HeadWriter(reading(token), keep_alive=True)
    assert sent_token(writer) == "old"
    token.write_text("new")
    assert sent_token(writer) == "old"
    monkeypatch.setattr(module, "_HEADERS_FRESH_SECONDS", 0.05)
    writer = HeadWriter(reading(token), keep_alive=True)
    assert sent_token(writer) == "new"
    token.write_text("newer")
    time.sleep(0.06)
    assert sent_token(writer) == "newer"


@pytest.mark.parametrize("name", ["Host", "host"])
@pytest.mark.parametrize("request_", [INFER, READY])
def test_a_given_host_takes_the_place_of_the_endpoints(name: str, request_: HttpRequest) -> None:
    """A request has one Host, for inference and health checks alike."""
    writer = HeadWriter(lambda: {name: "m.default.example.com"}, keep_alive=True)
    lines = bytes(writer.parts(URL, request_)[0]).decode("latin-1").lower().split("\r\n")
    assert [line for line in lines if line.startswith("host:")] == ["host: m.default.example.com"]


def test_a_given_host_that_a_proxy_replaces_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that forwards sends the host of the URL; one that opens tunnels sees no request."""
    writer = HeadWriter(lambda: {"Host": "m.example"}, keep_alive=True)
    proxy = Proxy("proxy", 3128, "Basic s3cret")
    tls = EndpointUrl.parse("https://triton")
    tunnel = tls._replace(origin=tls.origin._replace(proxy=proxy))
    assert b"s3cret" not in bytes(writer.parts(tunnel, INFER)[0]) and not caplog.records
    forwarded = URL._replace(origin=URL.origin._replace(proxy=proxy))
    for request in (INFER, READY):
        assert b"\r\nProxy-Authorization: Basic s3cret\r\n" in bytes(writer.parts(forwarded, request)[0])
    (record,) = caplog.records
    assert "Host header" in record.getMessage() and "s3cret" not in record.getMessage()


def test_forget_reads_the_secret_again(token: Path) -> None:
    """After ``forget`` the secret is read for the next request, for every kind of request."""
    writer = HeadWriter(reading(token), keep_alive=True)
    assert (sent_token(writer), sent_token(writer, READY)) == ("old", "old")
    token.write_text("new")
    writer.forget()
    assert (sent_token(writer), sent_token(writer, READY)) == ("new", "new")


@pytest.mark.parametrize("request_", [INFER, READY])
def test_head_with_a_rotated_secret_is_outdated(token: Path, request_: HttpRequest) -> None:
    """At once, and every time it is checked; a head with the current secret is not."""
    writer = HeadWriter(reading(token), keep_alive=True)
    old = writer.parts(URL, request_)[0]
    assert not writer.is_outdated(URL, request_, old)
    token.write_text("new")
    assert writer.is_outdated(URL, request_, old) and writer.is_outdated(URL, request_, old)
    assert sent_token(writer, request_) == "new"
    assert not writer.is_outdated(URL, request_, writer.parts(URL, request_)[0])


def test_head_without_secrets_is_never_outdated() -> None:
    """A server's refusal of such a head is final."""
    writer = HeadWriter(dict, keep_alive=True)
    assert not writer.is_outdated(URL, INFER, writer.parts(URL, INFER)[0])


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("")])
def test_briefly_missing_secret_fails_nothing(
    token: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], object]
) -> None:
    """Requests use the value read last, the log says so once, and the new secret is read when it appears."""
    writer = HeadWriter(reading(token), keep_alive=True)
    old = writer.parts(URL, INFER)[0]
    spoil(token)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            writer.forget()
            assert sent_token(writer) == "old" and not writer.is_outdated(URL, INFER, old)
    assert len(caplog.records) == 1
    assert all("auth_token" in record.getMessage() for record in caplog.records)
    assert "old" not in caplog.text
    token.write_text("new")
    assert writer.is_outdated(URL, INFER, old) and sent_token(writer) == "new"


def test_grace_period_for_a_missing_secret_ends(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that stays missing becomes an error, and one that was never there is an error at once."""
    monkeypatch.setattr(module, "HEADERS_GRACE_SECONDS", 0.1)
    writer = HeadWriter(reading(token), keep_alive=True)
    old = writer.parts(URL, INFER)[0]
    token.unlink()
    writer.forget()
    assert sent_token(writer) == "old"
    time.sleep(0.12)
    writer.forget()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="auth_token"):
            writer.parts(URL, INFER)
    assert not writer.is_outdated(URL, INFER, old)
    with pytest.raises(ConfigurationError, match="auth_token"):
        HeadWriter(reading(token), keep_alive=True).parts(URL, INFER)
