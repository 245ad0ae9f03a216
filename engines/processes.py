"""Processes that end with their scope, descendants included; and free ports to start servers on.

A task manager starts boot programs, which start workers in process groups of their own, and a killed
parent leaves its children running. Every process of a scope therefore carries the scope's marker in its
environment, which descendants inherit. Leaving the scope ends each process that carries the marker.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

_MARKER = "BEAM_TRITON_ENGINE_SCOPE"


class EngineError(RuntimeError):
    """An engine or its pipeline failed; the message ends with the last lines of its log."""


class Scope:
    """A folder and the processes started in it; leaving the ``with`` block ends all of them.

    Each process writes its output to ``<folder>/<name>.log``, which stays. ``marker`` is the environment
    variable that makes any other process a member of the scope.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = {_MARKER: uuid.uuid4().hex}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Scope:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that Ctrl-C in a terminal reaches only this process."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                env={**os.environ, **self.marker, **(environment or {})},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def log(self, name: str) -> Path:
        """The file that the process of this name writes to."""
        return self.folder / f"{name}.log"

    def await_ready(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        ready: Callable[[], T | None],
        *,
        within_seconds: float,
    ) -> T:
        """Call ``ready`` until it returns something other than None, and return that.

        Raises:
            EngineError: the process ended first, or is not ready within ``within_seconds``.
        """
        deadline = time.monotonic() + within_seconds
        while (answer := ready()) is None:
            if process.poll() is not None:
                raise EngineError(f"{name} ended with exit code {process.returncode}\n{tail(self.log(name))}")
            if time.monotonic() > deadline:
                raise EngineError(f"{name} is not ready after {within_seconds:g} s\n{tail(self.log(name))}")
            time.sleep(0.2)
        return answer

    def members(self) -> list[int]:
        """Ids of the running processes that carry the scope's marker."""
        needle = f"{_MARKER}={self.marker[_MARKER]}".encode()
        return [pid for pid in _running() if pid != os.getpid() and needle in _environment(pid)]

    def stop(self, *, grace_seconds: float = 10.0) -> None:
        """Send every process SIGTERM, and SIGKILL to those that still run after ``grace_seconds``."""
        for signal_number, wait_seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
            members = self.members()
            if not members:
                break
            for pid in members:
                kill(pid, signal_number)
            self._wait_until_ended(wait_seconds)
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def _wait_until_ended(self, within_seconds: float) -> None:
        deadline = time.monotonic() + within_seconds
        while time.monotonic() < deadline:
            # A child that has ended keeps its id until poll() reaps it.
            for process in self._processes:
                process.poll()
            if not self.members():
                return
            time.sleep(0.1)


def tail(log: Path, lines: int = 40) -> str:
    """A log's path and its last lines, for an error message."""
    return f"{log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nothing listens on."""
    # All sockets stay open until every port is known, or the kernel might give one port twice.
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def accepts(port: int) -> bool | None:
    """True when something accepts connections on the port, else None: a condition for `await_ready`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return None


def kill(pid: int, signal_number: signal.Signals) -> None:
    """Send a signal to one process, or do nothing where it has ended already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def _running() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # the process has ended, or belongs to another user
        return b""
