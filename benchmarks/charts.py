"""Charts of results, as SVG: bars for peers, curves for sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.peers import BEAM_TRITON
from benchmarks.results import CaseResult, Curves, Figure, Point

_OURS, _OTHERS, _REQUIRED = "#1f6feb", "#8c959f", "#cf222e"
_CURVES = ("#1f6feb", "#1a7f37", "#bf8700", "#8250df", "#57606a", "#cf222e")
_STYLE = {
    "svg.hashsalt": "beam_triton",  # the same results give the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "figure.facecolor": "white",
    "legend.frameon": False,
}
_WIDTH_INCHES = 7.5


def draw(results: Sequence[CaseResult], folder: Path) -> list[Path]:
    """Write ``benchmark_<case>.svg`` for bars, ``benchmark_<curves>.svg`` for curves; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with pyplot.rc_context(_STYLE):  # type: ignore[arg-type]
        for result in results:
            if result.chosen is not None:
                written.append(_save(_bars(result, result.chosen), folder, result.case))
            written += [_save(_lines(curves), folder, curves.name) for curves in result.curves]
        figures = [
            (result.case, figure)
            for result in results
            if not result.is_of_defaults
            for figure in result.figures
        ]
        if figures:
            written.append(_save(_summary(figures), folder, "figures"))
    return written


def _bars(result: CaseResult, quantity: str) -> Any:
    """A bar for each peer, the longest on top, with the range over the rounds."""
    bars = [(row.name, row.measured[quantity]) for row in result.rows if quantity in row.measured]
    bars.sort(key=lambda bar: bar[1].median)
    names, summaries = zip(*bars, strict=True)
    medians = [summary.median for summary in summaries]
    colours = [_OURS if name.startswith(BEAM_TRITON.name) else _OTHERS for name in names]
    figure, axes = pyplot.subplots(figsize=(_WIDTH_INCHES, 0.9 + 0.42 * len(bars)), layout="constrained")
    below = [summary.median - summary.minimum for summary in summaries]
    above = [summary.maximum - summary.median for summary in summaries]
    axes.barh(
        names,
        medians,
        xerr=(below, above),
        color=colours,
        height=0.66,
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#24292f"},
    )
    end = max(summary.maximum for summary in summaries)
    for position, (median, summary) in enumerate(zip(medians, summaries, strict=True)):
        text = f"{median:.3g}" if median < 100 else f"{median:,.0f}"
        axes.text(summary.maximum + end * 0.012, position, text, va="center", fontsize=9)
    axes.set_xlim(0, end * 1.13)
    axes.set_xlabel(quantity)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(result.title, loc="left")
    return figure


def _lines(curves: Curves) -> Any:
    """A line for each setting; filled dots mark the defaults, rings the best at each ``x``."""
    figure, axes = pyplot.subplots(figsize=(_WIDTH_INCHES, 4), layout="constrained")
    settings = list(dict.fromkeys(point.setting for point in curves.points))
    for setting, colour in zip(settings, _CURVES * len(settings), strict=False):
        points = [point for point in curves.points if point.setting == setting]
        are_defaults = all(point.is_default for point in points)
        axes.plot(
            [point.x for point in points],
            [point.y for point in points],
            color=colour,
            label=setting,
            linewidth=2.6 if are_defaults else 1.4,
            marker="" if len(points) > 40 else ".",
        )
    defaults = [point for point in curves.points if point.is_default]
    if defaults:
        _mark(axes, defaults, "defaults' own point", face="#24292f", size=30)
        _mark(axes, _best(curves.points), "best", face="none", size=110)
    if curves.logarithmic_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({point.x for point in curves.points})
        axes.set_xticks(ticks, [_tick(x, curves.x_label) for x in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
    if curves.logarithmic_y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if curves.y_start is not None:
        axes.set_ylim(bottom=curves.y_start)
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_xlabel(curves.x_label)
    axes.set_ylabel(curves.y_label)
    axes.set_title(curves.title, loc="left")
    if len(settings) > 1 or defaults:
        axes.legend(fontsize=9)
    return figure


def _mark(axes: Any, points: Sequence[Point], label: str, *, face: str, size: int) -> None:
    axes.scatter(
        [point.x for point in points],
        [point.y for point in points],
        s=size,
        marker="o",
        facecolors=face,
        edgecolors="#24292f",
        linewidths=1.2,
        zorder=3,
        label=label,
    )


def _best(points: Sequence[Point]) -> list[Point]:
    """The best setting at each ``x``, or the best ``x`` of each curve where ``x`` is itself the setting."""
    along_curves = len({point.setting for point in points if point.is_default}) > 1
    groups: dict[object, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting if along_curves else point.x, []).append(point)
    return [max(group, key=lambda point: point.y) for group in groups.values()]


def _summary(figures: Sequence[tuple[str, Figure]]) -> Any:
    """Each figure's margin over what is required, as a factor: right of the line it is reached."""
    margins = [
        figure.reached / figure.required
        if figure.relation == "at least"
        else figure.required / max(figure.reached, figure.required / 100)
        for _, figure in figures
    ]
    names = [f"{case}: {figure.text}" for case, figure in figures]
    chart, axes = pyplot.subplots(
        figsize=(_WIDTH_INCHES * 1.4, 0.9 + 0.24 * len(names)), layout="constrained"
    )
    positions = range(len(names), 0, -1)
    colours = [_OURS if margin >= 1 else _REQUIRED for margin in margins]
    axes.barh(positions, [margin - 1 for margin in margins], left=1, color=colours, height=0.6)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_xscale("log", base=2)
    low, high = min(*margins, 0.7), max(*margins, 1.4)
    axes.set_xlim(low / 1.1, high * 1.1)
    axes.axvline(1, color="#24292f", linewidth=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("Figures reached (right of the line) and missed", loc="left")
    return chart


def _save(figure: Any, folder: Path, name: str) -> Path:
    path = folder / f"benchmark_{name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return path


def _short(value: float, _: object) -> str:
    """1,500 as 1.5 k."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:g}"


def _tick(x: float, x_label: str) -> str:
    """The label of a tick on a logarithmic axis; bytes in binary units."""
    if not x_label.startswith("bytes"):
        return f"{x:,.0f}"
    for limit, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if x >= limit:
            return f"{x / limit:.0f} {unit}"
    return f"{x:.0f} B"
