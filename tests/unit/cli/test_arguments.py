"""Arguments that all commands share: wrong use is exit code 2 and a sentence."""

from __future__ import annotations

import argparse
import json

import pytest

from beam_triton.cli.arguments import add_model, add_server, given_options_of
from beam_triton.cli.main import main
from tests.support import faults
from tests.support.answers import Answer, always
from tests.support.fault_server import FaultServer, Script

ENDPOINT = "http://127.0.0.1:9"
TOKEN = "t0ken-of-the-service"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "triton:8000"], "did you mean http://triton:8000"),
        (["check", ENDPOINT, "--auth-token", TOKEN], "env:NAME or file:PATH"),
        (["check", ENDPOINT, "--auth-token", "env:NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE is not set"),
        (["check", ENDPOINT, "--header", TOKEN], "NAME=VALUE"),
        (["check", ENDPOINT, "--header", f"Content-Type={TOKEN}"], "Content-Type"),
        (["check", ENDPOINT, "--shape", "x"], "INPUT=3,224,224"),
        (["check", ENDPOINT, "--shape", "x=a,b"], "INPUT=3,224,224"),
        (["check", ENDPOINT, "--shape", "x=-1"], "INPUT=3,224,224"),
        (["check", ENDPOINT, "--timeout-seconds", "0"], "timeout_seconds"),
        (["check", ENDPOINT, "--model", "m", "--model-version", "the latest"], "model_version"),
        (["tune", ENDPOINT, "--model", "m", "--seconds", "0"], "--seconds"),
        (["tune", ENDPOINT, "--model", "m", "--max-in-flight", "-1"], "--max-in-flight"),
        (["tune", ENDPOINT, "--model", "m", "--rate", "0"], "--rate"),
        (["tune", ENDPOINT, "--model", "m", "--rate", "inf"], "--rate must be a number above 0"),
        (["tune", ENDPOINT, "--model", "m", "--chart", "/nowhere/a.svg"], "there is no folder /nowhere"),
        (["replay", "--output", "o.jsonl", "failures.jsonl"], "failures are needed, before the options"),
        (
            ["tune", ENDPOINT, "--model", "m", "--p99", "50"],
            "with its unit, such as 50ms or 1.5s",
        ),
        (["tune", ENDPOINT, "--model", "m", "--p99", "0ms"], "give a time with its unit"),
        (["tune", ENDPOINT, "--model", "m", "--chart", "out.html"], "the name must end in .svg"),
        (["tune", ENDPOINT, "--model", "m", "--metrics-url", f"{ENDPOINT}/metrics"], "--metrics-url"),
        (
            ["tune", ENDPOINT, "--model", "m", "--metrics-url", f"http://me:{TOKEN}@127.0.0.1:8002/metrics"],
            "--metrics-url http://***@127.0.0.1:8002/metrics: ",
        ),
        (["check", ENDPOINT, "--idle-seconds", "-1"], "--idle-seconds"),
    ],
)
def test_wrong_arguments_are_explained_without_repeating_secrets(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard error names the mistake, exit code 2, and nothing that may be a secret is printed."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert TOKEN not in said.err + said.out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((), "no metrics of a Triton"),
        (faults.garbage_status_line, "no HTTP server answers there"),
    ],
)
def test_another_port_has_no_metrics(fault: Script, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured: Triton has two others."""
    with FaultServer(always(Answer(200, b'{"name": "triton"}')), fault) as server:
        url = f"{server.endpoint}/metrics"
        assert main(["tune", ENDPOINT, "--model", "m", "--metrics-url", url]) == 2
    assert message in capsys.readouterr().err


def test_secrets_given_as_text_are_not_printed() -> None:
    """A pipeline is printed with them, and copied from there."""
    parser = argparse.ArgumentParser()
    add_server(parser)
    add_model(parser, required=False)
    given = ["--header", f"X-Api-Key={TOKEN}", "--header", "X-Other=env:OTHER"]
    proxies = {"https": f"http://me:{TOKEN}@proxy:3128", "http": "http://proxy:3128"}
    given += ["--option", f"proxies={json.dumps(proxies)}"]
    options = given_options_of(parser.parse_args([ENDPOINT, *given]))
    assert options == {
        "headers": {"X-Api-Key": "env:X_API_KEY", "X-Other": "env:OTHER"},
        "proxies": {"https": "env:HTTPS_PROXY", "http": "http://proxy:3128"},
    }


@pytest.mark.parametrize("arguments", [[], ["check"], ["tune", ENDPOINT], ["sing", ENDPOINT]])
def test_missing_arguments_exit_with_2_and_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse says what is missing, with the same exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m beam_triton" in capsys.readouterr().err


def test_an_unreachable_server_is_named_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands name the address, ask the two questions that help, and exit with 1."""
    with faults.refusing_port() as port:
        for command in (["check"], ["tune", "--model", "m"]):
            assert main([command[0], f"http://127.0.0.1:{port}", *command[1:]]) == 1
            said = capsys.readouterr()
            assert f"cannot connect to http://127.0.0.1:{port}" in said.out + said.err
            assert "Is the server running, and is this its HTTP port" in said.out + said.err
