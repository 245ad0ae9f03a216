"""The server's own environment: how it is found, made and refused."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.server.environment import SERVER_ENVIRONMENT_VARIABLE
from beam_triton.testing import find_or_make_server_environment

_ROOT = Path(__file__).parents[2]


def test_an_existing_environment_is_reused() -> None:
    """The environment that was made once is used again, and has the server and its stub."""
    environment = find_or_make_server_environment()
    assert os.access(environment.tritonserver, os.X_OK)
    assert os.access(environment.python_backend_stub, os.X_OK)
    started = time.monotonic()
    assert find_or_make_server_environment() == environment
    assert find_or_make_server_environment(environment.folder) == environment
    assert time.monotonic() - started < 5


def test_a_folder_with_other_content_is_refused_and_unchanged(tmp_path: Path) -> None:
    """A folder given by name is refused if it is not a server environment, and left as it is."""
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigurationError, match="is not a server environment"):
        find_or_make_server_environment(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_environment_without_the_server_is_refused() -> None:
    """An environment without the wheel, such as the one of these tests, is refused."""
    with pytest.raises(ConfigurationError, match="is not a server environment"):
        find_or_make_server_environment(sys.prefix)


def test_the_environment_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BEAM_TRITON_SERVER_ENVIRONMENT replaces the argument."""
    (tmp_path / "mine.txt").write_text("precious")
    monkeypatch.setenv(SERVER_ENVIRONMENT_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        find_or_make_server_environment()


def test_a_failed_installation_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pip finds no packages, the error shows its output, and no partial folder stays."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    folder = tmp_path / "environment"
    with pytest.raises(ConfigurationError, match="nvidia-pytriton") as caught:
        find_or_make_server_environment(folder)
    assert "a Triton server that runs elsewhere" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["environment.lock"]


_MAKE = """
import sys
from beam_triton.testing import find_or_make_server_environment
find_or_make_server_environment(sys.argv[1])
"""


def test_only_one_process_makes_the_environment(tmp_path: Path) -> None:
    """A second process logs that it waits for the first, and removes what a killed process left."""
    folder = tmp_path / "environment"
    (tmp_path / "environment.partial-killed").mkdir()
    lock = tmp_path / "environment.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [sys.executable, "-c", _MAKE, str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        )
        assert waiting.stderr is not None
        # Beam has warnings of its own at import.
        assert any("Waiting for another process" in line for line in waiting.stderr)
        assert not folder.exists() and (tmp_path / "environment.partial-killed").exists()
    _, errors = waiting.communicate(timeout=120)
    assert "ConfigurationError" in errors
    assert [file.name for file in tmp_path.iterdir()] == ["environment.lock"]


def test_serving_from_the_command_line(tmp_path: Path) -> None:
    """``python -m beam_triton.testing.serve`` serves a folder until SIGTERM."""
    served = subprocess.Popen(
        [sys.executable, "-m", "beam_triton.testing.serve", str(_ROOT / "pipelines" / "model_repository")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    with served:
        assert served.stdout is not None
        assert "at http://127.0.0.1:" in served.stdout.readline()
        served.terminate()
        assert served.wait(30) == 0


def test_the_command_line_refuses_a_missing_folder(tmp_path: Path) -> None:
    """A path that is no folder gives one sentence and exit code 2."""
    ran = subprocess.run(
        [sys.executable, "-m", "beam_triton.testing.serve", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        cwd=_ROOT,
    )
    assert ran.returncode == 2
    assert "is not a folder" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
