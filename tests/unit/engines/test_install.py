"""The installer repeats what fails, reports its progress, and leaves complete parts or none."""

from __future__ import annotations

import ast
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import install
from engines.install import Command, InstallError, NotInstalledError, Part, Patience
from engines.processes import Scope
from tests.support.sockets import settles

QUICK = Patience(attempts=3, attempt_limit_seconds=20.0, pause_seconds=0.01)

# Counts its runs in a file and fails until the last one.
FAILS_UNTIL = """
import pathlib, sys
runs = pathlib.Path(sys.argv[1])
count = len(runs.read_text()) + 1 if runs.exists() else 1
runs.write_text("x" * count)
print(f"connection reset in run {count}")
sys.exit(count < int(sys.argv[2]))
"""


def python(script: str, *arguments: str | Path) -> Command:
    return Command([sys.executable, "-c", script, *arguments])


def part(script: str, *arguments: str | Path) -> Part:
    """A part that a Python script fills; its first argument is the folder."""

    def commands(target: Path) -> Iterator[Command]:
        yield python(script, target, *arguments)

    return Part("a part", "part-1.0", commands)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of ``.engines``."""
    folder = tmp_path / "engines"
    monkeypatch.setattr(install, "ENGINES", folder)
    return folder


def test_failed_attempts_are_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A download that fails twice succeeds in the third attempt, and each failure is printed."""
    runs = tmp_path / "runs"
    install.run_with_retries(python(FAILS_UNTIL, runs, "3"), tmp_path, QUICK)
    assert runs.read_text() == "xxx"
    printed = capsys.readouterr().out
    assert "attempt 1 of 3 failed" in printed and "attempt 2 of 3 failed" in printed
    assert "connection reset in run 2" in printed


def test_the_last_failure_is_an_error_with_the_tools_output(tmp_path: Path) -> None:
    """After three failed attempts the error holds command, exit code and last lines."""
    runs = tmp_path / "runs"
    with pytest.raises(InstallError, match=r"exit code 1\nconnection reset in run 3$"):
        install.run_with_retries(python(FAILS_UNTIL, runs, "9"), tmp_path, QUICK)
    assert runs.read_text() == "xxx"


def test_an_attempt_has_a_time_limit(tmp_path: Path) -> None:
    """A command that hangs is ended with its children, and its next attempt starts."""
    hangs = 'printf x >>"$1"; echo waiting for the server; sleep 600; echo done'
    runs = tmp_path / "runs"
    patience = Patience(attempts=2, attempt_limit_seconds=0.5, pause_seconds=0.01)
    with Scope(tmp_path / "scope") as scope:
        # The marker of the scope finds processes that are left.
        command = Command(["sh", "-c", hangs, "sh", runs], scope.marker)
        started = time.monotonic()
        with pytest.raises(InstallError, match=r"took too long\nwaiting for the server$"):
            install.run_with_retries(command, tmp_path, patience)
        assert time.monotonic() - started < 10.0
        assert settles(lambda: len(scope.members()), 0) == 0
    assert runs.read_text() == "xx"


def test_progress_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At each interval a line has the elapsed time, the size so far and the tool's last line of output."""
    downloads = """
import pathlib, sys, time
(pathlib.Path(sys.argv[1]) / "file").write_bytes(bytes(3_000_000))
print("Downloading file.jar", flush=True)
time.sleep(1.2)
"""
    patience = Patience(report_interval_seconds=0.4)
    install.run_with_retries(python(downloads, tmp_path), tmp_path, patience)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4
    assert re.fullmatch(r" +1 s, 3 MB: Downloading file\.jar", lines[-1])


def test_a_part_is_installed_once(engines: Path) -> None:
    """The second call finds the part and runs nothing; the subfolder ``cache`` is deleted."""
    fills = """
import pathlib, sys
target = pathlib.Path(sys.argv[1])
(target / "cache").mkdir()
(target / "program").write_text("program")
open(sys.argv[2], "a").write("x")
"""
    runs = engines.parent / "runs"
    for _ in range(2):
        install.install(part(fills, runs), QUICK)
    assert runs.read_text() == "x"
    path = part(fills, runs).path()
    assert [file.name for file in path.iterdir()] == ["program"]


def test_a_failed_installation_leaves_no_part(engines: Path) -> None:
    """Only the lock file is left, and the part is reported as missing with the target that installs it."""
    fails = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'half').write_text(''); sys.exit('no space')"
    with pytest.raises(InstallError, match="no space"):
        install.install(part(fails), QUICK)
    assert [file.name for file in engines.iterdir()] == ["part-1.0.lock"]
    with pytest.raises(NotInstalledError) as raised:
        part(fails).path()
    assert str(raised.value) == "not installed: a part; run `make engines` first"


def test_engines_import_nothing_from_tests() -> None:
    """The demo and the benchmarks use the package without the tests."""
    for file in install.HERE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "tests"], file
