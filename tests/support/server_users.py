"""Processes that share no parent's memory and use a `WorkerTriton`, as Beam's workers do."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from beam_triton import TritonClient, WorkerTriton
from beam_triton.server.supervisor import LEASE_LOCK, Status
from tests.support.numbered_run import MODEL
from tests.support.watch import Watch

# A server process that has imported the library forks the users: an import in each would take seconds.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.support.server_users"])
# Now, as a test may have a temporary folder that does not last.
multiprocessing.util.get_temp_dir()


class ServerUser:
    """A process that uses the server of its machine; a context manager that kills it.

    The first `result` is that of opening the server: None, or the error's message.
    """

    def __init__(self, config: WorkerTriton, prepare: Callable[[], None] | None = None) -> None:
        self._connection, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(
            target=_use, args=(config, theirs, tempfile.gettempdir(), prepare), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> ServerUser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def result(self, within_seconds: float = 60.0) -> Any:
        """The next answer of the process."""
        assert self._connection.poll(within_seconds), f"no answer within {within_seconds} s"
        return self._connection.recv()

    def scores(self, number: float) -> bool:
        """Whether the server answers it rightly."""
        self._connection.send(number)
        return bool(self.result() == number)

    def kill(self) -> None:
        """``kill -9``."""
        assert self._process.pid is not None
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()


def _use(
    config: WorkerTriton, connection: Connection, temporary: str, prepare: Callable[[], None] | None
) -> None:
    tempfile.tempdir = os.environ["TMPDIR"] = temporary
    if prepare is not None:
        prepare()
    try:
        client = TritonClient(config)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    with client:
        connection.send(None)
        while True:
            number = connection.recv()
            answer = client.infer(MODEL, {"x": np.array([[number]], np.float32)})
            connection.send(float(answer.outputs["y"][0, 0]))


def status_of(config: WorkerTriton) -> Status:
    """What the supervisor says."""
    status = Status.read(config.folder)
    assert status is not None
    return status


def processes_of(folder: Path) -> dict[int, str]:
    """Command lines by process id, of the processes that have the folder in theirs."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found[int(entry.name)] = command
    return found


def supervisor_of(config: WorkerTriton) -> int:
    """The supervisor's process id."""
    (pid,) = (pid for pid, command in processes_of(config.folder).items() if "supervisor" in command)
    return pid


def wait_until(condition: Callable[[], object], within_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_seconds} s"
        time.sleep(0.05)


class SharingWatch(Watch):
    """Notes which processes lease the server of a configuration, and which servers there are."""

    def __init__(self, config: WorkerTriton) -> None:
        super().__init__()
        self._folder = config.folder
        self.servers: set[int] = set()
        self.users: set[int] = set()

    def look(self) -> None:
        status = Status.read(self._folder)
        if status is not None and status.server_pid is not None:
            self.servers.add(status.server_pid)
        supervisors = processes_of(self._folder)
        self.users |= {pid for pid in _holders(self._folder / LEASE_LOCK) if pid not in supervisors}


def _holders(file: Path) -> Iterator[int]:
    """The processes that have a file open."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) == str(file) for link in (entry / "fd").iterdir()):
                yield int(entry.name)
        except OSError:
            continue
