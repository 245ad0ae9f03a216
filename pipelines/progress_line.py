"""Lines on stderr that say how far a job in this process is."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from beam_triton.score import PROGRESS


class ProgressLine:
    """A context manager; while it is open a thread reports every ``interval_seconds``.

    ``total_bytes`` is the size of all files; where rows have been read their share of it is told. On a
    terminal one line is written over; elsewhere each report is a line. ``counts_here`` False: the workers are
    other processes, and only the time is told. An interval of 0 reports nothing.
    """

    def __init__(
        self,
        interval_seconds: float,
        total_bytes: int,
        *,
        counts_here: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._interval_seconds = interval_seconds
        self._total_bytes = total_bytes
        self._counts_here = counts_here
        self._stream = stream if stream is not None else sys.stderr
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._width = 0

    def __enter__(self) -> ProgressLine:
        PROGRESS.reset()
        self._started_at = time.monotonic()
        if self._interval_seconds > 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()

    def _run(self) -> None:
        before, last = self._started_at, 0
        while not self._ended.wait(self._interval_seconds):
            at, done = time.monotonic(), PROGRESS.results + PROGRESS.failures
            rate = (done - last) / (at - before)
            before, last = at, done
            self._report(self.text(at - self._started_at, rate))

    def text(self, seconds: float, elements_per_second: float) -> str:
        """What is said after ``seconds``."""
        if not self._counts_here:
            return f"{seconds:5.0f} s  working; other processes count, the summary will tell"
        done = PROGRESS.results + PROGRESS.failures
        share = ""
        if self._total_bytes > 0 and PROGRESS.bytes_read:
            share = f"  {min(PROGRESS.bytes_read / self._total_bytes, 1):4.0%} read"
        failed = f"  {PROGRESS.failures:,} failed" if PROGRESS.failures else ""
        return f"{seconds:5.0f} s  {done:>11,} rows done  {elements_per_second:>9,.0f}/s{share}{failed}"

    def _report(self, text: str) -> None:
        if self._stream.isatty():
            self._stream.write("\r" + text.ljust(self._width))
            self._width = max(self._width, len(text))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
