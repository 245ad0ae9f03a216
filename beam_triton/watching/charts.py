"""Line charts over time as inline SVG.

Our own few lines: a report that opens without a network must hold its charts, and the libraries that draw
interactive ones are one to four megabytes of script each. The colours come from the page's style, which knows
dark and light.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from beam_triton.watching.units import duration, number

WIDTH, HEIGHT = 560, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 24

_TICKS = 4
_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: in the legend.
        colour: number of a colour of the page's style.
        values: one for each time of the chart; None makes a gap.
        kind: ``line``, ``area``, ``dashed``, ``band``, which lies between ``lows`` and ``values``, or
            ``marks``: a short stroke at the bottom wherever the value is not 0.
    """

    name: str
    colour: int
    values: Values
    kind: str = "line"
    lows: Values = ()


@dataclass(frozen=True)
class Chart:
    """Lines over ``times`` (seconds since the beginning of a run of ``seconds``).

    ``unit`` is how values are written: ``number``, ``rate`` or ``duration``. On a logarithmic scale, one slow
    answer leaves the others their height.
    """

    title: str
    unit: str
    times: Sequence[float]
    seconds: float
    series: Sequence[Series]
    is_logarithmic: bool = False

    def svg(self) -> str:
        """The drawing, with words for those who cannot see it."""
        values = [v for each in self.series if each.kind != "marks" for v in each.values if v is not None]
        if self.is_logarithmic:
            ticks = _logarithmic_ticks([value for value in values if value > 0])
        else:
            ticks = _nice_ticks(max(values, default=0.0))
        bottom, top = ticks[0], ticks[-1]
        bottom_y = HEIGHT - BOTTOM

        def x(time: float) -> float:
            return LEFT + (WIDTH - LEFT - RIGHT) * time / (self.seconds or 1)

        def y(value: float) -> float:
            share = value / top
            if self.is_logarithmic:
                share = math.log(max(value, bottom) / bottom) / math.log(top / bottom)
            return bottom_y - (bottom_y - TOP) * share

        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self._words())}">',
        ]
        for tick in ticks:
            at = y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            # The title says that a rate is one.
            label = html.escape(WRITTEN["number" if self.unit == "rate" else self.unit](tick))
            parts.append(f'<text x="{LEFT - 8}" y="{at + 3.5:.1f}" text-anchor="end">{label}</text>')
        for seconds, label in _time_ticks(self.seconds):
            at = x(seconds)
            anchor = "start" if seconds == 0 else "end" if at > WIDTH - RIGHT - 14 else "middle"
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{label}</text>')
        has_values = False
        for each in self.series:
            for run in _runs(self.times, each):
                has_values = True
                if each.kind == "marks":
                    strokes = "".join(f"M{x(time):.1f} {bottom_y}v-7" for time, value, _ in run if value)
                    parts.append(f'<path class="line c{each.colour}" d="{strokes}"/>')
                    continue
                points = [(x(time), y(value)) for time, value, _ in run]
                if each.kind == "band":
                    lows = [(x(time), y(low)) for time, _, low in reversed(run)]
                    parts.append(_path([*points, *lows], f"fill c{each.colour}", closed=True))
                    continue
                if each.kind == "area":
                    under = [*points, (points[-1][0], bottom_y), (points[0][0], bottom_y)]
                    parts.append(_path(under, f"fill c{each.colour}", closed=True))
                if len(points) == 1:
                    # A line needs two points to be seen.
                    points = [(points[0][0] - 1, points[0][1]), (points[0][0] + 1, points[0][1])]
                dashed = " dashed" if each.kind == "dashed" else ""
                parts.append(_path(points, f"line c{each.colour}{dashed}"))
        if not has_values:
            middle = (LEFT + WIDTH - RIGHT) / 2
            parts.append(
                f'<text class="none" x="{middle}" y="{HEIGHT / 2}" text-anchor="middle">not seen</text>'
            )
        parts.append(f'<line class="cursor" y1="{TOP}" y2="{bottom_y}" x1="0" x2="0"/></svg>')
        return "".join(parts)

    def _words(self) -> str:
        said = []
        for each in self.series:
            known = [value for value in each.values if value is not None]
            if known:
                write = WRITTEN[self.unit]
                mean, highest = write(sum(known) / len(known)), write(max(known))
                said.append(f"{each.name}: {mean} on average, {highest} at most")
        return f"{self.title}. {'; '.join(said) or 'nothing seen'}"


WRITTEN: dict[str, Callable[[float], str]] = {
    "number": number,
    "rate": lambda value: f"{number(value)}/s",
    "duration": lambda value: duration(value) if value else "0",
}


def _nice_ticks(highest: float) -> list[float]:
    """From 0 to no less than ``highest``, in steps that people count in."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / _TICKS
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [step * index for index in range(math.ceil(highest / step * 0.999) + 1)]


def _logarithmic_ticks(values: Sequence[float]) -> list[float]:
    """Around the values, at 1, 2 and 5 of each power of ten, or of the powers alone where these are many."""
    if not values:
        return [0.001, 1.0]
    lowest, highest = min(values), max(values)
    powers = range(math.floor(math.log10(lowest)) - 1, math.ceil(math.log10(highest)) + 1)
    for factors in ((1, 2, 5), (1,)):
        steps = [10.0**power * factor for power in powers for factor in factors]
        first = max(index for index, step in enumerate(steps) if step <= lowest)
        last = min(index for index, step in enumerate(steps) if step >= highest)
        ticks = steps[first : max(last, first + 1) + 1]
        if len(ticks) <= _TICKS + 2:
            break
    return ticks


def _time_ticks(seconds: float) -> list[tuple[float, str]]:
    step = next((each for each in _TIME_STEPS if seconds / each <= 7), 86400 * math.ceil(seconds / 604800))
    ticks = [float(step * index) for index in range(int(seconds // step) + 1)]
    return [(tick, _time_label(tick, step)) for tick in ticks]


def _time_label(seconds: float, step: float) -> str:
    if seconds == 0:
        return "0"
    if step < 60:
        minutes, rest = divmod(int(seconds), 60)
        return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
    if step < 3600:
        hours, minutes = divmod(int(seconds // 60), 60)
        return f"{hours}:{minutes:02} h" if hours else f"{minutes} min"
    return f"{seconds / 3600:g} h"


def _runs(times: Sequence[float], series: Series) -> list[list[tuple[float, float, float]]]:
    """The points of a series, a list for each part without gaps."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for index, (time, value) in enumerate(zip(times, series.values, strict=True)):
        low = series.lows[index] if series.lows else 0.0
        if value is None or low is None:
            runs.append([])
        else:
            runs[-1].append((time, value, low))
    return [run for run in runs if run]


def _path(points: Sequence[tuple[float, float]], style: str, *, closed: bool = False) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{style}" d="M{path}{"Z" if closed else ""}"/>'
