"""``python -m beam_triton`` on a real Triton."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beam_triton.cli.main import main
from beam_triton.testing import LocalTriton
from tests.support.answers import Answer, Origin, Request, always, forward_to
from tests.support.fault_server import FaultServer
from tests.support.models import write_models


def said(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, whose exit code is as expected."""
    found = main(arguments)
    captured = capsys.readouterr()
    assert found == code, captured
    return captured.out + captured.err


def changed(triton: LocalTriton, path: str, answer: Answer) -> Origin:
    """The real server, but for one path."""
    real = forward_to(int(triton.endpoint.rpartition(":")[2]))
    return lambda request: answer if request.target == path else real(request)


def test_as_a_command_of_the_shell(triton: LocalTriton) -> None:
    """The module runs by itself; standard output is for its user."""
    command = [sys.executable, "-m", "beam_triton", "check", triton.endpoint, "--model", "double"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("server      triton 2.51.0, answered in ")
    assert done.stdout.endswith("All is well.\n")


def test_check_of_a_server(triton: LocalTriton, capsys: pytest.CaptureFixture[str]) -> None:
    """Version, health, extensions and every model with its state."""
    text = said(["check", triton.endpoint], 0, capsys)
    assert re.search(r"^health +live, ready$", text, re.M)
    assert re.search(r"^extensions .*binary_tensor_data", text, re.M)
    assert "request_facts 1 READY" in text and "request_facts 3 READY" in text
    assert "round trip" not in text


def test_check_of_a_model(triton: LocalTriton, capsys: pytest.CaptureFixture[str]) -> None:
    """Its inputs, outputs and limit, and a round trip."""
    text = said(["check", triton.endpoint, "--model", "ragged", "--shape", "values=7"], 0, capsys)
    assert re.search(r"^model +ragged:1, at most 32 elements a request$", text, re.M)
    assert re.search(r"^inputs +values FP32 \[-1\]$", text, re.M)
    assert re.search(r"^outputs +total FP32 \[1\]\n +doubled FP32 \[-1\]$", text, re.M)
    assert re.search(r"^round trip +\d+\.\d ms", text, re.M)
    assert "values FP32 [7]; came back: total [1, 1], doubled [1, 7]" in text


@pytest.mark.parametrize("model_name", ["every_datatype", "unbatched", "optional_input", "shout", "ensemble"])
def test_check_of_many_kinds_of_models(
    triton: LocalTriton, model_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are zeros for each of them."""
    assert "All is well." in said(["check", triton.endpoint, "--model", model_name], 0, capsys)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "doubel"], r"PROBLEM: .*'doubel'.*the server has: .*double"),
        (["--model", "double", "--model-version", "9"], r"PROBLEM: .*9"),
        (["--model", "countdown"], "PROBLEM: .*decoupled"),
        (["--model", "running_sum"], "PROBLEM: .*sequences"),
        (["--model", "one_row_less"], r"PROBLEM|came back: y \[0, 1\]"),
    ],
)
def test_problems_of_models(
    triton: LocalTriton, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a sentence, and fails the command."""
    code = 0 if "one_row_less" in arguments else 1
    assert re.search(problem, said(["check", triton.endpoint, *arguments], code, capsys))


@pytest.mark.parametrize(
    ("path", "answer", "code", "expected"),
    [
        ("/v2/health/ready", Answer(400), 1, "PROBLEM: The server is live but not ready"),
        ("/v2/health/live", Answer(400), 1, "PROBLEM: The server answers that it is not live"),
        ("/v2", Answer(200, b"<html>hello</html>"), 1, "Is this the HTTP port?"),
        ("/v2", Answer(401, b'{"error": "who are you?"}'), 1, "Give --auth-token env:NAME"),
        ("/v2", Answer(200, b'{"name": "mlserver", "version": "1.7"}'), 0, "tensors travel as JSON"),
        ("/v2/repository/index", Answer(404, b"{}"), 0, "the server does not list them"),
    ],
)
def test_what_servers_may_say(
    triton: LocalTriton,
    path: str,
    answer: Answer,
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each way of being unwell has its own sentence; what is merely less is no problem."""
    with FaultServer(changed(triton, path, answer)) as server:
        assert expected in said(["check", server.endpoint], code, capsys)


def test_a_model_that_refuses_zeros(triton: LocalTriton, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal is told with what was sent."""
    refusal = Answer(400, b'{"error": "not these"}')
    with FaultServer(changed(triton, "/v2/models/double/infer", refusal)) as server:
        text = said(["check", server.endpoint, "--model", "double"], 1, capsys)
    assert "did not answer a request of zeros (x FP32 [4])" in text
    assert "not these" in text


def test_tokens_and_headers_reach_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """References are read, sent with every request, and never printed."""
    monkeypatch.setenv("BEAM_TRITON_TEST_TOKEN", "t0ken-of-the-service")
    key = tmp_path / "key"
    key.write_text("k3y\n")
    metadata = b'{"name": "triton", "version": "1", "extensions": []}'
    with FaultServer(always(Answer(200, metadata))) as server:
        arguments = ["--auth-token", "env:BEAM_TRITON_TEST_TOKEN", "--header", f"X-Key=file:{key}"]
        text = said(["check", server.endpoint, *arguments], 0, capsys)
        requests: list[Request] = list(server.requests)
    assert requests
    assert {request.header("Authorization") for request in requests} == {"Bearer t0ken-of-the-service"}
    assert {request.header("X-Key") for request in requests} == {"k3y"}
    assert "t0ken" not in text and "k3y" not in text


def test_tune_finds_what_suits_a_slow_model(triton: LocalTriton, capsys: pytest.CaptureFixture[str]) -> None:
    """16 instances of 20 ms: large batches, many in flight, within the time that was given."""
    started = time.monotonic()
    text = said(["tune", triton.endpoint, "--model", "remote_like", "--seconds", "4"], 0, capsys)
    assert time.monotonic() - started < 8
    found = re.search(r'"max_batch_size": (\d+)\},\n +max_concurrent_requests=(\d+)\)', text)
    assert found is not None, text
    assert int(found[1]) >= 32
    assert int(found[2]) >= 8
    assert "latency, ms" in text


def test_tune_of_a_model_without_batches(triton: LocalTriton, capsys: pytest.CaptureFixture[str]) -> None:
    """One element a request: only the number in flight is looked for."""
    arguments = ["--model", "unbatched", "--shape", "x=3,4", "--seconds", "1", "--max-in-flight", "4"]
    text = said(["tune", triton.endpoint, *arguments], 0, capsys)
    assert '"max_batch_size": 1}' in text


def test_tune_does_not_recommend_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A queue of two refuses more: such settings are shown with their error and not chosen."""
    with LocalTriton(write_models(tmp_path / "models", ["full_queue"])) as server:
        arguments = ["--model", "full_queue", "--seconds", "3", "--max-in-flight", "16"]
        text = said(["tune", server.endpoint, *arguments], 0, capsys)
    assert "failed: " in text
    found = re.search(r"max_concurrent_requests=(\d+)", text)
    assert found is not None
    assert int(found[1]) <= 4


@pytest.mark.parametrize(("model_name", "code"), [("countdown", 2), ("doubel", 1)])
def test_tune_of_models_that_cannot_be_scored(
    triton: LocalTriton, model_name: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are refused before anything is measured."""
    text = said(["tune", triton.endpoint, "--model", model_name], code, capsys)
    assert "latency" not in text
