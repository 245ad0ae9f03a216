"""A picture of scored digits: a sample of each digit, the model's errors, and its confidence."""

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
_CORRECT = "#5b6b7f"
_ERROR = "#d62839"
_PAPER = "#fbfaf7"


@dataclass(frozen=True)
class ScoredDigit:
    """``image`` is 8 x 8, 0 (white) to 16 (black); ``confidence`` is the predicted digit's probability."""

    image: NDArray[Any]
    expected: int
    predicted: int
    confidence: float

    @property
    def is_right(self) -> bool:
        return self.expected == self.predicted


def accuracy(digits: Sequence[ScoredDigit]) -> float:
    """The share of digits predicted correctly; 0 for an empty sequence."""
    return sum(digit.is_right for digit in digits) / len(digits) if digits else 0.0


def sample(digits: Sequence[ScoredDigit], expected: int, count: int) -> list[ScoredDigit]:
    """At most ``count`` images of one digit: as many errors as fit, and correct ones of every confidence.

    The errors come last, the least confident first.
    """
    images = [digit for digit in digits if digit.expected == expected]
    errors = sorted((digit for digit in images if not digit.is_right), key=lambda digit: digit.confidence)
    correct = sorted((digit for digit in images if digit.is_right), key=lambda digit: -digit.confidence)
    errors = errors[:count]
    wanted = min(count - len(errors), len(correct))
    indices = np.linspace(0, len(correct) - 1, wanted).round().astype(int) if wanted else []
    return [*(correct[index] for index in indices), *errors]


def draw(digits: Sequence[ScoredDigit], path: Path, *, title: str) -> None:
    """Write the picture as PNG to ``path``, whose folder is made if need be.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigurationError("the picture needs matplotlib: pip install 'beam-triton[demo]'") from error
    # Agg writes files only, so it needs no display.
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")

    figure = pyplot.figure(figsize=(15, 9.2), facecolor=_PAPER)
    figure.text(0.035, 0.945, title, fontsize=21, color=_INK, weight="bold", va="center")
    errors = sum(not digit.is_right for digit in digits)
    subtitle = (
        f"{len(digits)} handwritten digits that the model was not trained on: {accuracy(digits):.1%} correct"
    )
    figure.text(0.035, 0.905, subtitle, fontsize=13, color=_CORRECT, va="center")
    _draw_grid(figure, digits)
    _draw_confusion(figure, digits)
    _draw_confidence(figure, digits)
    legend = "below each digit: the model's prediction and its confidence.  "
    figure.text(0.035, 0.03, legend, fontsize=10, color=_CORRECT)
    figure.text(0.32, 0.03, f"red: one of its {errors} errors", fontsize=10, color=_ERROR, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor=_PAPER)
    pyplot.close(figure)


def _draw_grid(figure: Any, digits: Sequence[ScoredDigit]) -> None:
    # One pair of axes for all: with a pair for each digit matplotlib takes seconds.
    axes = figure.add_axes((0.03, 0.065, 0.6, 0.815))
    axes.axis("off")
    rectangle = importlib.import_module("matplotlib.patches").Rectangle
    # In inches: a cell, and the side of its image; the rest of the cell's height holds the caption.
    width, height = 9.0 / _COLUMNS, 9.2 * 0.815 / 10
    side = 0.57
    across, down = side / width, side / height
    for kind in range(10):
        for column, digit in enumerate(sample(digits, kind, _COLUMNS)):
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
                    edgecolor="#dcd8cf" if digit.is_right else _ERROR,
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
                color=_CORRECT if digit.is_right else _ERROR,
                weight="normal" if digit.is_right else "bold",
            )
    # imshow has set the limits to the last image.
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
            is_diagonal = expected == predicted
            axes.text(
                predicted,
                expected,
                str(count),
                ha="center",
                va="center",
                fontsize=9.5,
                color=_CORRECT if is_diagonal else _INK,
                weight="normal" if is_diagonal else "bold",
            )
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axes.set_xlabel("predicted", color=_INK, fontsize=10)
    axes.set_ylabel("actual", color=_INK, fontsize=10)
    axes.set_title("confusion matrix", color=_INK, fontsize=12, loc="left", pad=8)
    for spine in axes.spines.values():
        spine.set_color("#dcd8cf")


def _draw_confidence(figure: Any, digits: Sequence[ScoredDigit]) -> None:
    axes = figure.add_axes((0.685, 0.1, 0.275, 0.245), facecolor=_PAPER)
    edges = np.linspace(0, 1, 21)
    correct = [digit.confidence for digit in digits if digit.is_right]
    errors = [digit.confidence for digit in digits if not digit.is_right]
    colours = ["#9fb3c8", _ERROR]
    axes.hist([correct, errors], bins=edges, stacked=True, color=colours, label=["correct", "errors"])
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    ticks = [tick for tick in (0, 5, 10, 100, 1000) if tick <= max(len(digits), 10)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.minorticks_off()
    axes.tick_params(labelsize=9, labelcolor=_INK, color="#dcd8cf")
    axes.set_xlabel("confidence", color=_INK, fontsize=10)
    axes.set_title("digits by confidence", color=_INK, fontsize=12, loc="left", pad=8)
    axes.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#dcd8cf")
