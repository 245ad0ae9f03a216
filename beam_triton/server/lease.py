"""A process's share in the server of its machine: leased by the first user, kept for a while after the last.

Processes that share no parent meet in a folder, and the kernel keeps the score: each holds ``lease.lock``
together with the others, and the supervisor holds ``supervisor.lock`` alone. Whoever finds the latter free
starts a supervisor, and hands it the lock. A process that ends, by whatever signal, holds nothing any more.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beam_triton.errors import ConfigurationError
from beam_triton.server.binary import find_server_binary, server_command
from beam_triton.server.model_repository import copy_repository
from beam_triton.server.probe import READY, answers
from beam_triton.server.process import end_group, log_tail
from beam_triton.server.supervisor import (
    LEASE_LOCK,
    REPOSITORY,
    SPEC,
    SUPERVISOR_LOCK,
    Spec,
    Status,
)
from beam_triton.server.worker_triton import SOCKET, WorkerTriton

_logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
_SUPERVISOR_LOG = "supervisor.log"
_ATTEMPTS = 3
_WATCH_EVERY_SECONDS = 0.5
_TAKE_OVER_EVERY_SECONDS = 5.0
_STOP_SECONDS = 10.0

# The package's own __init__ would import Beam, which takes seconds and 100 MB.
_RUN_SUPERVISOR = """
import sys, types
package = types.ModuleType("beam_triton")
package.__path__ = [sys.argv[1]]
sys.modules["beam_triton"] = package
from beam_triton.server.supervisor import main
main(sys.argv[2])
"""


class ServerLease:
    """The right to use the server of this machine, until `release`."""

    def __init__(self, config: WorkerTriton) -> None:
        self._server = _server_of(config)
        try:
            self._server.wait_until_ready()
        except BaseException:
            self._server.drop(has_failed=True)
            raise
        self._is_released = False

    def release(self) -> None:
        """Ends the use of the server. A second call does nothing."""
        with _lock:
            is_first, self._is_released = not self._is_released, True
        if is_first:
            self._server.drop()


class _MachineServer:
    """The server of one configuration, as this process holds it; made and dropped under `_lock`."""

    def __init__(self, config: WorkerTriton) -> None:
        self.users = 0
        self._config = config
        self._folder = config.folder
        self._lease: int | None = None
        self._unused_since = 0.0
        # One thread at a time waits, or starts the supervisor.
        self._starting = threading.Lock()
        self._supervisors: list[subprocess.Popen[bytes]] = []
        self._restarts: tuple[str, int] = ("", 0)

    def wait_until_ready(self) -> None:
        """Takes the lease, has the server started if need be, and waits until it is ready.

        Raises:
            ConfigurationError: it cannot be started.
        """
        before = Status.read(self._folder)
        # A failure from now on is that of an attempt that this call waits for.
        seen = before.run if before is not None and before.state == "failed" else ""
        with self._starting:
            if self._lease is None:
                self._lease = _take_lease(self._folder)
                threading.Thread(
                    target=self._watch_supervisor, name="beam_triton-worker-server", daemon=True
                ).start()
            self._wait(seen)

    def drop(self, *, has_failed: bool = False) -> None:
        """One user less. After the last one the lease is kept for a while, unless there is no server."""
        with _lock:
            self.users -= 1
            self._unused_since = time.monotonic()
            if self.users == 0 and (has_failed or self._config.linger_seconds == 0):
                self._close()

    def _close(self) -> None:
        """Gives the lease up; under `_lock`."""
        if _servers.get(self._config) is self:
            del _servers[self._config]
        lease, self._lease = self._lease, None
        if lease is not None:
            os.close(lease)

    def _wait(self, seen: str) -> None:
        started = time.monotonic()
        deadline = started + self._config.startup_timeout_seconds
        attempts = 0
        while True:
            status = Status.read(self._folder)
            if status is not None and status.state == "failed" and status.run != seen:
                raise ConfigurationError(f"{self._config} does not start on this machine: {status.detail}")
            if self._start_if_nobody_does(seen):
                attempts += 1
                if attempts > _ATTEMPTS and self._last_one_ends_at_once():
                    raise ConfigurationError(
                        f"{self._config} does not start on this machine: its supervisor ends at once, and "
                        f"says {log_tail(self._folder / _SUPERVISOR_LOG)!r}"
                    )
                continue
            if status is not None and status.state == "ready" and answers(self._config.place, READY, 5.0):
                self._restarts = (status.run, status.restarts)
                if attempts:
                    seconds = time.monotonic() - started
                    _logger.info("%s is ready after %.1f s, at %s", self._config, seconds, self._config.url)
                return
            if status is None or status.state in ("preparing", "starting"):
                # The supervisor itself bounds the start, and nothing bounds copying.
                deadline = time.monotonic() + self._config.startup_timeout_seconds
            elif time.monotonic() > deadline:
                raise ConfigurationError(
                    f"{self._config} was not ready within startup_timeout_seconds="
                    f"{self._config.startup_timeout_seconds:g}, and is {status.state}: {status.detail}"
                )
            time.sleep(0.05)

    def _start_if_nobody_does(self, seen: str = "", *, is_first: bool = True) -> bool:
        """Starts a supervisor where there is none; whether it did.

        ``seen`` is a supervisor that is known to have failed: a failure of another one is news to its caller.
        """
        import fcntl

        lock = os.open(self._folder / SUPERVISOR_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            status = Status.read(self._folder)
            if status is not None and status.state == "failed" and status.run != seen and is_first:
                return True
            self._start_supervisor(lock, keeps_repository=not (is_first and self._is_alone()))
            return True
        finally:
            # The supervisor has inherited it, and holds the lock alone now.
            os.close(lock)

    def _last_one_ends_at_once(self) -> bool:
        try:
            self._supervisors[-1].wait(1.0)
            return True
        except subprocess.TimeoutExpired:
            return False

    def _is_alone(self) -> bool:
        """Whether no other process leases the server; only while there is no supervisor, who would end."""
        import fcntl

        assert self._lease is not None
        try:
            fcntl.flock(self._lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            # The attempt has cost the lease, whatever came of it.
            fcntl.flock(self._lease, fcntl.LOCK_SH)

    def _start_supervisor(self, lock: int, *, keeps_repository: bool) -> None:
        config, folder = self._config, self._folder
        run = f"run-{uuid.uuid4().hex[:12]}"
        before = Status.read(folder)
        Status(run, "preparing").write(folder)
        try:
            if before is not None and before.server_pid is not None:
                # Its memory, that of the GPU most of all, is needed.
                end_group(before.server_pid, before.run)
            _remove_leftovers(folder, keeps_repository=keeps_repository)
            spec = self._spec(run)
            spec.write(folder)
            with (folder / _SUPERVISOR_LOG).open("wb") as log:
                supervisor = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _RUN_SUPERVISOR, str(_PACKAGE), str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            self._supervisors.append(supervisor)
        except (ConfigurationError, OSError) as error:
            # Others that wait for this attempt need not make it again.
            Status(run, "failed", str(error)).write(folder)
            shutil.rmtree(folder / run, ignore_errors=True)
            raise ConfigurationError(f"{config} does not start on this machine: {error}") from error

    def _spec(self, run: str) -> Spec:
        """What the supervisor is to run, once the models are on this machine."""
        config, folder = self._config, self._folder
        binary = find_server_binary(config.binary)
        repository = Path(config.model_repository)
        if config.is_remote:
            repository = folder / REPOSITORY
            if not repository.exists():
                started = time.monotonic()
                size = copy_repository(config.model_repository, repository)
                seconds = time.monotonic() - started
                _logger.info("%s: copied %d bytes in %.1f s to %s", config, size, seconds, repository)
        elif not repository.is_dir():
            raise ConfigurationError(
                f"model_repository {config.model_repository!r} is no folder on this machine: workers need it "
                f"at the same path, or a URL such as gs://bucket/models, which they copy"
            )
        backends = binary.lay_out_backends(folder / run / "backends")
        if config.backend_directory is not None:
            backends = Path(config.backend_directory)
        more = []
        if config.shared_memory and binary.takes("--allow-client-shm"):
            more.append("--allow-client-shm=true")
        if config.model_names is not None:
            more.append("--model-control-mode=explicit")
            more += [f"--load-model={name}" for name in config.model_names]
        place = config.place
        address, port = ("127.0.0.1", place) if isinstance(place, int) else (f"unix:{place}", 1)
        prefix = f"beam_triton_{run}_"
        variables = binary.variables({})
        (folder / run).mkdir(exist_ok=True)
        return Spec(
            run=run,
            command=server_command(
                binary,
                repository,
                backends=backends,
                shared_memory_prefix=prefix,
                exit_timeout_seconds=_STOP_SECONDS,
                services={"http": (address, port), "grpc": None, "metrics": None},
                more=[*more, *config.arguments],
            ),
            # Those of this process are not written down: some are secrets.
            variables={
                name: text
                for name, text in variables.items()
                if os.environ.get(name) != text or name.startswith("PYTHON")
            },
            socket=None if isinstance(place, int) else str(place),
            port=place if isinstance(place, int) else None,
            shared_memory_prefix=prefix,
            startup_timeout_seconds=config.startup_timeout_seconds,
            stop_timeout_seconds=_STOP_SECONDS,
            owns_repository=config.is_remote,
        )

    def _watch_supervisor(self) -> None:
        """Starts another supervisor where the last one was killed, and gives the lease up after a while."""
        taken_over = -_TAKE_OVER_EVERY_SECONDS
        while True:
            time.sleep(_WATCH_EVERY_SECONDS)
            with _lock:
                unused_seconds = time.monotonic() - self._unused_since
                if self.users == 0 and unused_seconds > self._config.linger_seconds:
                    self._close()
                if self._lease is None:
                    break
            # A thread that waits for the server does the same.
            if not self._starting.acquire(blocking=False):
                continue
            try:
                self._report_restarts()
                if self._lease is not None and time.monotonic() - taken_over > _TAKE_OVER_EVERY_SECONDS:
                    before = Status.read(self._folder)
                    if self._start_if_nobody_does(is_first=False):
                        taken_over = time.monotonic()
                        why = before.detail if before is not None and before.state == "failed" else "killed"
                        _logger.warning(
                            "%s: another supervisor is started, the last one: %s", self._config, why
                        )
            except Exception as error:
                taken_over = time.monotonic()
                _logger.error("%s: %s", self._config, error)
            finally:
                self._supervisors = [each for each in self._supervisors if each.poll() is None]
                self._starting.release()
        for supervisor in self._supervisors:
            supervisor.wait()

    def _report_restarts(self) -> None:
        status = Status.read(self._folder)
        if status is None:
            return
        known, self._restarts = self._restarts, (status.run, status.restarts)
        if self._restarts != known and status.restarts:
            _logger.warning("%s is started again: %s", self._config, status.detail)


_servers: dict[WorkerTriton, _MachineServer] = {}
_lock = threading.Lock()


def lease_server(endpoint: object) -> ServerLease | None:
    """Leases the server of this machine, and waits until it is ready; None for an endpoint elsewhere.

    Raises:
        ConfigurationError: it cannot be started, for the reason that its log gives.
    """
    return ServerLease(endpoint) if isinstance(endpoint, WorkerTriton) else None


def _server_of(config: WorkerTriton) -> _MachineServer:
    with _lock:
        server = _servers.get(config)
        if server is None:
            server = _servers[config] = _MachineServer(config)
        server.users += 1
        return server


def _take_lease(folder: Path) -> int:
    """The file descriptor that holds ``lease.lock``; waits for a server that is being ended."""
    try:
        import fcntl
    except ImportError:
        raise ConfigurationError("a WorkerTriton runs on Linux only; give the URL of a server") from None
    _make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    lease = os.open(folder / LEASE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lease, fcntl.LOCK_SH)
    except BaseException:
        os.close(lease)
        raise
    return lease


def _make_private(folder: Path) -> None:
    """A folder in the temporary one that is this user's alone: nobody else lays models or sockets there."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigurationError(f"a WorkerTriton needs the folder {folder}: {error}") from error
    if folder.is_symlink() or not folder.is_dir() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigurationError(
            f"a WorkerTriton needs the folder {folder} for this user alone: remove what is there, or name "
            f"another temporary folder by TMPDIR"
        )


def _remove_leftovers(folder: Path, *, keeps_repository: bool) -> None:
    """What killed supervisors have left, of this configuration and of those that nobody uses any more."""
    import fcntl

    for other in folder.parent.iterdir():
        if other == folder:
            _remove_files(folder, keeps_repository=keeps_repository)
            continue
        with _opened(other / SUPERVISOR_LOCK) as supervisor, _opened(other / LEASE_LOCK) as lease:
            if supervisor is None or lease is None:
                continue
            try:
                for lock in (supervisor, lease):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove_files(other, keeps_repository=False)


def _remove_files(folder: Path, *, keeps_repository: bool) -> None:
    for entry in folder.glob("run-*"):
        shutil.rmtree(entry, ignore_errors=True)
    for name in (SPEC, SOCKET):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / f"{REPOSITORY}.partial", ignore_errors=True)
    if not keeps_repository:
        shutil.rmtree(folder / REPOSITORY, ignore_errors=True)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _forget_all() -> None:
    """In a forked child: it holds its parent's leases with it, and takes its own for what it opens itself."""
    global _lock
    _lock = threading.Lock()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
