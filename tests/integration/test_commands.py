"""``python -m beam_triton`` on a real Triton."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from beam_triton.cli.main import main
from beam_triton.testing import LocalTriton
from tests.support.answers import Answer, Origin, Request, always, forward_to
from tests.support.fault_server import FaultServer


def printed_by(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, after checking its exit code."""
    found = main(arguments)
    captured = capsys.readouterr()
    assert found == code, captured
    return captured.out + captured.err


def changed(triton: LocalTriton, path: str, answer: Answer) -> Origin:
    """The real server, except for one path."""
    real = forward_to(int(triton.endpoint.rpartition(":")[2]))
    return lambda request: answer if request.target == path else real(request)


def test_check_runs_from_the_shell(triton: LocalTriton) -> None:
    """``python -m`` runs it, and the report goes to standard output."""
    command = [sys.executable, "-m", "beam_triton", "check", triton.endpoint, "--model", "double"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("server      triton 2.51.0, answered in ")
    assert done.stdout.endswith("No problems found.\n")


def test_check_shows_version_health_extensions_and_models(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model, the server alone is checked; every model is listed with its state."""
    text = printed_by(["check", triton.endpoint], 0, capsys)
    assert re.search(r"^health +live, ready$", text, re.M)
    assert re.search(r"^extensions .*binary_tensor_data", text, re.M)
    assert "request_facts 1 READY" in text and "request_facts 3 READY" in text
    assert "round trip" not in text


def test_check_shows_a_model_and_a_round_trip(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs, outputs, batch limit, and one request of zeros."""
    text = printed_by(["check", triton.endpoint, "--model", "ragged", "--shape", "values=7"], 0, capsys)
    assert re.search(r"^model +ragged:1, at most 32 elements a request$", text, re.M)
    assert re.search(r"^inputs +values FP32 \[-1\]$", text, re.M)
    assert re.search(r"^outputs +total FP32 \[1\]\n +doubled FP32 \[-1\]$", text, re.M)
    assert re.search(r"^round trip +\d+\.\d ms", text, re.M)
    assert "values FP32 [7]; received: total [1, 1], doubled [1, 7]" in text


@pytest.mark.parametrize("model_name", ["every_datatype", "unbatched", "optional_input", "shout", "ensemble"])
def test_check_sends_zeros_to_every_kind_of_model(
    triton: LocalTriton, model_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every datatype, optional inputs, and models without a batch dimension."""
    assert "No problems found." in printed_by(["check", triton.endpoint, "--model", model_name], 0, capsys)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "doubel"], r"PROBLEM: .*'doubel'.*the server has: .*double"),
        (["--model", "double", "--model-version", "9"], r"PROBLEM: .*9"),
        (["--model", "countdown"], "PROBLEM: .*decoupled"),
        (["--model", "running_sum"], "PROBLEM: .*sequences"),
        (["--model", "one_row_less"], r"PROBLEM: .* has shape \[0, 1\], but its first dimension must be 1"),
    ],
)
def test_check_reports_problems_of_a_model(
    triton: LocalTriton, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each problem is a sentence, and the exit code is 1."""
    assert re.search(problem, printed_by(["check", triton.endpoint, *arguments], 1, capsys))


@pytest.mark.parametrize(
    ("path", "answer", "code", "expected"),
    [
        ("/v2/health/ready", Answer(400), 1, "PROBLEM: The server is live but not ready"),
        ("/v2/health/live", Answer(400), 1, "PROBLEM: The server reports that it is not live"),
        ("/v2", Answer(200, b"<html>hello</html>"), 1, "Is this the HTTP port?"),
        ("/v2", Answer(401, b'{"error": "who are you?"}'), 1, "with --auth-token env:NAME"),
        ("/v2", Answer(200, b'{"name": "mlserver", "version": "1.7"}'), 0, "tensors travel as JSON"),
        ("/v2/repository/index", Answer(404, b"{}"), 0, "the server does not list its models"),
    ],
)
def test_check_explains_what_a_server_reports(
    triton: LocalTriton,
    path: str,
    answer: Answer,
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each kind of problem has its own sentence; a missing extension is no problem."""
    with FaultServer(changed(triton, path, answer)) as server:
        assert expected in printed_by(["check", server.endpoint], code, capsys)


def test_a_refusal_of_zeros_is_shown_with_what_was_sent(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's message and the shape of the zeros are in the problem."""
    refusal = Answer(400, b'{"error": "not these"}')
    with FaultServer(changed(triton, "/v2/models/double/infer", refusal)) as server:
        text = printed_by(["check", server.endpoint, "--model", "double"], 1, capsys)
    assert "did not answer a request (zeros: x FP32 [4])" in text
    assert "not these" in text


def test_tokens_and_headers_reach_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """References are resolved, sent with every request, and never printed."""
    monkeypatch.setenv("BEAM_TRITON_TEST_TOKEN", "t0ken-of-the-service")
    key = tmp_path / "key"
    key.write_text("k3y\n")
    metadata = b'{"name": "triton", "version": "1", "extensions": []}'
    with FaultServer(always(Answer(200, metadata))) as server:
        arguments = ["--auth-token", "env:BEAM_TRITON_TEST_TOKEN", "--header", f"X-Key=file:{key}"]
        text = printed_by(["check", server.endpoint, *arguments], 0, capsys)
        requests: list[Request] = list(server.requests)
    assert requests
    assert {request.header("Authorization") for request in requests} == {"Bearer t0ken-of-the-service"}
    assert {request.header("X-Key") for request in requests} == {"k3y"}
    assert "t0ken" not in text and "k3y" not in text
