"""Lock files of a real Triton: what it reports of every kind of model is what its lock says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from beam_triton import ModelMismatchError, ModelSpec, TritonClient, TritonInference, TritonInferenceDoFn
from beam_triton.cli.main import main
from beam_triton.testing import LocalTriton
from tests.support.pipelines import score


@pytest.mark.parametrize("name", ["every_datatype", "optional_input", "unbatched", "ensemble", "running_sum"])
def test_every_kind_of_model_has_a_lock(
    name: str, triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the served model but for versions, which are pinned by option."""
    path = tmp_path / "lock.json"
    assert main(["lock", triton.endpoint, name, "--output", str(path)]) == 0
    with TritonClient(triton.endpoint) as client:
        assert ModelSpec.load(path) == replace(client.model_spec(name), version="", versions=())
    assert main(["lock", triton.endpoint, name, "--check", str(path)]) == 0
    assert "is the one that" in capsys.readouterr().out


def test_a_pipeline_is_scored_by_its_lock(triton: LocalTriton, tmp_path: Path) -> None:
    """With the lock of the model itself; with that of another contract the workers refuse it."""
    path = tmp_path / "double.lock.json"
    assert main(["lock", triton.endpoint, "double", "--output", str(path)]) == 0
    rows = [np.full(4, number, np.float32) for number in range(50)]
    run = score(rows, TritonInference(triton.endpoint, "double", model_spec=path))
    assert sorted(result.inference["y"][0] for result in run.results) == [2 * n for n in range(50)]
    spec = ModelSpec.load(path)
    replace(spec, inputs=(replace(spec.inputs[0], shape=(5,)),)).save(path)
    with pytest.raises(ModelMismatchError, match=r"input 'x' has shape \[4\], not \[5\]"):
        TritonInferenceDoFn(triton.endpoint, "double", model_spec=path).setup()
