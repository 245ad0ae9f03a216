"""The pipeline of file types: a real ONNX model, and packages that LocalTriton brings for it."""

from __future__ import annotations

import json
import pickle
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.score import score_command
from beam_triton.testing import LocalTriton, find_or_make_server_environment
from pipelines import file_types

_ROOT = Path(__file__).parents[2]


def _make_files(folder: Path) -> dict[str, str]:
    """Files whose names say nothing, and their types."""
    with zipfile.ZipFile(folder / "a", "w") as archive:
        archive.writestr("x.txt", "text" * 1000)
    with sqlite3.connect(folder / "b") as database:
        database.execute("create table t (x integer)")
    (folder / "c").write_bytes(pickle.dumps({"numbers": list(range(5000))}))
    with (folder / "d").open("wb") as file:
        np.save(file, np.arange(10_000))
    rows = [{"id": n, "name": f"name {n}"} for n in range(500)]
    (folder / "e").write_text(json.dumps({"rows": rows}, indent=2))
    found = {"a": "zip", "b": "sqlite", "c": "pickle", "d": "npy", "e": "json"}
    for number, (path, kind) in enumerate(
        {
            "docs/images/digits.png": "png",
            "docs/images/benchmark_echo.svg": "svg",
            "README.md": "markdown",
            "beam_triton/transforms/bundle.py": "python",
            "pipelines/data/digits.csv": "csv",
            "pipelines/dataflow/Dockerfile": "dockerfile",
            ".ci/run": "shell",
        }.items()
    ):
        (folder / f"copy-{number}").write_bytes((_ROOT / path).read_bytes())
        found[f"copy-{number}"] = kind
    return found


def test_types_of_files_are_named_by_their_content(tmp_path: Path) -> None:
    """Sizes from half a kilobyte to megabytes; only the ends of large files travel."""
    files = tmp_path / "files"
    files.mkdir()
    expected = _make_files(files)
    output = tmp_path / "types.jsonl"
    assert file_types.main(["--files", f"{files}/*", "--output", str(output), "--runner=FnApiRunner"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {Path(line["file"]).name: line["type"] for line in lines} == expected
    assert all(0.5 < line["score"] <= 1 for line in lines)


def test_score_sends_whole_files(tmp_path: Path) -> None:
    """The same model behind ``score``, which reads no more than bytes."""
    output = tmp_path / "types.jsonl"
    with LocalTriton(
        file_types.MODEL_REPOSITORY, packages=file_types.PACKAGES, stop_timeout_seconds=0.1
    ) as triton:
        code = score_command.main(
            [
                *(
                    "--files",
                    f"{_ROOT}/pipelines/data/*.csv",
                    f"{_ROOT}/docs/images/digits.png",
                    "--input_format=bytes",
                ),
                *("--endpoint", triton.endpoint, "--model=magika", "--keep=file", f"--output={output}"),
                "--progress_seconds=0",
            ]
        )
    assert code == 0
    found = {
        Path(line["file"]).name: line["type"] for line in map(json.loads, output.read_text().splitlines())
    }
    assert found.pop("digits.png") == "png" and set(found.values()) == {"csv"}


@pytest.mark.parametrize("packages", ["onnxruntime", [3]])
def test_packages_are_a_list_of_requirements(packages: object) -> None:
    """A string would be taken letter by letter."""
    with pytest.raises(ConfigurationError, match="list of requirements"):
        LocalTriton(file_types.MODEL_REPOSITORY, packages=packages)  # type: ignore[arg-type]


def test_packages_that_cannot_be_installed_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has pip's own lines."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    environment = find_or_make_server_environment()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no-such-package"):
        LocalTriton(
            file_types.MODEL_REPOSITORY,
            packages=["no-such-package==1"],
            server_environment=environment.folder,
        ).start()
    assert [path for path in (tmp_path / "beam_triton").iterdir() if path.is_dir()] == []
