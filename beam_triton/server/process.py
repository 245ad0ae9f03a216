"""One run of tritonserver: its environment variables, its process group, its end.

The group holds the server and the stubs of its Python models. The shared memory that a killed group leaves
behind is removed here too. This file imports nothing of the package: the supervisor runs without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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

# A connection to a unix socket has no such option, which the server says once for each.
_NO_NEWS = "NODELAY NOT SUPPORTED"

_LOG_TAIL_LINES = 40
_LOG_TAIL_BYTES = 256 * 1024


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


def end_group(group: int, mark: str) -> None:
    """Kills a process group that its owner has left behind, if its leader's command line holds ``mark``.

    The number may be another process's by now, which is left alone.
    """
    try:
        command = Path(f"/proc/{group}/cmdline").read_bytes()
    except OSError:
        return
    if mark.encode() in command:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        _wait_until_gone(group)


def server_variables(
    path: Iterable[str], library_path: Iterable[str], added: Mapping[str, str]
) -> dict[str, str]:
    """The server's environment variables: those of this process but for its Python's, and ``added``.

    The folders of ``path`` and ``library_path`` come first in ``PATH`` and ``LD_LIBRARY_PATH``.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # The Python backend's stub finds its standard library, and so its NumPy, through the first python3 on
    # PATH: that of this process's virtual environment is not the server's.
    own = os.path.join(sys.prefix, "bin") if sys.prefix != sys.base_prefix else ""
    folders = inherited.get("PATH", os.defpath).split(os.pathsep)
    libraries = [*library_path, inherited.get("LD_LIBRARY_PATH", "")]
    return {
        **inherited,
        "PATH": os.pathsep.join([*path, *(folder for folder in folders if folder != own)]),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "PYTHONNOUSERSITE": "1",
        # A __pycache__ beside model.py would be a change of the model under "poll".
        "PYTHONDONTWRITEBYTECODE": "1",
        **added,
    }


def log_tail(log_path: Path, start: int = 0, lines: int = _LOG_TAIL_LINES) -> str:
    """The last lines of a server's log after its byte ``start``; empty where there is none."""
    try:
        with log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(start, end - _LOG_TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if _NO_NEWS not in line][-lines:])


def startup_log(log_path: Path, start: int = 0) -> str:
    """The log's first and last lines: the first one names a wrong argument."""
    lines = log_tail(log_path, start, lines=10_000).splitlines()
    if len(lines) > 2 * _LOG_TAIL_LINES:
        lines = [*lines[:5], "…", *lines[-_LOG_TAIL_LINES:]]
    return "\n".join(lines)
