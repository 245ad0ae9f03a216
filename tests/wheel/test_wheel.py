"""The wheel in an environment that has nothing else, as `make test-wheel` makes it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-wheel" / "bin" / "python"

# What the README's lines take as given: a server, and images.
BEFORE = """
import numpy as np
from beam_triton.testing import FakeModel, FakeTriton

images = list(np.zeros((10, 64), np.float32))
model = FakeModel(
    lambda inputs: {"label": np.zeros((len(inputs["image"]), 1), np.int64)},
    inputs={"image": ("FP32", [64])},
    outputs={"label": ("INT64", [1])},
)
with FakeTriton({"digits": model}) as server:
"""
AFTER = """
    rows = sum(request.batch_size for request in server.requests)
    print(rows, "images scored")
"""


def run(*arguments: str, folder: Path) -> str:
    ran = subprocess.run([str(PYTHON), *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def lines_of_the_readme() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (each for each in blocks if "with beam.Pipeline() as p:" in each)
    return str(block)


def test_the_readmes_lines_run(tmp_path: Path) -> None:
    """As they are but for the server's address."""
    lines = lines_of_the_readme()
    assert lines.count('"http://triton:8000"') == 1
    lines = lines.replace('"http://triton:8000"', "server.endpoint")
    script = tmp_path / "five_lines.py"
    script.write_text(BEFORE + "".join(f"    {line}\n" for line in lines.splitlines()) + AFTER)
    assert run(str(script), folder=tmp_path).endswith("10 images scored\n")


def test_requirements_are_met(tmp_path: Path) -> None:
    assert "No broken requirements found" in run("-m", "pip", "check", folder=tmp_path)


def test_the_installed_package_is_the_wheels(tmp_path: Path) -> None:
    """And not this checkout's."""
    found = run("-c", "import beam_triton; print(beam_triton.__file__)", folder=tmp_path)
    assert Path(found.strip()).is_relative_to(PYTHON.parents[1])


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    assert (
        run("-m", "beam_triton", "--version", folder=tmp_path) == f"beam-triton {wheel.name.split('-')[1]}\n"
    )


@pytest.mark.parametrize("command", ["check", "tune", "lock", "score", "replay"])
def test_commands_explain_themselves(tmp_path: Path, command: str) -> None:
    """Without an extra."""
    assert "usage" in run("-m", "beam_triton", command, "--help", folder=tmp_path)
