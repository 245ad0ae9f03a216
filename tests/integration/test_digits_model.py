"""The bundled model of handwritten digits, served by a real Triton."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as tritonclient
from numpy.typing import NDArray

from beam_triton.testing import LocalTriton
from pipelines.train_digits import DATA, Digits, read_digits

_REPOSITORY = Path(__file__).parents[2] / "pipelines" / "model_repository"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """tritonclient's own client, connected to a server with the bundled models."""
    with (
        LocalTriton(_REPOSITORY, stop_timeout_seconds=0.1) as triton,
        tritonclient.InferenceServerClient(triton.endpoint.removeprefix("http://")) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def held_out() -> Digits:
    """The digits held out from training."""
    return read_digits(DATA, "test")


def infer(client: Any, images: NDArray[Any], **options: Any) -> Any:
    """Sends one request."""
    image = tritonclient.InferInput("image", list(images.shape), "FP32")
    image.set_data_from_numpy(images.astype(np.float32))
    return client.infer("digits", [image], **options)


def test_served_model_recognizes_95_percent_of_digits(client: Any, held_out: Digits) -> None:
    """In batches of 256, at least 95 % of the held-out digits are recognized, and probabilities sum to 1."""
    right = 0
    for start in range(0, len(held_out.digits), 256):
        answer = infer(client, held_out.images[start : start + 256])
        probabilities, label = answer.as_numpy("probabilities"), answer.as_numpy("label")
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_array_equal(probabilities.argmax(axis=1), label[:, 0])
        right += int((label[:, 0] == held_out.digits[start : start + 256]).sum())
    assert right / len(held_out.digits) >= 0.95


def test_classification_returns_the_digit_as_label(client: Any, held_out: Digits) -> None:
    """Triton's classification extension returns the digit as the label."""
    wanted = tritonclient.InferRequestedOutput("probabilities", class_count=1)
    best = infer(client, held_out.images[:1], outputs=[wanted]).as_numpy("probabilities")
    label = infer(client, held_out.images[:1]).as_numpy("label")
    assert best[0, 0].decode().split(":")[2] == str(label[0, 0])


@pytest.mark.parametrize("pixel", [-1.0, 16.5, np.nan])
def test_pixel_out_of_range_is_rejected(client: Any, held_out: Digits, pixel: float) -> None:
    """A pixel outside the scale fails its request, and the message gives the reason."""
    images = held_out.images[:3].astype(np.float32)
    images[1, 7] = pixel
    with pytest.raises(tritonclient.InferenceServerException, match="not between 0 and 16") as caught:
        infer(client, images)
    assert caught.value.status() == "400"
