"""The shipped digits and the classifier that is trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.train_digits import DATA, WEIGHTS, Classifier, Digits, accuracy, read_digits, train


@pytest.fixture(scope="module")
def training() -> Digits:
    """The rows to learn from."""
    return read_digits(DATA, "train")


@pytest.fixture(scope="module")
def held_out() -> Digits:
    """The rows to measure on."""
    return read_digits(DATA, "test")


@pytest.fixture(scope="module")
def classifier(training: Digits) -> Classifier:
    """What the training makes of them."""
    return train(training)


def test_the_data_is_whole(training: Digits, held_out: Digits) -> None:
    """1,797 images of 64 pixels between 0 and 16, in two halves that share no image."""
    assert (len(training.digits), len(held_out.digits)) == (899, 898)
    for split in (training, held_out):
        assert split.images.shape == (len(split.digits), 64)
        assert split.images.max() == 16
        assert set(split.digits.tolist()) == set(range(10))
    assert not {image.tobytes() for image in training.images} & {image.tobytes() for image in held_out.images}


def test_held_out_accuracy(classifier: Classifier, held_out: Digits) -> None:
    """The classifier is right on more than 96 % of what it has never seen."""
    assert accuracy(classifier, held_out) > 0.96


def test_probabilities(classifier: Classifier, held_out: Digits) -> None:
    """Each row of probabilities sums to one, and a confident one is mostly right."""
    probabilities = classifier.probabilities(held_out.images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    confident = probabilities.max(axis=1) > 0.9
    assert (probabilities.argmax(axis=1) == held_out.digits)[confident].mean() > 0.98


def test_the_shipped_weights_are_the_trained_ones(classifier: Classifier, tmp_path: Path) -> None:
    """Whoever runs the training gets the weights that the demo serves."""
    classifier.save(tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as trained, np.load(WEIGHTS) as shipped:
        assert set(trained) == set(shipped)
        for name in trained:
            # Linear algebra libraries differ in the last digits.
            np.testing.assert_allclose(trained[name], shipped[name], rtol=1e-3, atol=1e-4)
