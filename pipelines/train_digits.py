"""Trains the classifier of handwritten digits that the demo serves, and prints its accuracy.

    python pipelines/train_digits.py

Reads ``pipelines/data/digits.csv``, trains on the rows of the split ``train``, measures on the rows of the
split ``test``, and writes ``weights.npz`` into the model repository, where the model ``digits`` reads it.

The classifier is kernel ridge regression with a Gaussian kernel, one score for each digit, and a softmax over
the scores. Its hyperparameters (the kernel's width, the ridge, the softmax's sharpness) are those with the
highest leave-one-out likelihood on the training rows, which has a closed form. The test rows only measure the
result. Training is deterministic.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

_HERE = Path(__file__).resolve().parent
DATA = _HERE / "data" / "digits.csv"
WEIGHTS = _HERE / "model_repository" / "digits" / "1" / "weights.npz"

_DARKEST_PIXEL = 16
_WIDTHS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
_RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_SHARPNESSES = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Digits:
    """``images``: uint8 [rows, 64], 0 to 16. ``digits``: int64 [rows], the digits that the images show."""

    images: NDArray[np.uint8]
    digits: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """``landmarks``: uint8 [training rows, 64]. ``coefficients``: float32 [training rows, 10]."""

    landmarks: NDArray[np.uint8]
    coefficients: NDArray[np.float32]
    width: float
    sharpness: float

    def probabilities(self, images: NDArray[np.uint8]) -> Floats:
        """float [rows, 10]; each row sums to 1."""
        return softmax(self.sharpness * (kernel(images, self.landmarks, self.width) @ self.coefficients))

    def save(self, path: Path) -> None:
        """Write the file that the served model reads."""
        np.savez_compressed(
            path,
            landmarks=self.landmarks,
            coefficients=self.coefficients,
            width=np.array(self.width),
            sharpness=np.array(self.sharpness),
        )


def read_digits(path: Path, split: str) -> Digits:
    """The rows of one split of the data file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return Digits(
        np.array([json.loads(row["image"]) for row in rows], np.uint8),
        np.array([int(row["digit"]) for row in rows], np.int64),
    )


def kernel(images: NDArray[np.uint8], landmarks: NDArray[np.uint8], width: float) -> Floats:
    """The Gaussian kernel of every image with every landmark: float [images, landmarks]."""
    a, b = images / _DARKEST_PIXEL, landmarks / _DARKEST_PIXEL
    squared_distances = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.exp(-width * squared_distances))


def softmax(scores: Floats) -> Floats:
    """Each row's scores as probabilities."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def log_likelihood(scores: Floats, digits: Integers) -> float:
    """The mean log probability that a softmax over the scores gives to the correct digit."""
    return float(np.log(softmax(scores)[np.arange(len(digits)), digits]).mean())


def train(data: Digits) -> Classifier:
    """The classifier with the hyperparameters of the highest leave-one-out likelihood."""
    targets = 2.0 * np.eye(10)[data.digits] - 1
    best_likelihood = -np.inf
    for width in _WIDTHS:
        similarities = kernel(data.images, data.images, width)
        for ridge in _RIDGES:
            inverse = np.linalg.inv(similarities + ridge * np.eye(len(targets)))
            coefficients = inverse @ targets
            # The score of each row from a training without that row.
            left_out = targets - coefficients / np.diag(inverse)[:, None]
            for sharpness in _SHARPNESSES:
                likelihood = log_likelihood(sharpness * left_out, data.digits)
                if likelihood > best_likelihood:
                    best_likelihood = likelihood
                    best = Classifier(data.images, coefficients.astype(np.float32), width, sharpness)
    return best


def accuracy(classifier: Classifier, data: Digits) -> float:
    """The share of images whose most probable digit is correct."""
    return float((classifier.probabilities(data.images).argmax(axis=1) == data.digits).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the CSV file of digits")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the file to write")
    options = parser.parse_args()
    training, held_out = (read_digits(options.data, split) for split in ("train", "test"))
    classifier = train(training)
    classifier.save(options.weights)
    print(f"trained on {len(training.digits)} digits")
    print(f"accuracy on {len(held_out.digits)} digits held out: {accuracy(classifier, held_out):.2%}")
    print(f"weights: {options.weights}")


if __name__ == "__main__":
    main()
