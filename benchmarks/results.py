"""What a case gives: measurements of each peer, the figures that they reach, and both as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

Relation = Literal["at least", "at most"]

_PACKAGES = ("apache-beam", "numpy", "requests", "urllib3", "tritonclient", "geventhttpclient", "grpcio")


@dataclass(frozen=True)
class Row:
    """A peer's, or a setting's, measurements: the quantity, with its unit, to one value a round."""

    name: str
    measured: Mapping[str, Sequence[float]]

    def median(self, quantity: str) -> float:
        return statistics.median(self.measured[quantity])


@dataclass(frozen=True)
class Figure:
    """A figure that is to be reached, and the one that was."""

    text: str
    relation: Relation
    required: float
    reached: float

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
    """Measurements as something grows; ``y_start`` None lets the axis begin where the values do."""

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
    """What one case measured. ``chosen`` is the quantity that its bar chart shows, None for no such chart."""

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
        """Its figures are about the defaults, which its curves mark."""
        return any(point.is_default for curves in self.curves for point in curves.points)

    def write(self, folder: Path) -> Path:
        """Write ``<case>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.case}.json"
        text = json.dumps(_rounded(asdict(self)), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path


def read_results(folder: Path) -> list[CaseResult]:
    """The results of a folder, by the names of their files."""
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> CaseResult:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["rows"] = [Row(**row) for row in data["rows"]]
    data["figures"] = [Figure(**figure) for figure in data["figures"]]
    data["curves"] = [
        Curves(**{**curves, "points": [Point(**point) for point in curves["points"]]})
        for curves in data["curves"]
    ]
    return CaseResult(**data)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds of the ratio within each: a machine that slows down slows both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


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
