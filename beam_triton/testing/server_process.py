"""One run of the tritonserver process: started in a process group of its own, and surely ended.

The group holds the server and the stubs of its Python models. What the group leaves behind when it is killed
(shared memory) is removed here too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")

# The watcher outlives the parent: it ends the group as soon as the pipe, whose other end only the parent
# holds, is closed. PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the server ends.
_WATCHER = """
read -r line && exit 0
kill -s KILL -- "-$1"
sleep 1
rm -f "$2"*
rm -rf "$3"
"""


class ServerProcess:
    """A running tritonserver and its stubs.

    ``shared_memory_prefix`` is what the Python backend calls its regions, and ``folder`` the server's
    temporary folder: the watcher removes both if this process dies without `stop` or `kill`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        shared_memory_prefix: str,
        folder: Path,
    ) -> None:
        self._shared_memory_prefix = shared_memory_prefix
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
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
        """SIGKILL to the server and its stubs; returns when none of them runs any more."""
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
            continue  # it ended meanwhile
        # The command's name stands in parentheses and may hold spaces: fields count from behind it.
        state, _parent, process_group = stat.rpartition(")")[2].split()[:3]
        if int(process_group) == group and state not in ("Z", "X"):
            return True
    return False
