"""The pipelines that ``tune`` prints; `tests/integration/test_tune.py` runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from beam_triton import ModelSpec, TensorSpec
from beam_triton.cli.pipeline_code import PipelineCode, example_of
from beam_triton.cli.sample import Sample, read_sample

SMALL = TensorSpec("x", "FP32", (2, -1))
LARGE = TensorSpec("image", "UINT8", (3, 224, 224))
TEXT = TensorSpec("text", "BYTES", (1,))


def code(example: dict[str, Any], **options: Any) -> PipelineCode:
    return PipelineCode("http://triton:8000", "m", options, example)


def test_options_stand_in_both_as_they_were_given() -> None:
    """Secrets are references, and ``auth`` is the text that the commands take."""
    options = {
        "auth": "aws:eu-west-1",
        "headers": {"X-Key": "env:KEY"},
        "outputs": ("y", "z"),
        "batching": {"max_batch_size": 8},
        "trust_env": False,
    }
    made = code({"x": [0.0]}, **options)
    text = made.python()
    compile(text, "printed", "exec")
    assert "from beam_triton.auth import auth_from_text" in text
    assert 'auth=auth_from_text("aws:eu-west-1"),' in text
    assert 'headers={"X-Key": "env:KEY"},' in text
    assert 'outputs=["y", "z"],' in text and "trust_env=False," in text
    create, infer, _ = yaml.safe_load(made.yaml())["pipeline"]["transforms"]
    assert create["config"] == {"elements": [{"x": [0.0]}]}
    expected = {"endpoint": "http://triton:8000", "model_name": "m", **options, "outputs": ["y", "z"]}
    assert infer["config"] == expected


def test_large_tensors_are_made_rather_than_written() -> None:
    """By NumPy in both; small ones beside them as well."""
    example = example_of(Sample({}), ModelSpec("m", "1", (LARGE, TEXT), (), 8))
    made = code(example)
    assert 'np.zeros([3, 224, 224], "uint8")' in made.python()
    compile(made.python(), "printed", "exec")
    fields = yaml.safe_load(made.yaml())["pipeline"]["transforms"][1]["config"]["fields"]
    for name, shape in (("image", (3, 224, 224)), ("text", (1,))):
        names: dict[str, Any] = {}
        exec(fields[name]["callable"], names)
        assert np.shape(names["value"](None)) == shape


def test_small_zeros_are_written_with_the_shapes_given() -> None:
    """Those of the command."""
    spec = ModelSpec("m", "1", (SMALL, TEXT), (), 8)
    assert example_of(Sample({"x": (2, 3)}), spec) == {"x": [[0.0] * 3] * 2, "text": [""]}


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        ({"x": [[1.5], [2.5]]}, {"x": [[1.5], [2.5]]}),
        ({"x": [[1.5], [2.5]], "id": 7}, {"x": [[1.5], [2.5]]}),
        ({"text": "ant", "x": [[0.0], [1.0]]}, {"text": "ant", "x": [[0.0], [1.0]]}),
    ],
)
def test_the_first_element_of_a_file_is_written(
    element: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    """The columns that feed an input of the model."""
    path = tmp_path / "elements.jsonl"
    path.write_text(json.dumps(element) + "\n")
    assert example_of(read_sample(str(path), {}), ModelSpec("m", "1", (SMALL, TEXT), (), 8)) == expected


def test_bytes_and_large_elements_of_a_file_become_zeros(tmp_path: Path) -> None:
    """A picture would fill the screen."""
    picture, pixels = tmp_path / "ant.jpg", tmp_path / "pixels.npy"
    picture.write_bytes(bytes(range(256)))
    np.save(pixels, np.ones((3, 224, 224), np.uint8))
    assert example_of(read_sample(str(picture), {}), ModelSpec("m", "1", (TEXT,), (), 8)) == {"text": ""}
    made = code(example_of(read_sample(str(pixels), {}), ModelSpec("m", "1", (LARGE,), (), 8)))
    assert 'np.zeros([3, 224, 224], "uint8")' in made.python()


def test_numbers_that_neither_language_writes_become_zeros(tmp_path: Path) -> None:
    """``nan`` would be an unknown name in the printed pipeline."""
    path = tmp_path / "elements.jsonl"
    path.write_text('{"x": [[NaN], [-Infinity]], "text": "NaN"}\n')
    spec = ModelSpec("m", "1", (SMALL, TEXT), (), 8)
    assert example_of(read_sample(str(path), {}), spec) == {"x": [[0.0], [0.0]], "text": "NaN"}


def test_inputs_that_the_server_does_not_name_are_those_of_the_file(tmp_path: Path) -> None:
    """With the file's own datatypes."""
    path = tmp_path / "element.npz"
    np.savez(path, long=np.ones(100, np.int16), short=np.array([1, 2], np.int16))
    made = code(example_of(read_sample(str(path), {}), ModelSpec("m")))
    assert '"long": np.zeros([100], "int16"), "short": [1, 2]' in made.python()
