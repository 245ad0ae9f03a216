"""The process that holds a machine's tritonserver: starts it, and again, and ends it after its last user.

It belongs to no user. It has the lock ``supervisor.lock`` for as long as it lives, which it inherits locked,
and its users hold ``lease.lock`` together: the kernel releases both when a process ends, by whatever signal.
If this process is killed, its server is killed with it by the watcher of `ServerProcess`, and a user that
finds the lock free starts another supervisor.

It runs without the package around it (`beam_triton.server.lease` says how), in 20 MB.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beam_triton.server.probe import LIVE, READY, accepts, answers
from beam_triton.server.process import ServerProcess, log_tail, startup_log

LEASE_LOCK = "lease.lock"
SUPERVISOR_LOCK = "supervisor.lock"
STATUS = "status.json"
SPEC = "spec.json"
SERVER_LOG = "server.log"
REPOSITORY = "repository"

_STEP_SECONDS = 0.25
# A user that ends and the one that takes its place may not meet.
_GRACE_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0
# A server that has run for so long did not crash because of its start.
_SETTLED_SECONDS = 60.0
_LARGEST_LOG_BYTES = 64 << 20


@dataclass
class Status:
    """What users read of the supervisor.

    ``state`` is ``preparing`` (a user copies the models and looks for the server), ``starting``, ``ready``,
    ``restarting``, ``failed`` or ``stopped``. ``detail`` is why it failed or was started again the last time.
    ``run`` names the supervisor.
    """

    run: str
    state: str
    detail: str = ""
    server_pid: int | None = None
    restarts: int = 0

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """The status in a folder, None where there is none."""
        try:
            return cls(**json.loads((folder / STATUS).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Replaces the status: nobody reads half of one."""
        partial = folder / f"{STATUS}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(folder / STATUS)


@dataclass
class Spec:
    """What the supervisor is to run; ``variables`` are added to its environment, those of Python are not."""

    run: str
    command: list[str]
    variables: dict[str, str]
    socket: str | None
    port: int | None
    shared_memory_prefix: str
    startup_timeout_seconds: float
    stop_timeout_seconds: float = 10.0
    live_every_seconds: float = 5.0
    unanswered_seconds: float = 60.0
    owns_repository: bool = False

    @property
    def place(self) -> Path | int:
        return Path(self.socket) if self.socket is not None else int(self.port or 0)

    def write(self, folder: Path) -> None:
        path = folder / SPEC
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)))


class _Ended(Exception):
    """Nobody uses the server any more, or this process is asked to end."""


class _NotStarted(Exception):
    """The server ended, or was not ready in time."""


