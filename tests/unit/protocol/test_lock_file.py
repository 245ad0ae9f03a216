"""Lock files: written for people, read again without a server, and refused where they have been edited."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from beam_triton import ConfigurationError, ModelSpec, TensorSpec
from beam_triton.options import InferenceOptions

SPEC = ModelSpec(
    "größe",
    "3",
    (TensorSpec("image", "FP32", (3, -1)), TensorSpec("scale", "FP32", (), optional=True)),
    (TensorSpec("label", "BYTES", (1,)), TensorSpec("boxes", "FP32", (100, 6))),
    16,
    platform="python",
    whole_outputs=("boxes",),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    SPEC.save(tmp_path / "m.lock.json")
    return tmp_path / "m.lock.json"


@pytest.mark.parametrize(
    "spec", [SPEC, ModelSpec("m"), replace(SPEC, decoupled=True, sequence_batching=True, version="")]
)
def test_what_is_saved_is_loaded(spec: ModelSpec, tmp_path: Path) -> None:
    """All but the versions that happen to be there; the file's name comes with it."""
    path = tmp_path / "m.lock.json"
    replace(spec, versions=("1", "2", "3")).save(path)
    loaded = ModelSpec.load(path)
    assert (loaded, loaded.lock_file) == (spec, str(path))


def test_the_file_is_readable_and_stable(path: Path) -> None:
    """A line a tensor, names as they are, and the same bytes each time."""
    text = path.read_text("utf-8")
    assert '\n    {"name": "image", "datatype": "FP32", "shape": [3, -1]},\n' in text
    assert '"name": "größe"' in text and text.endswith("}\n")
    ModelSpec.load(path).save(path)
    assert path.read_text("utf-8") == text


def test_the_hash_is_that_of_the_contract(tmp_path: Path) -> None:
    """Not of version and platform, nor of the tensors' order."""

    def hash_of(spec: ModelSpec) -> str:
        spec.save(tmp_path / "lock.json")
        found: str = json.loads((tmp_path / "lock.json").read_text("utf-8"))["contract_sha256"]
        return found

    same = replace(SPEC, version="4", platform="onnx", inputs=SPEC.inputs[::-1], outputs=SPEC.outputs[::-1])
    assert hash_of(same) == hash_of(SPEC)
    for changed in (
        replace(SPEC, name="other"),
        replace(SPEC, max_batch_size=8),
        replace(SPEC, inputs=SPEC.inputs[:1]),
        replace(SPEC, inputs=SPEC.outputs, outputs=SPEC.inputs),
        replace(SPEC, whole_outputs=()),
    ):
        assert hash_of(changed) != hash_of(SPEC)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("FP32", "FP16", "has been edited: its contract_sha256 is not that of its contents"),
        ('"max_batch_size": 16', '"max_batch_size": 17', "has been edited"),
        ('"inputs": [', '"inputs": 5, "was": [', "has been edited"),
        ("{\n", "<<<<<<< HEAD\n{\n", "is not JSON"),
        ('"contract_sha256"', '"sha"', "is JSON without contract_sha256"),
    ],
)
def test_a_file_that_was_edited_is_refused(path: Path, before: str, after: str, message: str) -> None:
    """The error names the file, what is wrong with it, and what writes one."""
    path.write_text(path.read_text("utf-8").replace(before, after, 1), "utf-8")
    with pytest.raises(ConfigurationError) as caught:
        InferenceOptions.from_options({"endpoint": "http://t:8000", "model_spec": path})
    assert f"lock file {str(path)!r} {message}" in str(caught.value)
    assert "python -m beam_triton lock ENDPOINT MODEL" in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Missing ones, folders, and bytes that are no text."""
    with pytest.raises(ConfigurationError, match=r"no lock file '.*missing\.json': .*beam_triton lock"):
        ModelSpec.load(tmp_path / "missing.json")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        ModelSpec.load(str(tmp_path))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"lock file '.*bytes' 'utf-8' codec"):
        ModelSpec.load(tmp_path / "bytes")


@pytest.mark.parametrize("kind", [str, Path])
def test_options_take_the_path_and_travel_without_the_file(path: Path, kind: type) -> None:
    """It is read when they are constructed; workers get the contents."""
    options = InferenceOptions.from_options({"endpoint": "http://t:8000", "model_spec": kind(path)})
    path.unlink()
    assert pickle.loads(pickle.dumps(options)).model_spec == SPEC
    assert options.spec_of("größe") is options.model_spec
    with pytest.raises(ConfigurationError, match=r"m\.lock\.json' is that of model 'größe', not 'm'"):
        options.spec_of("m")
