"""The notebooks run from a clone, and what is stored in them is what they give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    document = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def kinds_of_output(cell: dict[str, Any]) -> list[str]:
    """Texts and pictures, without the scripts that Beam adds to a page."""
    kinds = []
    for output in cell["outputs"]:
        assert output["output_type"] != "error", "".join(output["traceback"])
        if output["output_type"] == "stream":
            kinds.append(output["name"])
        elif "application/javascript" not in output["data"]:
            kinds += [kind for kind in output["data"] if kind != "text/plain"]
    return kinds


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_runs_and_is_stored_as_it_runs(notebook: Path, tmp_path: Path) -> None:
    """``jupyter execute``, and each cell gives texts and pictures as those that are stored."""
    # The notebook looks for the repository's models from where it lies.
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    copy = folder / notebook.name
    copy.write_bytes(notebook.read_bytes())
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", str(copy)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    stored, run = code_cells(notebook), code_cells(copy)
    assert [kinds_of_output(cell) for cell in run] == [kinds_of_output(cell) for cell in stored]
    assert sum("image/png" in kinds_of_output(cell) for cell in run) >= 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_stored_notebook_was_run_once_in_order(notebook: Path) -> None:
    """A reader of the stored notebook sees what a run from top to bottom gives, and no path of a machine."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    text = notebook.read_text(encoding="utf-8")
    assert "/tmp/" not in text and "/root/" not in text and "/home/" not in text
