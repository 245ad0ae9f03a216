"""What ``check`` and ``tune`` send to a model: zeros, or the elements of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from beam_triton.cli.arguments import Shapes, describe_zeros, zeros_request
from beam_triton.errors import ConfigurationError
from beam_triton.protocol import EncodedRequest, ModelSpec
from beam_triton.remote_model import RemoteModel


@dataclass(frozen=True)
class Sample:
    """Requests of zeros of ``shapes``, or of ``elements`` in turn where there are any; ``source`` is their
    file."""

    shapes: Shapes
    elements: Sequence[Any] = ()
    source: str = ""

    def request(self, model: RemoteModel, rows: int) -> EncodedRequest:
        """A request of ``rows`` elements.

        Raises:
            ConfigurationError: nothing can be made up for the model, or a shape does not fit it.
            LocalProtocolError: an element of the file does not fit it.
        """
        if not self.elements:
            return zeros_request(model, self.shapes, rows)
        encoder = model.encoder
        return encoder.encode_batch(list(map(encoder.prepare, islice(cycle(self.elements), rows))))

    def describe(self, spec: ModelSpec) -> str:
        """For people: ``zeros: image FP32 [64]``, or the file."""
        return (
            f"elements of {self.source}" if self.elements else f"zeros: {describe_zeros(spec, self.shapes)}"
        )


def read_sample(path: str | None, shapes: Shapes) -> Sample:
    """Zeros where ``path`` is None; otherwise the elements of the file, each without the batch dimension.

    ``.json`` and ``.jsonl`` hold an object of input name to value a line (``.json`` may be one object of many
    lines), ``.npz`` an array for each input, ``.npy`` one for the only input; the bytes of any other file,
    such as an image, are one BYTES value for the only input.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    if path is None:
        return Sample(shapes)
    file = Path(path)
    try:
        if file.suffix in (".npy", ".npz"):
            loaded = np.load(file, allow_pickle=False)
            elements: list[Any] = [loaded if file.suffix == ".npy" else dict(loaded)]
        elif file.suffix in (".json", ".jsonl"):
            elements = _json_elements(file.read_text(encoding="utf-8"))
        else:
            elements = [file.read_bytes()]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--inputs {path}: {error}") from None
    if not elements:
        raise ConfigurationError(f"--inputs {path} holds no element")
    return Sample(shapes, elements, path)


def _json_elements(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
