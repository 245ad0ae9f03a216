"""What ``check`` and ``tune`` send to a model: zeros, or the elements of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, EncodedRequest, ModelSpec, TensorSpec
from beam_triton.remote_model import RemoteModel

Shapes = Mapping[str, tuple[int, ...]]
"""One element's shape of each input whose shape the user gave."""


@dataclass(frozen=True)
class Sample:
    """Requests of zeros, or of ``elements`` in turn where there are any; ``source`` is their file.

    Zeros have size 1 where the model leaves a size open and ``shapes`` does not give it. Optional inputs are
    left out unless ``shapes`` names them.
    """

    shapes: Shapes
    elements: Sequence[Any] = ()
    source: str = ""

    def request(self, model: RemoteModel, rows: int) -> EncodedRequest:
        """A request of ``rows`` elements; of a file, those of the first one's shapes, as only they share it.

        Raises:
            ConfigurationError: the server names no inputs, or a shape does not fit the model.
            LocalProtocolError: an element of the file does not fit it.
        """
        encoder = model.encoder
        if not self.elements:
            return encoder.encode(self._zeros(model.spec, rows))
        first = encoder.prepare(self.elements[0])
        alike = (each for each in map(encoder.prepare, self.elements) if each.signature == first.signature)
        return encoder.encode_batch(list(islice(cycle(alike), rows)))

    def describe(self, spec: ModelSpec) -> str:
        """For people: ``zeros: image FP32 [64]``, or the file."""
        if self.elements:
            return f"elements of {self.source}"
        zeros = [
            f"{tensor.name} {tensor.datatype} {list(shape)}" for tensor, shape in self._zero_shapes(spec)
        ]
        return f"zeros: {', '.join(zeros)}"

    def _zeros(self, spec: ModelSpec, rows: int) -> dict[str, Any]:
        if not spec.inputs:
            raise ConfigurationError(
                f"the server does not name the inputs of model {spec.name!r}: no request can be made up for "
                f"it; give an element by --inputs FILE"
            )
        unknown = sorted(self.shapes.keys() - {tensor.name for tensor in spec.inputs})
        if unknown:
            raise ConfigurationError(
                f"--shape: model {spec.name!r} has no input {unknown}; {spec.describe()}"
            )
        inputs = {}
        for tensor, shape in self._zero_shapes(spec):
            datatype = DATATYPES[tensor.datatype]
            zero = np.full((), b"", object) if datatype.is_bytes else np.zeros((), datatype.array_dtype)
            inputs[tensor.name] = np.broadcast_to(zero, (rows, *shape) if spec.has_batch_dimension else shape)
        return inputs

    def _zero_shapes(self, spec: ModelSpec) -> list[tuple[TensorSpec, tuple[int, ...]]]:
        return [
            (tensor, _zero_shape(tensor, self.shapes.get(tensor.name)))
            for tensor in spec.inputs
            if not tensor.optional or tensor.name in self.shapes
        ]


def _zero_shape(tensor: TensorSpec, given: tuple[int, ...] | None) -> tuple[int, ...]:
    if given is None:
        return tuple(1 if size == -1 else size for size in tensor.shape)
    if len(given) != len(tensor.shape) or any(
        size not in (-1, one) for size, one in zip(tensor.shape, given, strict=True)
    ):
        raise ConfigurationError(f"--shape {tensor.name}: {list(given)} does not fit {tensor.describe()}")
    return given


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
