"""A picture of scored digits: what was written, what the model read, and where it was wrong."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beam_triton import ConfigurationError

_COLUMNS = 12
_INK = "#1b2a41"
_RIGHT = "#5b6b7f"
_WRONG = "#d62839"
_PAPER = "#fbfaf7"


@dataclass(frozen=True)
class ScoredDigit:
    """``image`` is 8 x 8, from 0 (white) to 16 (black); ``confidence`` is the predicted digit's share."""

    image: NDArray[Any]
    expected: int
    predicted: int
    confidence: float

    @property
    def is_right(self) -> bool:
        return self.expected == self.predicted


def accuracy(digits: Sequence[ScoredDigit]) -> float:
    """The share of the digits that were read right; 0 of none."""
    return sum(digit.is_right for digit in digits) / len(digits) if digits else 0.0


def chosen(digits: Sequence[ScoredDigit], expected: int, count: int) -> list[ScoredDigit]:
    """Digits to show of one kind: all the wrong ones that fit, and right ones of every confidence.

    The wrong ones stand last, least sure first among them.
    """
    of_kind = [digit for digit in digits if digit.expected == expected]
    wrong = sorted((digit for digit in of_kind if not digit.is_right), key=lambda digit: digit.confidence)
    right = sorted((digit for digit in of_kind if digit.is_right), key=lambda digit: -digit.confidence)
    wrong = wrong[:count]
    wanted = min(count - len(wrong), len(right))
    places = np.linspace(0, len(right) - 1, wanted).round().astype(int) if wanted else []
    return [*(right[place] for place in places), *wrong]


def draw(digits: Sequence[ScoredDigit], path: Path, *, title: str) -> None:
    """Write the picture as PNG. Raises ConfigurationError where matplotlib is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigurationError("the picture needs matplotlib: pip install 'beam-triton[demo]'") from error
    # The picture is written to a file: no display is needed, and none may be there.
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")

    figure = pyplot.figure(figsize=(15, 9.2), facecolor=_PAPER)
    figure.text(0.035, 0.945, title, fontsize=21, color=_INK, weight="bold", va="center")
    wrong = sum(not digit.is_right for digit in digits)
    share = f"{accuracy(digits):.1%} read right"
    subtitle = f"{len(digits)} handwritten digits that the model had not seen: {share}"
    figure.text(0.035, 0.905, subtitle, fontsize=13, color=_RIGHT, va="center")
    _draw_grid(figure, digits)
    _draw_confusion(figure, digits)
    _draw_confidence(figure, digits)
    legend = "below each digit: what the model read, and how sure it was.  "
    figure.text(0.035, 0.03, legend, fontsize=10, color=_RIGHT)
    figure.text(0.345, 0.03, f"red: one of its {wrong} errors", fontsize=10, color=_WRONG, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor=_PAPER)
    pyplot.close(figure)


def _draw_grid(figure: Any, digits: Sequence[ScoredDigit]) -> None:
    # All in one pair of axes: a pair for each digit takes matplotlib seconds.
    axes = figure.add_axes((0.03, 0.065, 0.6, 0.815))
    axes.axis("off")
    rectangle = importlib.import_module("matplotlib.patches").Rectangle
    # Inches of a tile's side; the space below it is its caption's.
    width, height = 9.0 / _COLUMNS, 9.2 * 0.815 / 10
    side = 0.57
    across, down = side / width, side / height
    for kind in range(10):
        for column, digit in enumerate(chosen(digits, kind, _COLUMNS)):
            left, top = column + (1 - across) / 2, kind + 0.02
            axes.imshow(
                digit.image,
                extent=(left, left + across, top + down, top),
                cmap="Greys",
                vmin=0,
                vmax=16,
                interpolation="bicubic",
                aspect="auto",
            )
            axes.add_patch(
                rectangle(
                    (left, top),
                    across,
                    down,
                    fill=False,
                    edgecolor="#dcd8cf" if digit.is_right else _WRONG,
                    linewidth=0.8 if digit.is_right else 2.6,
                )
            )
            axes.text(
                column + 0.5,
                top + down + 0.045,
                f"{digit.predicted}  {digit.confidence:.0%}",
                fontsize=8,
                ha="center",
                va="top",
                color=_RIGHT if digit.is_right else _WRONG,
                weight="normal" if digit.is_right else "bold",
            )
    # Each image moved the limits to itself.
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(10, 0)


def _draw_confusion(figure: Any, digits: Sequence[ScoredDigit]) -> None:
    counts = np.zeros((10, 10), dtype=int)
    for digit in digits:
        counts[digit.expected, digit.predicted] += 1
    axes = figure.add_axes((0.685, 0.435, 0.275, 0.435), anchor="NW")
    shade = np.where(np.eye(10, dtype=bool), 0.0, np.sqrt(counts / max(counts.max(), 1)))
    axes.imshow(shade, cmap="Reds", vmin=0, vmax=0.6)
    for expected in range(10):
        for predicted in range(10):
            count = counts[expected, predicted]
            if not count:
                continue
            is_right = expected == predicted
            axes.text(
                predicted,
                expected,
                str(count),
                ha="center",
                va="center",
                fontsize=9.5,
                color=_RIGHT if is_right else _INK,
                weight="normal" if is_right else "bold",
            )
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axes.set_xlabel("read as", color=_INK, fontsize=10)
    axes.set_ylabel("written as", color=_INK, fontsize=10)
    axes.set_title("what is taken for what", color=_INK, fontsize=12, loc="left", pad=8)
    for spine in axes.spines.values():
        spine.set_color("#dcd8cf")


def _draw_confidence(figure: Any, digits: Sequence[ScoredDigit]) -> None:
    axes = figure.add_axes((0.685, 0.1, 0.275, 0.245), facecolor=_PAPER)
    edges = np.linspace(0, 1, 21)
    right = [digit.confidence for digit in digits if digit.is_right]
    wrong = [digit.confidence for digit in digits if not digit.is_right]
    axes.hist([right, wrong], bins=edges, stacked=True, color=["#9fb3c8", _WRONG], label=["right", "wrong"])
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    ticks = [tick for tick in (0, 5, 10, 100, 1000) if tick <= max(len(digits), 10)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.minorticks_off()
    axes.tick_params(labelsize=9, labelcolor=_INK, color="#dcd8cf")
    axes.set_xlabel("how sure the model was", color=_INK, fontsize=10)
    axes.set_title("digits by confidence", color=_INK, fontsize=12, loc="left", pad=8)
    axes.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#dcd8cf")
