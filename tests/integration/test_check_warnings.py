"""``check`` says what will hurt, behind a real nginx and in front of a real Triton; the exit code stays 0."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest

from beam_triton.cli.main import main
from beam_triton.testing import LocalTriton
from tests.support.answers import Answer, Origin, forward_to
from tests.support.fault_server import FaultServer
from tests.support.nginx import Nginx


def port_of(triton: LocalTriton) -> int:
    return int(triton.endpoint.rpartition(":")[2])


def warnings(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings of a check that finds no problem."""
    code = main(["check", *arguments])
    captured = capsys.readouterr()
    assert code == 0 and captured.out.endswith("No problems found.\n"), captured
    return re.findall(r"^WARNING: (.*)$", captured.out, re.M)


def test_nothing_hurts_a_model_with_dynamic_batching_that_is_reached_directly(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """No warning without a reason, though the connection was kept idle for a while."""
    arguments = [triton.endpoint, "--model", "prioritized", "--idle-seconds", "1"]
    assert warnings(arguments, capsys) == []


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        (
            "double",
            r"'double' takes up to 32 elements .* no dynamic batching.*`dynamic_batching \{ \}`",
        ),
        ("unbatched", r"max_batch_size: 0: .*Set batching=\{\"max_batch_size\": N\}.*config\.pbtxt"),
    ],
)
def test_a_model_that_does_not_batch_is_named(
    triton: LocalTriton, model_name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to add to its configuration."""
    (warning,) = warnings([triton.endpoint, "--model", model_name], capsys)
    assert re.search(expected, warning)


def test_a_client_that_makes_batches_itself_is_not_told_to(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ensemble's models have the batches, and ``batching`` makes them of a first dimension of -1."""
    assert warnings([triton.endpoint, "--model", "ensemble"], capsys) == []
    arguments = [triton.endpoint, "--model", "unbatched", "--max-batch-size", "4"]
    assert warnings(arguments, capsys) == []


@pytest.mark.nginx
@pytest.mark.parametrize(
    ("nginx_options", "arguments", "expected"),
    [
        pytest.param(
            {"directives": "keepalive_timeout 75s 5s;"},
            [],
            r"nginx/[\d.]+\) closes connections that are idle for 5 s, .* up to 30 s: .*seconds\": 4\}",
            id="announced",
        ),
        pytest.param(
            {"keep_alive_seconds": 1.5},
            ["--idle-seconds", "4"],
            r"closes connections that are idle for (1\.[5-9]|2(\.\d)?) s",
            id="found out",
        ),
        pytest.param(
            {"directives": "keepalive_timeout 0;"},
            ["--idle-seconds", "4"],
            r"closes the connection after each answer",
            id="never kept",
        ),
        pytest.param(
            {"directives": "proxy_set_header Accept-Encoding gzip;"},
            [],
            r"came compressed \(Content-Encoding: gzip\).*no `proxy_set_header Accept-Encoding`",
            id="compressed",
        ),
    ],
)
def test_a_proxy_that_hurts_is_named(
    triton: LocalTriton,
    nginx_options: dict[str, Any],
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it does, why that is slow, and what to set in it or here."""
    with Nginx([port_of(triton)], **nginx_options) as nginx:
        (warning,) = warnings([nginx.endpoint, "--model", "prioritized", *arguments], capsys)
    assert re.search(expected, warning), warning


@pytest.mark.nginx
@pytest.mark.parametrize(
    "nginx_options",
    [
        pytest.param({}, id="as it is delivered"),
        pytest.param(
            {"directives": "gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;"}, id="gzip"
        ),
        pytest.param({"directives": "keepalive_timeout 75s 60s;"}, id="longer than connections are kept"),
    ],
)
def test_a_proxy_that_does_no_harm_is_not_named(
    triton: LocalTriton, nginx_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """nginx's own gzip heeds Accept-Encoding; and no connection is kept for longer than 30 s anyway."""
    with Nginx([port_of(triton)], **nginx_options) as nginx:
        assert warnings([nginx.endpoint, "--model", "prioritized", "--idle-seconds", "0.5"], capsys) == []


@pytest.mark.nginx
def test_the_time_that_a_connection_is_kept_decides(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pool of the user's own that closes them earlier needs no warning."""
    with Nginx([port_of(triton)], directives="keepalive_timeout 75s 5s;") as nginx:
        pool = ["--option", 'pool={"keep_alive_seconds": 4}']
        assert warnings([nginx.endpoint, *pool], capsys) == []


def test_the_wait_for_an_idle_connection_ends_in_time(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that stays open is waited for as long as was asked for, and standard error says so."""
    started = time.monotonic()
    assert main(["check", triton.endpoint, "--idle-seconds", "1"]) == 0
    assert 1 < time.monotonic() - started < 3
    assert "keeping a connection idle for 1 s" in capsys.readouterr().err


def refusing_regions(triton: LocalTriton, status: int) -> Origin:
    """The real server, except that it opens no shared memory."""
    real = forward_to(port_of(triton))
    reason = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
    refusal = Answer(status, json.dumps({"error": reason}).encode())
    return lambda request: refusal if request.target.endswith("/register") else real(request)


def test_shared_memory_that_a_local_server_does_not_open_is_a_warning(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the server's reason; a server without the extension has no such setting."""
    with FaultServer(refusing_regions(triton, 501)) as server:
        (warning,) = warnings([server.endpoint], capsys)
    assert "opens no shared memory (it answered 501: Client shared memory is disabled." in warning
    assert "--allow-client-shm=true" in warning and "--ipc=host" in warning
    with FaultServer(refusing_regions(triton, 404)) as server:
        assert warnings([server.endpoint], capsys) == []


def test_shared_memory_that_is_switched_off_here_is_a_warning(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a server on this machine only."""
    (warning,) = warnings([triton.endpoint, "--option", "shared_memory=never"], capsys)
    assert "Leave it at auto" in warning
