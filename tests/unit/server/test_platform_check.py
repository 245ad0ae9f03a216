"""Which machines and interpreters can run the server, and the messages for the others."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from beam_triton.server.platform_check import (
    SUPPORTED_PYTHON_VERSIONS,
    PythonInterpreter,
    candidate_executables,
    examine,
    why_unsupported,
)


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def facts(implementation: str, version: str, library_folder: str | None) -> str:
    """A shell script with the output of an interpreter of that kind."""
    answer = {
        "implementation": implementation,
        "version": version,
        "executable": "/usr/bin/python3",
        "library_folder": library_folder,
    }
    return f"echo {shlex.quote(json.dumps(answer))}"


@pytest.mark.parametrize("libc", ["glibc 2.35", "glibc 2.36", "glibc 2.100", "glibc 3.0"])
def test_linux_with_a_new_glibc_is_supported(libc: str) -> None:
    """Linux on x86-64 with glibc 2.35 or newer can run the server."""
    assert why_unsupported("Linux", "x86_64", libc) is None


@pytest.mark.parametrize(
    ("system", "machine", "libc", "reason"),
    [
        ("Darwin", "arm64", None, "runs on Linux only, and this is Darwin"),
        ("Windows", "AMD64", None, "runs on Linux only, and this is Windows"),
        ("Linux", "aarch64", "glibc 2.39", "runs on x86-64 only, and this is aarch64"),
        ("Linux", "x86_64", "glibc 2.31", "needs glibc 2.35 or newer, and this system has 2.31"),
        ("Linux", "x86_64", None, "needs glibc, and this system has another C library"),
    ],
)
def test_other_machines_are_refused_with_the_reason(
    system: str, machine: str, libc: str | None, reason: str
) -> None:
    """The message is one sentence: the reason, and what to use instead."""
    sentence = why_unsupported(system, machine, libc)
    assert sentence is not None
    assert reason in sentence
    assert "FakeTriton" in sentence
    assert "\n" not in sentence


def test_this_interpreter_is_accepted_or_refused_for_a_reason() -> None:
    """The interpreter that runs the tests is accepted, or refused for its version or library only."""
    answer = examine(Path(sys.executable))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if isinstance(answer, PythonInterpreter):
        assert answer.version == version
        assert answer.version in SUPPORTED_PYTHON_VERSIONS
        assert (answer.library_folder / f"libpython{version}.so.1.0").exists()
    else:
        assert version not in SUPPORTED_PYTHON_VERSIONS or "libpython" in answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("echo 'pyenv: python3.12: command not found' >&2; exit 127", "does not run"),
        ("echo hello", "does not run"),
        ("echo \"ModuleNotFoundError: No module named 'ensurepip'\" >&2; exit 1", "install python3-venv"),
        (facts("PyPy", "3.11", "/usr/lib"), "is PyPy"),
        (facts("CPython", "3.14", "/usr/lib"), "is Python 3.14"),
        (facts("CPython", "3.12", None), "has no shared libpython3.12.so.1.0"),
    ],
)
def test_unsuitable_interpreters_are_refused(tmp_path: Path, text: str, answer: str) -> None:
    """A shim without a version, another implementation, no shared library: each refusal says why."""
    refusal = examine(script(tmp_path / "python3.12", text))
    assert isinstance(refusal, str)
    assert answer in refusal


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A file that cannot be executed is refused; nothing is raised."""
    assert "does not run" in str(examine(tmp_path / "nothing"))


def test_every_folder_of_path_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shim early on PATH does not hide a later interpreter, and pyenv's own folders are searched."""
    for folder in ("shims", "bin"):
        (tmp_path / folder).mkdir()
        script(tmp_path / folder / "python3.11", "exit 1")
    installed = tmp_path / "pyenv" / "versions" / "3.10.13" / "bin"
    installed.mkdir(parents=True)
    script(installed / "python3.10", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:{tmp_path / 'bin'}:{tmp_path / 'nowhere'}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert list(candidate_executables()) == [
        Path(sys.executable),
        tmp_path / "shims" / "python3.11",
        tmp_path / "bin" / "python3.11",
        installed / "python3.10",
    ]
