"""Leaving a scope ends every process that was started in it, descendants included."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.processes import EngineError, Scope

# Starts a child in a session of its own, as Beam's boot program does with Python, and prints its id.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""

# Reports that it is ready, and ignores SIGTERM.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_soon_gone(pid: int) -> bool:
    """Within seconds: a killed process goes when the kernel gets to it."""
    give_up_at = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    return not is_running(pid)


def first_word(scope: Scope, name: str) -> str | None:
    words = scope.log(name).read_text().split()
    return words[0] if words else None


def start_parent(scope: Scope) -> tuple[subprocess.Popen[bytes], int]:
    parent = scope.start("parent", [sys.executable, "-c", PARENT])
    child = scope.await_ready("parent", parent, lambda: first_word(scope, "parent"), within_seconds=20)
    return parent, int(child)


def test_leaving_a_scope_ends_descendants_in_other_sessions(tmp_path: Path) -> None:
    """A grandchild outside of our process groups ends with the scope."""
    with Scope(tmp_path) as scope:
        parent, child = start_parent(scope)
        assert is_running(parent.pid) and is_running(child)
        assert set(scope.members()) == {parent.pid, child}
    assert is_soon_gone(parent.pid)
    assert is_soon_gone(child)


def test_leaving_a_scope_ends_orphans_of_a_killed_process(tmp_path: Path) -> None:
    """The child of a killed parent is still a member of the scope."""
    with Scope(tmp_path) as scope:
        parent, child = start_parent(scope)
        parent.kill()
        parent.wait()
        assert scope.members() == [child]
    assert is_soon_gone(child)


def test_processes_end_after_a_failure_inside_the_scope(tmp_path: Path) -> None:
    """An exception in the block ends the processes as well."""
    with pytest.raises(ZeroDivisionError), Scope(tmp_path) as scope:
        _, child = start_parent(scope)
        _ = 1 // 0
    assert is_soon_gone(child)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """SIGKILL follows SIGTERM after the grace period."""
    with Scope(tmp_path) as scope:
        stubborn = scope.start("stubborn", [sys.executable, "-c", STUBBORN])
        scope.await_ready("stubborn", stubborn, lambda: first_word(scope, "stubborn"), within_seconds=20)
        scope.stop(grace_seconds=0.3)
        assert is_soon_gone(stubborn.pid)


def test_a_process_that_ends_before_it_is_ready_is_an_error_with_its_log(tmp_path: Path) -> None:
    """The message has the exit code and the last lines of the log."""
    with Scope(tmp_path) as scope:
        failing = scope.start("failing", [sys.executable, "-c", "raise SystemExit('no such master')"])
        said = r"failing ended with exit code 1\n.*failing.log:\nno such master"
        with pytest.raises(EngineError, match=said):
            scope.await_ready("failing", failing, lambda: None, within_seconds=20)
