"""A program on a pseudo-terminal, and what a person would see there: pyte is the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import pyte


class PseudoTerminal:
    """A context manager that runs a command, whose stdin, stdout and stderr are a terminal.

    Attributes:
        screen: what is shown now. Lines that have scrolled away are in ``text``.
    """

    def __init__(
        self, command: Sequence[str], *, columns: int = 100, rows: int = 30, term: str = "xterm-256color"
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self.screen)
        self._command = command
        self._environment = {**os.environ, "TERM": term}
        # They would say more about the terminal than it does itself.
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            self._environment.pop(name, None)

    def __enter__(self) -> PseudoTerminal:
        self._master, slave = pty.openpty()
        self._set_size(self.screen.columns, self.screen.lines)
        self.process = subprocess.Popen(
            self._command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=self._environment,
            start_new_session=True,
            # The terminal of the new session: Ctrl-C reaches its processes.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.attributes = termios.tcgetattr(self._master)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def lines(self) -> list[str]:
        """The lines on the screen, without the spaces behind them."""
        return [each.rstrip() for each in self.screen.display]

    @property
    def text(self) -> str:
        """All lines so far, those that have scrolled away, too."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return "\n".join([*above, *self.lines]).rstrip()

    def wait_until(self, shows: Callable[[], bool], seconds: float = 60.0) -> None:
        """Take what is written until it shows something; AssertionError with the screen if it never does."""
        deadline = time.monotonic() + seconds
        while not shows():
            assert time.monotonic() < deadline, f"the terminal shows:\n{self.text}"
            assert self._take(0.1) or shows(), f"it ended, and the terminal shows:\n{self.text}"

    def wait(self, seconds: float = 60.0) -> int:
        """Take what is written until the program ends; its exit code."""
        deadline = time.monotonic() + seconds
        while self._take(0.1):
            assert time.monotonic() < deadline, f"the terminal shows:\n{self.text}"
        return self.process.wait(10.0)

    def press(self, key: bytes) -> None:
        """Type something; ``b"\\x03"`` is Ctrl-C."""
        os.write(self._master, key)

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size."""
        self._set_size(columns, rows)
        self.screen.resize(rows, columns)
        self.process.send_signal(signal.SIGWINCH)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _take(self, seconds: float) -> bool:
        """False once the program has closed the terminal."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self._stream.feed(os.read(self._master, 1 << 16))
            except OSError:
                return False
        return True
