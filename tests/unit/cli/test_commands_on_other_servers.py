"""``check``, ``tune`` and ``score`` on servers that are not Triton: one way of opening a model, with all
options."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from beam_triton.cli.arguments import add_options, add_server, options_of
from beam_triton.cli.main import main
from beam_triton.score import score_command
from tests.support.fault_server import FaultServer
from tests.support.scripted_servers import ScriptedServer, tensor


def printed(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    found = main(arguments)
    said = capsys.readouterr()
    assert found == code, said
    return said.out + said.err


def test_check_says_what_it_found_and_the_option_that_changes_it(capsys: pytest.CaptureFixture[str]) -> None:
    """What the first dimension means, how tensors travel, and which outputs come only when asked for."""
    outputs = [tensor("predict", "FP32", [-1, 1]), tensor("predict_proba", "FP32", [-1, 2])]
    server = ScriptedServer(outputs=outputs, names={"models": ["m"]}, only_when_asked=["predict_proba"])
    with FaultServer(server) as listening:
        text = printed(["check", listening.endpoint, "--model", "m"], 0, capsys)
    assert "JSON (binary=True sends them in binary)" in text
    assert "is taken for the batch" in text and "batching.max_batch_size sets another" in text
    assert "predict_proba: not given unless outputs=[…] asks for them" in text
    assert "at most 32 elements a request" in text


def test_check_works_where_the_server_does_not_describe_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """ModelMesh answers 404 to GET /v2."""
    with FaultServer(ScriptedServer(server_metadata=None)) as listening:
        text = printed(["check", listening.endpoint, "--model", "m"], 0, capsys)
    assert "does not describe itself" in text and "No problems found." in text


def test_what_a_server_calls_itself_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Its name, models, extensions and tensors stand on their lines, without escapes."""
    escape = "\x1b]0;title\x07\n"
    server = ScriptedServer(
        inputs=[tensor(f"x{escape}", "FP32", [-1, 4])],
        server_metadata={"name": f"it{escape}", "version": escape, "extensions": [escape]},
        index=[{"name": "m", "state": "READY", "reason": escape}],
    )
    with FaultServer(server) as listening:
        text = printed(["check", listening.endpoint, "--model", "m"], 0, capsys)
        text += printed(["tune", listening.endpoint, "--model", "m", "--seconds", "0.2"], 0, capsys)
    assert "\x1b" not in text and "\x07" not in text
    assert "\nmodels      m READY: ]0;title\n" in text


@pytest.mark.parametrize("kind", ["json", "jsonl", "npz"])
def test_check_and_tune_send_the_elements_of_a_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the server names no inputs, or zeros will not do."""
    path = tmp_path / f"element.{kind}"
    if kind == "npz":
        np.savez(path, x=np.array([1, 2, 3, 4], "f4"))
    else:
        path.write_text(json.dumps({"x": [1.0, 2.0, 3.0, 4.0]}))
    server = ScriptedServer(inputs=[], outputs=[])
    with FaultServer(server) as listening:
        arguments = [listening.endpoint, "--model", "m", "--inputs", str(path), "--max-batch-size", "4"]
        assert f"1 element of {path}" in printed(["check", *arguments], 0, capsys)
        text = printed(["tune", *arguments, "--seconds", "0.5", "--max-in-flight", "2"], 0, capsys)
        assert "Recommended" in text and '"max_batch_size": ' in text
        assert "--inputs FILE" in printed(["check", listening.endpoint, "--model", "m"], 2, capsys)
    assert all(document["inputs"][0]["data"][:4] == [1, 2, 3, 4] for document in server.requests)
    assert max(server.batch_sizes) == 4


def test_commands_take_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON; a credential is not one of them."""
    server = ScriptedServer()
    options = ["--option", 'input_parameters={"x": {"content_type": "np"}}', "--outputs", "predict"]
    with FaultServer(server) as listening:
        printed(["check", listening.endpoint, "--model", "m", *options], 0, capsys)
    assert server.requests[0]["inputs"][0]["parameters"] == {"content_type": "np"}
    assert server.requests[0]["outputs"] == [{"name": "predict"}]
    text = printed(["check", "http://127.0.0.1:9", "--option", "auth_token=t0ken"], 2, capsys)
    assert "--option takes" in text and "t0ken" not in text


def test_commands_sign_their_requests(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auth`` is an object in Python, and has a name on a command line."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with FaultServer(ScriptedServer()) as listening:
        arguments = ["check", listening.endpoint, "--model", "m", "--option"]
        printed([*arguments, "auth=aws:eu-west-1"], 0, capsys)
        for request in listening.requests:
            assert "AKIDEXAMPLE" in request.header("Authorization")
            assert "/eu-west-1/sagemaker/" in request.header("Authorization")
        assert "aws:REGION" in printed([*arguments, "auth=azure"], 2, capsys)


def test_option_adds_to_what_an_argument_says() -> None:
    """``--ca-bundle`` and further options of ``tls``."""
    parser = argparse.ArgumentParser()
    add_server(parser)
    add_options(parser)
    given = parser.parse_args(
        [
            "https://10.0.0.7",
            "--ca-bundle",
            "ca.pem",
            "--option",
            'tls={"server_hostname": "triton.internal"}',
        ]
    )
    assert options_of(given)["tls"] == {"ca_bundle": "ca.pem", "server_hostname": "triton.internal"}


@pytest.mark.parametrize("batch_size", [None, 2])
def test_score_makes_the_rows_that_workers_take(batch_size: int | None, tmp_path: Path) -> None:
    """With a batch size and without, on a server that does not report one."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"x": [n, 1.0, 2.0, 3.0]}) + "\n" for n in range(4)))
    output, server = tmp_path / "out.jsonl", ScriptedServer()
    with FaultServer(server) as listening:
        arguments = ["--endpoint", listening.endpoint, "--model", "m", "--files", str(rows)]
        arguments += ["--output", str(output), "--option", 'input_parameters={"x": {"content_type": "np"}}']
        arguments += [] if batch_size is None else ["--batch_size", str(batch_size)]
        assert score_command.main([*arguments, "--progress_seconds=0"]) == 0
    assert sorted(json.loads(line)["predict"] for line in output.read_text().splitlines()) == [6, 7, 8, 9]
    assert server.batch_sizes == ([4] if batch_size is None else [2, 2])
    assert server.requests[0]["inputs"][0]["parameters"] == {"content_type": "np"}
