"""What a case gives: measurements of each peer, the figures that they reach, and both as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

Relation = Literal["at least", "at most"]

_PACKAGES = ("apache-beam", "numpy", "requests", "urllib3", "tritonclient", "geventhttpclient", "grpcio")
# An object or array of JSON that holds no other.
_INNERMOST = re.compile(r"\{[^{}\[\]]*\}")


@dataclass(frozen=True)
class Summary:
    """``n`` measurements of one quantity: results hold this instead of every sample."""

    n: int
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of at least one value."""
        lower, median, upper = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        )
        return cls(len(values), min(values), lower, median, upper, max(values))


@dataclass(frozen=True)
class Row:
    """A peer's, or a setting's, measurements: from the quantity, with its unit, to its summary."""

    name: str
    measured: Mapping[str, Summary]

    @classmethod
    def of(cls, name: str, values: Mapping[str, Sequence[float]]) -> Row:
        """Summarise each quantity's values, usually one a round."""
        return cls(name, {quantity: Summary.of(taken) for quantity, taken in values.items()})


@dataclass(frozen=True)
class Figure:
    """A required figure and the one reached.

    ``rounds`` summarises the values that ``reached`` is the median of, where it is a median.
    """

    text: str
    relation: Relation
    required: float
    reached: float
    rounds: Summary | None = None

    @classmethod
    def of_rounds(cls, text: str, relation: Relation, required: float, values: Sequence[float]) -> Figure:
        """A figure that is reached by the median of ``values``, such as those of `ratios`."""
        summary = Summary.of(values)
        return cls(text, relation, required, summary.median, summary)

    @property
    def holds(self) -> bool:
        if self.relation == "at least":
            return self.reached >= self.required
        return self.reached <= self.required


@dataclass(frozen=True)
class Point:
    """What a setting reached at ``x``; ``is_default`` marks the library's own defaults."""

    x: float
    setting: str
    y: float
    is_default: bool = False


@dataclass(frozen=True)
class Curves:
    """Measurements over a growing ``x``; with ``y_start`` None the axis begins at the lowest value."""

    name: str
    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]
    logarithmic_x: bool = True
    logarithmic_y: bool = True
    y_start: float | None = None


@dataclass(frozen=True)
class CaseResult:
    """What one case measured. ``chosen`` is the quantity of its bar chart; None draws no bar chart."""

    case: str
    title: str
    rows: Sequence[Row] = ()
    figures: Sequence[Figure] = ()
    curves: Sequence[Curves] = ()
    notes: Sequence[str] = ()
    chosen: str | None = None
    rounds: int = 1
    machine: Mapping[str, str] = field(default_factory=lambda: machine())

    @property
    def is_of_defaults(self) -> bool:
        """Its figures compare the library's defaults, marked on its curves, with other settings."""
        return any(point.is_default for curves in self.curves for point in curves.points)

    def write(self, folder: Path) -> Path:
        """Write ``<case>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.case}.json"
        text = json.dumps(_rounded(asdict(self)), indent=1, ensure_ascii=False)
        # A line for each summary, figure and point keeps files short and their differences readable.
        text = _INNERMOST.sub(lambda match: re.sub(r"\n\s*", " ", match[0]), text)
        path.write_text(text + "\n", encoding="utf-8")
        return path


def read_results(folder: Path) -> list[CaseResult]:
    """The results of a folder, by the names of their files."""
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> CaseResult:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["rows"] = [
        Row(row["name"], {quantity: Summary(**taken) for quantity, taken in row["measured"].items()})
        for row in data["rows"]
    ]
    data["figures"] = [_figure(figure) for figure in data["figures"]]
    data["curves"] = [
        Curves(**{**curves, "points": [Point(**point) for point in curves["points"]]})
        for curves in data["curves"]
    ]
    return CaseResult(**data)


def _figure(data: dict[str, Any]) -> Figure:
    rounds = data.pop("rounds")
    return Figure(**data, rounds=Summary(**rounds) if rounds else None)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio within each round: a machine that slows down slows both."""
    return [a / b for a, b in zip(above, below, strict=True)]


def machine() -> dict[str, str]:
    """Where this was measured."""
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "processor": _processor(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _rounded(value: object) -> object:
    """Five significant digits: more would be noise, and make every run's file differ in every line."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else value
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
