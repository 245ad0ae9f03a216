"""The shipped digits and the classifier trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.train_digits import DATA, WEIGHTS, Classifier, Digits, accuracy, read_digits, train


@pytest.fixture(scope="module")
def training() -> Digits:
    """The training rows."""
    return read_digits(DATA, "train")


@pytest.fixture(scope="module")
def held_out() -> Digits:
    """The test rows."""
    return read_digits(DATA, "test")


@pytest.fixture(scope="module")
def classifier(training: Digits) -> Classifier:
    """The classifier trained on the training rows."""
    return train(training)


def test_data_is_complete_and_splits_are_disjoint(training: Digits, held_out: Digits) -> None:
    """1,797 images of 64 pixels between 0 and 16, in two splits that share no image."""
    assert (len(training.digits), len(held_out.digits)) == (899, 898)
    for split in (training, held_out):
        assert split.images.shape == (len(split.digits), 64)
        assert split.images.max() == 16
        assert set(split.digits.tolist()) == set(range(10))
    assert not {image.tobytes() for image in training.images} & {image.tobytes() for image in held_out.images}


def test_accuracy_on_held_out_rows(classifier: Classifier, held_out: Digits) -> None:
    """The classifier is correct on more than 96 % of the rows that it was not trained on."""
    assert accuracy(classifier, held_out) > 0.96


def test_probabilities_sum_to_one_and_high_ones_are_correct(classifier: Classifier, held_out: Digits) -> None:
    """Predictions of more than 90 % confidence are correct in more than 98 % of cases."""
    probabilities = classifier.probabilities(held_out.images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    confident = probabilities.max(axis=1) > 0.9
    assert (probabilities.argmax(axis=1) == held_out.digits)[confident].mean() > 0.98


def test_training_reproduces_the_shipped_weights(classifier: Classifier, tmp_path: Path) -> None:
    """Training gives the weights that the demo serves."""
    classifier.save(tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as trained, np.load(WEIGHTS) as shipped:
        assert set(trained) == set(shipped)
        for name in trained:
            # Linear algebra libraries differ in the last digits.
            np.testing.assert_allclose(trained[name], shipped[name], rtol=1e-3, atol=1e-4)
