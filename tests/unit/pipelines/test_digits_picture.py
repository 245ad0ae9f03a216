"""The picture of the digits: its sample, and the PNG itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from pipelines.digits_picture import ScoredDigit, accuracy, draw, sample


def digit(expected: int, predicted: int, confidence: float) -> ScoredDigit:
    return ScoredDigit(np.full((8, 8), expected), expected, predicted, confidence)


def test_accuracy_is_the_share_of_correct_predictions() -> None:
    """It is 0 for no digits, not an error."""
    assert accuracy([digit(1, 1, 0.9), digit(1, 7, 0.5), digit(2, 2, 1.0), digit(3, 3, 1.0)]) == 0.75
    assert accuracy([]) == 0.0


def test_sample_prefers_errors_and_puts_them_last() -> None:
    """Correct digits of every confidence fill the remaining space."""
    correct = [digit(4, 4, confidence / 100) for confidence in range(50, 100)]
    errors = [digit(4, 9, 0.9), digit(4, 9, 0.6)]
    shown = sample([*correct, *errors, digit(5, 5, 1.0)], 4, 5)
    assert [(item.predicted, item.confidence) for item in shown] == [
        (4, 0.99),
        (4, pytest.approx(0.75, abs=0.02)),
        (4, 0.5),
        (9, 0.6),
        (9, 0.9),
    ]
    assert len(sample(errors * 10, 4, 5)) == 5
    assert sample([], 4, 5) == []


def test_draw_writes_a_png(tmp_path: Path) -> None:
    """The PNG is large enough to read, and its folder is created."""
    digits = [digit(kind, kind if number else 0, number / 10) for kind in range(10) for number in range(10)]
    path = tmp_path / "new" / "digits.png"
    draw(digits, path, title="Digits")
    height, width, _ = imread(path).shape
    assert width > 1200
    assert height > 800
