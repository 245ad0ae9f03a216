"""Everything that a scope started, or that this started in turn, is gone when the scope is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines.processes import EngineError, Scope

# Starts a child in a session of its own, as Beam's boot program does with Python, and says its id.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""

# Says that it is there, and takes no notice of SIGTERM.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("here", flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def first_word(scope: Scope, name: str) -> str | None:
    words = scope.log(name).read_text().split()
    return words[0] if words else None


def start_parent(scope: Scope) -> tuple[subprocess.Popen[bytes], int]:
    parent = scope.start("parent", [sys.executable, "-c", PARENT])
    child = scope.await_ready("parent", parent, lambda: first_word(scope, "parent"), within_seconds=20)
    return parent, int(child)


def test_leaving_a_scope_ends_descendants_in_other_sessions(tmp_path: Path) -> None:
    """A grandchild that no process group of ours holds ends with the scope."""
    with Scope(tmp_path) as scope:
        parent, child = start_parent(scope)
        assert is_running(parent.pid) and is_running(child)
        assert set(scope.members()) == {parent.pid, child}
    assert not is_running(parent.pid)
    assert not is_running(child)


def test_orphans_of_a_killed_process_end_too(tmp_path: Path) -> None:
    """What a killed parent left behind is still found."""
    with Scope(tmp_path) as scope:
        parent, child = start_parent(scope)
        parent.kill()
        parent.wait()
        assert scope.members() == [child]
    assert not is_running(child)


def test_processes_end_after_a_failure_inside_the_scope(tmp_path: Path) -> None:
    """An exception in the block leaves nothing running either."""
    with pytest.raises(ZeroDivisionError), Scope(tmp_path) as scope:
        _, child = start_parent(scope)
        _ = 1 // 0
    assert not is_running(child)


def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    """SIGTERM is asked for first; what is left after the grace is killed."""
    with Scope(tmp_path) as scope:
        stubborn = scope.start("stubborn", [sys.executable, "-c", STUBBORN])
        scope.await_ready("stubborn", stubborn, lambda: first_word(scope, "stubborn"), within_seconds=20)
        scope.stop(grace_seconds=0.3)
        assert not is_running(stubborn.pid)


def test_a_process_that_ends_before_it_is_ready_is_an_error_with_its_log(tmp_path: Path) -> None:
    """The message holds the exit code and what the process said last."""
    with Scope(tmp_path) as scope:
        failing = scope.start("failing", [sys.executable, "-c", "raise SystemExit('no such master')"])
        said = r"failing ended with exit code 1\n.*failing.log:\nno such master"
        with pytest.raises(EngineError, match=said):
            scope.await_ready("failing", failing, lambda: None, within_seconds=20)
