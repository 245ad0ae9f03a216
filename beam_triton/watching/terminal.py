"""The picture on a terminal, a few lines that are drawn again in place, and the lines where there is none."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from beam_triton.watching.history import SAMPLE_SECONDS, History, Sample, spread
from beam_triton.watching.units import clock, duration, number

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*%#"

# A course shows the whole run at first, and its last minute from then on.
_SHOWN_SECONDS = (15.0, 30.0, 60.0)
# What a rate or a percentile is taken over: steady enough to be read.
_RATE_SECONDS = 3.0
_LATENCY_SECONDS = 10.0

_MOST_WIDTH = 100
_LABEL_WIDTH, _VALUE_WIDTH = 11, 9
# Of the courses; the text behind them, which comes after three spaces, has what is left.
_MOST_CELLS, _LEAST_CELLS, _TEXT_WIDTH = 40, 8, 34


def can_draw(stream: TextIO) -> bool:
    """Whether a picture may be drawn: on a terminal that can move its cursor, with rich installed."""
    if not stream.isatty() or os.environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        return False
    try:
        import rich.live  # noqa: F401
    except ImportError:
        return False
    return True


class Picture:
    """The picture of a history on a terminal, from `start` to `stop`.

    Lines that the process writes meanwhile, by ``print``, a log handler or a warning, scroll above it. The
    cursor stays visible, so that a process that is killed leaves nothing to mend.

    Args:
        note: says more about the elements, such as what share of the input has been read.
        is_transient: the picture is erased in the end.
    """

    def __init__(
        self,
        history: History,
        stream: TextIO,
        *,
        title: str = "",
        note: Callable[[], str] = str,
        is_transient: bool = False,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._history = history
        self._title = title
        self._note = note
        self._console = Console(file=stream, highlight=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=is_transient,
            vertical_overflow="crop",
            # Or else what is written to a file would end on the terminal.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._streams: dict[Any, TextIO] = {}

    def start(self) -> None:
        before = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._live.start()
        self._console.show_cursor(True)
        for name, stream in before.items():
            if getattr(sys, name) is not stream:
                self._streams[stream] = getattr(sys, name)
        # They hold the stream of the time when they were made, and would write into the picture.
        for handler in _stream_handlers():
            if handler.stream in self._streams:
                handler.setStream(self._streams[handler.stream])

    def refresh(self) -> None:
        """Draw the history as it is now."""
        self._live.update(self._drawn(), refresh=True)

    def stop(self) -> None:
        """Draw a last time, and leave the terminal as it was."""
        try:
            self._live.update(self._drawn())
        finally:
            self._live.stop()
            originals = {proxy: stream for stream, proxy in self._streams.items()}
            for handler in _stream_handlers():
                if handler.stream in originals:
                    handler.setStream(originals[handler.stream])

    def _drawn(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        history, console = self._history, self._console
        width = console.width
        left = width - _LABEL_WIDTH - _VALUE_WIDTH - _TEXT_WIDTH - 3
        cells = min(max(left, _LEAST_CELLS), _MOST_CELLS)
        blocks = _ASCII_BLOCKS if console.options.ascii_only else _BLOCKS
        seconds = history.total.seconds
        shown = next((each for each in _SHOWN_SECONDS if seconds <= each), _SHOWN_SECONDS[-1])
        samples = spread(history.recent, cells, shown, seconds)
        head = Table.grid(expand=True)
        head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            Text(_printable(self._title or headline(history)), style="bold"),
            Text(f"  {clock(seconds)}", style="dim"),
        )
        rows = Table.grid(padding=(0, 1, 0, 0), expand=True)
        rows.add_column(style="dim", no_wrap=True, width=_LABEL_WIDTH)
        rows.add_column(style="bold", no_wrap=True, width=_VALUE_WIDTH, justify="right")
        rows.add_column(no_wrap=True, width=cells)
        rows.add_column(style="dim", no_wrap=True, overflow="ellipsis", ratio=1)
        for label, value, course, colour, text in _rows(history, self._note()):
            values = [None if each is None else course(each) for each in samples] if course else []
            bar = Text(sparkline(values, blocks), style=colour)
            value_style = colour if label == "failures" else ""
            rows.add_row(label, Text(value, style=value_style), bar, Text(_printable(text)))
        # No wider than it needs to be: a terminal that is made narrower does not break its lines.
        head.width = rows.width = min(width, _MOST_WIDTH)
        return Group(head, rows)


Course = Callable[[Sample], float | None]


def _rows(history: History, note: str) -> Iterator[tuple[str, str, Course | None, str, str]]:
    """Label, value, what its course is, its colour, and the text behind."""
    total = history.total
    rate, lately = history.lately(_RATE_SECONDS), history.lately(_LATENCY_SECONDS)
    now = history.recent[-1] if history.recent else Sample()
    done = f"{total.done:,} done"
    yield (
        "elements",
        f"{number(rate.done / (rate.seconds or 1))}/s",
        lambda each: each.done / each.seconds,
        "green",
        ", ".join(filter(None, (done, note))),
    )
    waiting = f"{rate.waiting:.0f} waiting for their turn" if rate.waiting >= 1 else ""
    yield "in flight", number(rate.in_flight), lambda each: each.in_flight, "cyan", waiting
    unhealthy = f"{now.unhealthy} endpoint(s) unhealthy" if now.unhealthy else ""
    limit = "-" if now.limit is None else number(now.limit)
    yield "limit", limit, lambda each: each.limit, "red" if unhealthy else "cyan", unhealthy
    p50, p99 = lately.latency(0.5), lately.latency(0.99)
    batch = sum(k * n for k, n in lately.sizes.items()) / (sum(lately.sizes.values()) or 1)
    yield (
        "latency",
        "-" if p50 is None else duration(p50),
        lambda each: each.latency(0.5),
        "yellow",
        "" if p99 is None else f"p99 {duration(p99)}, batches of {number(batch)}",
    )
    queue = rate.queue_seconds
    yield (
        "queue",
        "-" if queue is None else duration(queue),
        lambda each: each.queue_seconds,
        "magenta",
        "in the server" if queue is not None else "",
    )
    opened = f"{number(rate.idle)} idle, {total.opened:,} opened"
    yield "connections", number(rate.active), lambda each: each.active, "blue", opened
    last = next(reversed(history.reasons), "")
    yield (
        "failures",
        f"{total.failures:,}",
        (lambda each: each.failures / each.seconds) if total.failures else None,
        "red" if total.failures else "",
        f"{last}: {history.reasons[last].message}" if last else "",
    )


def headline(history: History) -> str:
    """The models and their servers, the first of them by name."""
    servers = list(history.servers)
    if not servers:
        return "no request so far"
    return servers[0] + (f", and {len(servers) - 1} more" if len(servers) > 1 else "")


def sparkline(values: Sequence[float | None], blocks: str = _BLOCKS) -> str:
    """A character for each value, from 0 to the highest of them; a space for None."""
    highest = max((value for value in values if value is not None), default=0.0) or 1.0
    steps = len(blocks) - 1
    return "".join(
        " " if value is None else blocks[min(round(value / highest * steps), steps)] for value in values
    )


def line(history: History) -> str:
    """The history as one line, for logs."""
    rate, lately = history.lately(_LATENCY_SECONDS), history.lately(SAMPLE_SECONDS)
    total = history.total
    p50 = rate.latency(0.5)
    queue = lately.queue_seconds
    parts = [
        f"{total.seconds:5.0f} s",
        f"{total.done:>11,} elements done",
        f"{rate.done / (rate.seconds or 1):>9,.0f}/s",
        f"{number(rate.in_flight)} in flight",
        "" if lately.limit is None else f"limit {number(lately.limit)}",
        "" if p50 is None else f"p50 {duration(p50)}",
        "" if queue is None else f"server queue {duration(queue)}",
        f"{number(rate.active + rate.idle)} connections",
        f"{total.failures:,} failed" if total.failures else "",
    ]
    return "  ".join(filter(None, parts))


def _printable(text: str) -> str:
    """On one line, and without what a terminal would take for a command: servers may say anything."""
    return "".join(each if each.isprintable() else " " for each in text)


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for each in loggers if isinstance(each, logging.Logger) for handler in each.handlers]
    return [each for each in handlers if isinstance(each, logging.StreamHandler)]
