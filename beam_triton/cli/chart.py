"""A picture of what was measured: elements a second over the p99 latency, a line for each batch size."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beam_triton.cli.load import Measurement
from beam_triton.cli.search import Goal
from beam_triton.errors import ConfigurationError

_SUFFIXES = (".svg", ".png", ".pdf")


def check_chart(path: str) -> None:
    """Whether a chart can be drawn into that file, before anything is measured.

    Raises:
        ConfigurationError: the name's suffix is of no format, there is no such folder, or matplotlib is not
            installed.
    """
    if Path(path).suffix not in _SUFFIXES:
        raise ConfigurationError(f"--chart {path}: the name must end in {', '.join(_SUFFIXES)}")
    if not Path(path).parent.is_dir():
        raise ConfigurationError(f"--chart {path}: there is no folder {Path(path).parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--chart needs matplotlib: pip install beam-triton[charts]")


def draw(
    path: str, title: str, measured: Sequence[Measurement], chosen: Measurement | None, goal: Goal
) -> None:
    """Draw the settings that worked, with their requests in flight, the chosen one and the limit.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text in an SVG: it can be found, and reads in the reader's own font.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "beam_triton"}):
        figure = Figure(figsize=(8.0, 4.8), layout="constrained")
        axes: Any = figure.subplots()
        working = [each for each in measured if each.requests and not each.failures]
        for size in sorted({each.batch_size for each in working}):
            points = sorted((each for each in working if each.batch_size == size), key=_in_flight)
            axes.plot(
                [_p99_milliseconds(each) for each in points],
                [each.elements_per_second for each in points],
                marker="o",
                markersize=5,
                label=f"{size:,}",
            )
            for each in points:
                axes.annotate(
                    f"{each.in_flight}",
                    (_p99_milliseconds(each), each.elements_per_second),
                    xytext=(5, -11),
                    textcoords="offset points",
                    fontsize=7,
                )
        if chosen is not None:
            axes.plot(
                [_p99_milliseconds(chosen)],
                [chosen.elements_per_second],
                marker="o",
                markersize=14,
                markerfacecolor="none",
                markeredgecolor="#24292f",
                linestyle="none",
                label="recommended",
            )
        if not math.isinf(goal.p99_seconds):
            axes.axvline(goal.p99_seconds * 1000, color="#cf222e", linestyle="--", linewidth=1, label="limit")
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("p99 latency, ms (numbers: requests in flight)")
        axes.set_ylabel("elements a second")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        if working:
            axes.legend(title="elements a request", fontsize=8, title_fontsize=8)
        try:
            figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
        except OSError as error:
            raise ConfigurationError(f"--chart {path}: {error.strerror}") from None


def _in_flight(found: Measurement) -> int:
    return found.in_flight


def _p99_milliseconds(found: Measurement) -> float:
    return 1000 * found.latency_seconds(0.99)