class Supervisor:
    """Runs one server in ``folder`` until nobody leases it."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        self._folder = folder
        self._spec = spec
        self._log, self._log_start = folder / SERVER_LOG, 0
        self._status = Status(spec.run, "starting")
        self._lease = os.open(folder / LEASE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._unused_since: float | None = None
        self._crashes = 0  # since it last ran for a while
        self._is_ending = False
        self._process: ServerProcess | None = None

    def run(self) -> None:
        """Starts the server, and returns when it has ended for good."""
        try:
            self._publish("starting")
            try:
                self._start()
            except _NotStarted as error:
                self._end("failed", str(error))
                return
            while True:
                started = time.monotonic()
                reason = self._serve()
                if time.monotonic() - started > _SETTLED_SECONDS:
                    self._crashes = 0
                self._start_again(reason)
        except _Ended:
            self._end("stopped")

    def end(self, *signalled: Any) -> None:
        """Ends the server at the next step, whoever uses it."""
        self._is_ending = True

    def _start(self) -> None:
        spec = self._spec
        if spec.socket is not None:
            # tritonserver does not take the place of a socket that a killed one has left.
            Path(spec.socket).unlink(missing_ok=True)
        elif accepts(spec.port or 0):
            raise _NotStarted(f"http_port {spec.port} of 127.0.0.1 is in use by another process")
        log_start = self._log_start = self._log.stat().st_size if self._log.exists() else 0
        environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
        try:
            self._process = ServerProcess(
                spec.command,
                environment={**environment, **spec.variables},
                log_path=self._log,
                shared_memory_prefix=spec.shared_memory_prefix,
                folder=self._folder / spec.run,
            )
        except OSError as error:
            raise _NotStarted(f"tritonserver cannot be run: {error}") from error
        self._status.server_pid = self._process.pid
        self._publish(self._status.state)
        deadline = time.monotonic() + spec.startup_timeout_seconds
        while not answers(spec.place, READY, 2.0) or self._process.exit_code is not None:
            if self._process.exit_code is not None:
                raise _NotStarted(
                    f"tritonserver ended with exit code {self._process.exit_code} while it started; its "
                    f"log:\n{startup_log(self._log, log_start)}"
                )
            if time.monotonic() > deadline:
                raise _NotStarted(
                    f"tritonserver was not ready within startup_timeout_seconds="
                    f"{spec.startup_timeout_seconds:g}; the last lines of its log:\n"
                    f"{log_tail(self._log, log_start)}"
                )
            self._step(0.1)
        self._publish("ready")

    def _serve(self) -> str:
        """Returns when the server has to be started again, with the reason."""
        process = self._process
        assert process is not None
        asked = answered = time.monotonic()
        while process.exit_code is None:
            self._step(_STEP_SECONDS)
            now = time.monotonic()
            if now - asked >= self._spec.live_every_seconds:
                asked = now
                if answers(self._spec.place, LIVE, self._spec.live_every_seconds):
                    answered = time.monotonic()
                elif now - answered > self._spec.unanswered_seconds:
                    return f"tritonserver did not answer for {now - answered:.0f} s"
            if self._log.exists() and self._log.stat().st_size > _LARGEST_LOG_BYTES:
                os.truncate(self._log, 0)
                self._log_start = 0
        return f"tritonserver ended with exit code {process.exit_code}"

    def _start_again(self, reason: str) -> None:
        while True:
            self._status.restarts += 1
            log = log_tail(self._log, self._log_start, lines=10)
            self._publish("restarting", f"{reason}; the last lines of its log:\n{log}")
            self._kill()
            backoff_seconds = 2.0 ** min(self._crashes, 10) / 2 if self._crashes else 0.0
            until = time.monotonic() + min(backoff_seconds, _LONGEST_BACKOFF_SECONDS)
            self._crashes += 1
            while time.monotonic() < until:
                self._step(_STEP_SECONDS)
            try:
                self._start()
                return
            except _NotStarted as error:
                reason = str(error).partition(";")[0]

    def _step(self, seconds: float) -> None:
        """Waits. Raises `_Ended` where nobody uses the server any more, with ``lease.lock`` kept from all."""
        import fcntl  # Windows has none, and imports this file

        time.sleep(seconds)
        if self._is_ending:
            raise _Ended
        try:
            fcntl.flock(self._lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unused_since = None
            return
        now = time.monotonic()
        if self._unused_since is not None and now - self._unused_since >= _GRACE_SECONDS:
            raise _Ended
        self._unused_since = self._unused_since or now
        fcntl.flock(self._lease, fcntl.LOCK_UN)

    def _publish(self, state: str, detail: str | None = None) -> None:
        self._status.state = state
        if detail is not None:
            self._status.detail = detail
        self._status.write(self._folder)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _end(self, state: str, detail: str | None = None) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop(self._spec.stop_timeout_seconds)
        if self._spec.socket is not None:
            Path(self._spec.socket).unlink(missing_ok=True)
        shutil.rmtree(self._folder / self._spec.run, ignore_errors=True)
        if self._spec.owns_repository:
            shutil.rmtree(self._folder / REPOSITORY, ignore_errors=True)
        (self._folder / SPEC).unlink(missing_ok=True)
        self._status.server_pid = None
        self._publish(state, detail)


def main(folder: str) -> None:
    """Runs the supervisor in ``folder``, whose ``supervisor.lock`` this process has inherited."""
    os.umask(0o077)
    spec = Spec(**json.loads((Path(folder) / SPEC).read_bytes()))
    supervisor = Supervisor(Path(folder), spec)
    signal.signal(signal.SIGTERM, supervisor.end)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervisor.run()
