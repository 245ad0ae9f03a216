"""Start processes that are surely stopped again, their descendants included.

A task manager starts boot programs, which start workers in process groups of their own, and a killed
parent leaves them behind; a process id alone does not find them. So every process of a scope carries
a marker of the scope in its environment, descendants inherit it, and leaving the scope ends whatever
carries it, by process id.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

_MARKER = "BEAM_TRITON_TEST_SCOPE"


class EngineError(RuntimeError):
    """An engine did not start, or ended too early; the message ends with the last lines of its log."""


class Scope:
    """A folder and the processes started in it; leaving the ``with`` block ends every one of them.

    ``environment`` is this process's environment with the marker: give it to whatever else belongs to
    the scope, such as a pipeline that starts worker processes of its own. Each process writes its output
    to ``<folder>/<name>.log``, which stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._marker = uuid.uuid4().hex
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, _MARKER: self._marker}

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
        """Start a process in a session of its own, so that Ctrl-C in a terminal reaches only us."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                env={**self.environment, **(environment or {})},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def log(self, name: str) -> Path:
        """Where the process of this name writes."""
        return self.folder / f"{name}.log"

    def await_ready(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        ready: Callable[[], T | None],
        *,
        within_seconds: float,
    ) -> T:
        """Return the first thing but None that ``ready`` returns; EngineError if the process ends before."""
        deadline = time.monotonic() + within_seconds
        while (answer := ready()) is None:
            if process.poll() is not None:
                raise EngineError(f"{name} ended with exit code {process.returncode}\n{self.tail(name)}")
            if time.monotonic() > deadline:
                raise EngineError(f"{name} is not ready after {within_seconds:g} s\n{self.tail(name)}")
            time.sleep(0.2)
        return answer

    def tail(self, name: str, lines: int = 30) -> str:
        """The last lines of a process's log."""
        return f"{self.log(name)}:\n" + "\n".join(
            self.log(name).read_text(errors="replace").splitlines()[-lines:]
        )

    def members(self) -> list[int]:
        """Ids of the running processes that carry the scope's marker."""
        needle = f"{_MARKER}={self._marker}".encode()
        return [pid for pid in _running() if pid != os.getpid() and needle in _environment(pid)]

    def stop(self, *, grace_seconds: float = 10.0) -> None:
        """Ask every process to end, wait, and kill those that have not."""
        for signal_number, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
            members = self.members()
            if not members:
                break
            for pid in members:
                kill(pid, signal_number)
            self._wait_until_gone(patience)
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def _wait_until_gone(self, within_seconds: float) -> None:
        deadline = time.monotonic() + within_seconds
        while time.monotonic() < deadline:
            # Reaped here: a child that has ended keeps its id until then.
            for process in self._processes:
                process.poll()
            if not self.members():
                return
            time.sleep(0.1)


def kill(pid: int, signal_number: signal.Signals) -> None:
    """Send a signal to one process; nothing happens where it has ended already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def _running() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended in the meantime, or another user's
        return b""
