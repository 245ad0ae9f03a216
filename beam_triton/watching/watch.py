"""`watch`: a thread that samples this process, draws what it sees, and writes a report of it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TextIO

from beam_triton.errors import ConfigurationError
from beam_triton.watching.history import SAMPLE_SECONDS, History, Sampler
from beam_triton.watching.report import Report, report_html
from beam_triton.watching.terminal import Picture, can_draw, line

_logger = logging.getLogger(__name__)

# A run that is killed leaves a report that is no older.
_REPORT_SECONDS = 60.0

# Two pictures would be drawn over each other.
_drawing = threading.Lock()


def watch(
    report: str | os.PathLike[str] | None = None, *, progress_seconds: float = 10.0, title: str = ""
) -> AbstractContextManager[object]:
    """A context in which the requests of this process are watched, whatever makes them::

        with beam_triton.watch(report="run.html"), beam.Pipeline() as p:
            ...

    On a terminal (stderr), with ``pip install beam-triton[live]``, a few lines show elements per second,
    requests in flight, the concurrency limit's course, latency, the server's queue, connections and failures.
    Elsewhere a line is written to stderr now and then. A thread looks four times a second; requests do not
    wait for it. Workers in other processes are not seen: pipelines run here on the DirectRunner, and on
    Prism, Flink and others with ``--environment_type=LOOPBACK``.

    Args:
        report: path of a self-contained HTML file with charts, a summary, the first failure of each kind and
            the settings without secrets. It is written at the beginning, once a minute, and in the end, also
            where the context ends with an error. ``None`` writes none.
        progress_seconds: between two lines where there is no terminal; 0 shows nothing, on a terminal either.
        title: the report's and the picture's; by default the names of models and servers.

    Raises:
        ConfigurationError: ``report`` is not named ``.html`` or cannot be written, or ``progress_seconds`` is
            negative.
    """
    return Watch(report, progress_seconds=progress_seconds, title=title)


class Watch:
    """What `watch` gives, with what only the library's own commands say.

    Args:
        note: as `Picture` takes it.
        is_transient: the picture is erased in the end.

    Attributes:
        history: of the run so far; to be read when the context has ended.
        facts: rows of the report's summary besides those of the requests: name, value, remark.
    """

    def __init__(
        self,
        report: str | os.PathLike[str] | None = None,
        *,
        progress_seconds: float,
        title: str = "",
        note: Callable[[], str] = str,
        is_transient: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        if not progress_seconds >= 0:
            raise ConfigurationError(f"progress_seconds must be 0 or more, not {progress_seconds!r}")
        if report is not None and Path(report).suffix.lower() not in (".html", ".htm"):
            # Nobody who gives another file's name wants it to be overwritten.
            raise ConfigurationError(
                f"the report is a web page: name it FILE.html, not {os.fspath(report)!r}"
            )
        self.history = History()
        self.facts: list[tuple[str, str, str]] = []
        self._report_path = Path(report) if report is not None else None
        self._progress_seconds = progress_seconds
        self._title = title
        self._note = note
        self._is_transient = is_transient
        self._stream = stream
        self._picture: Picture | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beam_triton-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._began_at = datetime.now(timezone.utc)
        if self._report_path is not None:
            try:
                self._write_report("running")
            except OSError as error:
                raise ConfigurationError(
                    f"the report {self._report_path} cannot be written: {error}"
                ) from error
        self._stream = self._stream or sys.stderr
        self._sampler = Sampler(time.monotonic())
        self.history = self._sampler.history
        self._may_draw = self._progress_seconds > 0 and _drawing.acquire(blocking=False)
        try:
            if self._may_draw and can_draw(self._stream):
                self._picture = Picture(
                    self.history,
                    self._stream,
                    title=self._title,
                    note=self._note,
                    is_transient=self._is_transient,
                )
                self._picture.start()
            self._thread.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._ended.set()
            self._thread.join()
            with _harmless("the end of this run is not watched"):
                self._sampler.sample(time.monotonic())
        finally:
            self._end()
        if self._report_path is not None:
            try:
                self._write_report("finished" if error is None else _outcome(error))
            except OSError as refusal:
                _logger.error("the report %s could not be written: %s", self._report_path, refusal)

    def _end(self) -> None:
        self._sampler.close()
        try:
            if self._picture is not None:
                with _harmless("the picture of this run could not be ended"):
                    self._picture.stop()
        finally:
            if self._may_draw:
                _drawing.release()

    def _run(self) -> None:
        line_at = report_at = time.monotonic()
        line_at += self._progress_seconds
        report_at += _REPORT_SECONDS
        with _harmless("this run is not watched any more"):
            while not self._ended.wait(SAMPLE_SECONDS):
                now = time.monotonic()
                self._sampler.sample(now)
                if self._picture is not None:
                    self._picture.refresh()
                elif self._may_draw and now >= line_at:
                    line_at = now + self._progress_seconds
                    print(line(self.history), file=self._stream, flush=True)
                if self._report_path is not None and now >= report_at:
                    report_at = now + _REPORT_SECONDS
                    self._write_report("running")
        # Nobody would empty it.
        self._sampler.close()

    def _write_report(self, outcome: str) -> None:
        assert self._report_path is not None
        report = Report(
            history=self.history,
            title=self._title,
            began_at=self._began_at,
            outcome=outcome,
            facts=self.facts,
        )
        beside = self._report_path.with_name(f".{self._report_path.name}.part")
        try:
            # Messages may hold lone surrogates, which UTF-8 lacks.
            beside.write_text(report_html(report), encoding="utf-8", errors="backslashreplace")
            os.replace(beside, self._report_path)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _harmless(message: str) -> Iterator[None]:
    """A context whose error is only logged: the job is worth more than its picture."""
    try:
        yield
    except Exception:
        _logger.warning(message, exc_info=True)


def _outcome(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # Runners wrap a worker's error in pages of traceback, which ends with it.
    lines = [text for text in str(error).splitlines() if text.strip()]
    return f"failed: {lines[-1] if lines else type(error).__name__}"
