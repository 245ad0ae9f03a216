"""Arguments that all commands share: wrong use is exit code 2 and a sentence, and zeros fit any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from beam_triton import ConfigurationError, ModelSpec, TensorSpec
from beam_triton.cli.arguments import describe_zeros, zeros_request
from beam_triton.cli.main import main
from beam_triton.options import InferenceOptions
from beam_triton.protocol import DATATYPES
from beam_triton.remote_model import RemoteModel
from tests.support import faults

ENDPOINT = "http://127.0.0.1:9"
TOKEN = "t0ken-of-the-service"

IMAGE = TensorSpec("image", "FP32", (3, -1, -1))
NAME = TensorSpec("name", "BYTES", (1,))
SCALE = TensorSpec("scale", "INT8", (2,), optional=True)
SPEC = ModelSpec("m", "1", (IMAGE, NAME, SCALE), (), 8)


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


@contextmanager
def remote(spec: ModelSpec) -> Iterator[RemoteModel]:
    model = RemoteModel(spec, InferenceOptions(endpoint="http://127.0.0.1:9"))
    try:
        yield model
    finally:
        model.close()


def tensor_bytes(spec: ModelSpec, shapes: dict[str, tuple[int, ...]], rows: int) -> bytes:
    with remote(spec) as model:
        request = zeros_request(model, shapes, rows)
    body = b"".join(map(bytes, request.parts))
    return body[request.json_length :]


def test_open_sizes_are_one_in_zeros() -> None:
    """Optional inputs are left out, strings are empty: 4 bytes of length each."""
    assert tensor_bytes(SPEC, {}, 2) == bytes(2 * (3 * 4 + 4))
    assert describe_zeros(SPEC, {}) == "image FP32 [3, 1, 1], name BYTES [1]"


def test_given_shapes_are_used_in_zeros() -> None:
    """A given shape replaces the open sizes, and an optional input that has one is sent."""
    shapes = {"image": (3, 4, 5), "scale": (2,)}
    assert len(tensor_bytes(SPEC, shapes, 1)) == 3 * 4 * 5 * 4 + 4 + 2
    assert describe_zeros(SPEC, shapes) == "image FP32 [3, 4, 5], name BYTES [1], scale INT8 [2]"


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_has_a_zero(datatype: str) -> None:
    """Numbers are zero bytes, and BYTES are strings of length 0."""
    spec = ModelSpec("m", "1", (TensorSpec("x", datatype, (3,)),), (), 8)
    size = DATATYPES[datatype].item_bytes or 4
    assert tensor_bytes(spec, {}, 2) == bytes(2 * 3 * size)


def test_zeros_for_a_model_without_a_batch_dimension() -> None:
    """The shape is the tensor's own."""
    spec = ModelSpec("m", "1", (TensorSpec("x", "FP32", (-1, 4)),))
    assert len(tensor_bytes(spec, {"x": (5, 4)}, 1)) == np.zeros((5, 4), np.float32).nbytes


@pytest.mark.parametrize(
    ("spec", "shapes", "message"),
    [
        (SPEC, {"image": (3, 4)}, "does not fit image FP32"),
        (SPEC, {"image": (4, 4, 4)}, "does not fit image FP32"),
        (SPEC, {"picture": (3, 4, 4)}, "no input .'picture'.*image FP32"),
        (ModelSpec("m"), {}, "does not name the inputs"),
    ],
)
def test_shapes_that_do_not_fit_the_model_are_refused(
    spec: ModelSpec, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    """The error says what the model takes."""
    with remote(spec) as model, pytest.raises(ConfigurationError, match=message):
        zeros_request(model, shapes, 1)
