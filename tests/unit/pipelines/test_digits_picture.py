"""The picture of the digits: which are shown, and that it is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from pipelines.digits_picture import ScoredDigit, accuracy, chosen, draw


def digit(expected: int, predicted: int, confidence: float) -> ScoredDigit:
    return ScoredDigit(np.full((8, 8), expected), expected, predicted, confidence)


def test_accuracy_is_the_share_read_right() -> None:
    """Of none it is 0, not an error."""
    assert accuracy([digit(1, 1, 0.9), digit(1, 7, 0.5), digit(2, 2, 1.0), digit(3, 3, 1.0)]) == 0.75
    assert accuracy([]) == 0.0


def test_errors_are_shown_before_anything_else() -> None:
    """Right digits of every confidence fill what the wrong ones leave, and the wrong ones stand last."""
    right = [digit(4, 4, confidence / 100) for confidence in range(50, 100)]
    wrong = [digit(4, 9, 0.9), digit(4, 9, 0.6)]
    shown = chosen([*right, *wrong, digit(5, 5, 1.0)], 4, 5)
    assert [(item.predicted, item.confidence) for item in shown] == [
        (4, 0.99),
        (4, pytest.approx(0.75, abs=0.02)),
        (4, 0.5),
        (9, 0.6),
        (9, 0.9),
    ]
    assert len(chosen(wrong * 10, 4, 5)) == 5
    assert chosen([], 4, 5) == []


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    """A PNG of a size to look at, in a folder made for it."""
    digits = [digit(kind, kind if number else 0, number / 10) for kind in range(10) for number in range(10)]
    path = tmp_path / "new" / "digits.png"
    draw(digits, path, title="Digits")
    height, width, _ = imread(path).shape
    assert width > 1200
    assert height > 800
