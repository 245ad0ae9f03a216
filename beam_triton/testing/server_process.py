"""One run of tritonserver: its environment variables, its process group, its end.

The group holds the server and the stubs of its Python models. The shared memory that a killed group leaves
behind is removed here too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from beam_triton.testing.server_environment import ServerEnvironment

_SHARED_MEMORY = Path("/dev/shm")

# The watcher outlives this process: it kills the group as soon as its pipe is closed, of which only this
# process holds the other end. PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the
# server ends.
_WATCHER = """
read -r line && exit 0
kill -s KILL -- "-$1"
sleep 1
rm -f "$2"*
rm -rf "$3"
"""


class ServerProcess:
    """A running tritonserver and its stubs.

    ``shared_memory_prefix`` begins the names of the Python backend's regions, ``folder`` is the server's
    temporary folder, and ``working_folder`` where it runs, by default where this process does.
    If this process dies without `stop` or `kill`, a watcher removes both.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        shared_memory_prefix: str,
        folder: Path,
        working_folder: Path | None = None,
    ) -> None:
        self._shared_memory_prefix = shared_memory_prefix
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=working_folder,
                start_new_session=True,
            )
        arguments = [str(self._process.pid), str(_SHARED_MEMORY / shared_memory_prefix), str(folder)]
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHER, "beam-triton-watcher", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the server runs; negative where a signal ended it."""
        return self._process.poll()

    def stop(self, timeout_seconds: float) -> None:
        """Lets requests in flight end for as long as ``timeout_seconds``, then kills what is left."""
        if self._process.poll() is None:
            self._process.terminate()
            # A stopped process does not see SIGTERM until it is continued.
            self._process.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_seconds)
        self.kill()

    def kill(self) -> None:
        """Sends SIGKILL to the server and its stubs; returns when none of them runs any more."""
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        _wait_until_gone(group)
        self._dismiss_watcher()
        for region in _SHARED_MEMORY.glob(self._shared_memory_prefix + "*"):
            region.unlink(missing_ok=True)

    def _dismiss_watcher(self) -> None:
        with contextlib.suppress(OSError):
            self._watcher.communicate(b"done\n", timeout=10)


def _wait_until_gone(group: int, timeout_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while _has_running_member(group) and time.monotonic() < deadline:
        time.sleep(0.01)


def _has_running_member(group: int) -> bool:
    """True while a process of the group runs; a zombie that init has yet to collect does not count."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has ended since
        # The command's name is in parentheses and may hold spaces: the fields after it are counted.
        state, _parent, process_group = stat.rpartition(")")[2].split()[:3]
        if int(process_group) == group and state not in ("Z", "X"):
            return True
    return False


def server_variables(environment: ServerEnvironment, added: Mapping[str, str]) -> dict[str, str]:
    """The server's environment variables: those of this process but for its Python's, and ``added``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # The stub finds its standard library, and so its NumPy, through the first python3 on PATH.
    path = [str(environment.folder / "bin"), inherited.get("PATH", os.defpath)]
    library_path = [environment.library_path, inherited.get("LD_LIBRARY_PATH", "")]
    return {
        **inherited,
        "PATH": os.pathsep.join(path),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, library_path)),
        "PYTHONNOUSERSITE": "1",
        # A __pycache__ beside model.py would be a change of the model under "poll".
        "PYTHONDONTWRITEBYTECODE": "1",
        **added,
    }


def lay_out_backends(environment: ServerEnvironment, folder: Path, packages: Path | None = None) -> None:
    """Links the Python backend and its stub into ``folder/python``: Triton looks for both in one place.

    The stub's Python ignores ``PYTHONPATH`` and finds ``packages`` there, after those of ``environment``.
    """
    python = folder / "python"
    python.mkdir(parents=True)
    for file in environment.python_backend.iterdir():
        if file.is_file():
            (python / file.name).symlink_to(file)
    (python / environment.python_backend_stub.name).symlink_to(environment.python_backend_stub)
    for package in packages.iterdir() if packages is not None else ():
        (python / package.name).symlink_to(package)
