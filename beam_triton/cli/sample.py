"""What ``check`` and ``tune`` send to a model: zeros, or the elements of a file."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, EncodedRequest, ModelSpec, TensorSpec
from beam_triton.protocol.prepare import PreparedElement
from beam_triton.remote_model import RemoteModel

# What is encoded beforehand, and of a table what is read.
_MOST_BYTES = 64 << 20
_MOST_ROWS = 10_000

Shapes = Mapping[str, tuple[int, ...]]
"""One element's shape of each input whose shape the user gave."""


@dataclass(frozen=True)
class Sample:
    """Requests of zeros, or of ``elements`` in turn where there are any; ``source`` is their file.

    Zeros have size 1 where the model leaves a size open and ``shapes`` does not give it. Optional inputs are
    left out unless ``shapes`` names them. Of a table, whose columns need not all be inputs, those that the
    model has no input for are left out.
    """

    shapes: Shapes
    elements: Sequence[Any] = ()
    source: str = ""
    is_table: bool = False

    def request(self, model: RemoteModel, rows: int) -> EncodedRequest:
        """The first of `requests`."""
        return self.requests(model, rows, most_bytes=0)[0]

    def requests(
        self, model: RemoteModel, rows: int, *, most_bytes: int = _MOST_BYTES
    ) -> list[EncodedRequest]:
        """Requests of ``rows`` elements each that hold the elements of the file in turn; or one of zeros.

        Elements of one signature share requests, as in a pipeline; those that do not fill one are repeated.
        With more than ``most_bytes`` of requests the rest of the file is left out.

        Raises:
            ConfigurationError: the server names no inputs, or a shape does not fit the model.
            LocalProtocolError: an element of the file does not fit it.
        """
        encoder = model.encoder
        if not self.elements:
            return [encoder.encode(self._zeros(model.spec, rows))]
        alike: dict[Hashable, list[PreparedElement]] = {}
        found: list[EncodedRequest] = []
        nbytes = 0
        names = {tensor.name for tensor in model.spec.inputs} if self.is_table else set()
        for element in self.elements:
            if names:
                element = {name: element[name] for name in element if name in names}
            prepared = encoder.prepare(element)
            batch = alike.setdefault(prepared.signature, [])
            batch.append(prepared)
            if len(batch) == rows:
                found.append(encoder.encode_batch(batch))
                nbytes += found[-1].content_length
                alike[prepared.signature] = []
                if nbytes > most_bytes:
                    return found
        rest = [batch for batch in alike.values() if batch]
        if nbytes > 0:
            # Those that are left would count for more than they are.
            rest = [batch for batch in rest if len(batch) >= rows / 2]
        return found + [encoder.encode_batch(list(islice(cycle(batch), rows))) for batch in rest]

    def describe(self, spec: ModelSpec) -> str:
        """For people: ``zeros: image FP32 [64]``, or the file."""
        if self.elements:
            return f"{len(self.elements):,} element{'s' * (len(self.elements) > 1)} of {self.source}"
        zeros = [f"{tensor.name} {tensor.datatype} {list(shape)}" for tensor, shape in self.zero_shapes(spec)]
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
        for tensor, shape in self.zero_shapes(spec):
            datatype = DATATYPES[tensor.datatype]
            zero = np.full((), b"", object) if datatype.is_bytes else np.zeros((), datatype.array_dtype)
            inputs[tensor.name] = np.broadcast_to(zero, (rows, *shape) if spec.has_batch_dimension else shape)
        return inputs

    def zero_shapes(self, spec: ModelSpec) -> list[tuple[TensorSpec, tuple[int, ...]]]:
        """The inputs that zeros are sent to, each with one element's shape."""
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
    lines), ``.parquet`` and ``.csv`` a column for each input (a vector in a CSV as JSON), ``.npz`` an array
    for each input, ``.npy`` one for the only input; the bytes of any other file, such as an image, are one
    BYTES value for the only input. Of a table, the first 10,000 rows.

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
        elif file.suffix in (".parquet", ".csv"):
            elements = _rows(file)
        else:
            elements = [file.read_bytes()]
    # pyarrow's errors are among these; the others are those of broken .npy, .npz and .json files.
    except (OSError, ValueError, EOFError, BadZipFile, RecursionError) as error:
        raise ConfigurationError(f"--inputs {path}: {error}") from None
    if not elements:
        raise ConfigurationError(f"--inputs {path} holds no element")
    return Sample(shapes, elements, path, is_table=file.suffix in (".parquet", ".csv"))


def _json_elements(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _rows(file: Path) -> list[dict[str, Any]]:
    import pyarrow.csv
    import pyarrow.parquet

    if file.suffix == ".parquet":
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(_MOST_ROWS)
        rows: list[dict[str, Any]] = [row for batch in islice(batches, 1) for row in batch.to_pylist()]
        return rows
    with pyarrow.csv.open_csv(file) as reader:
        rows = []
        for batch in reader:
            rows += batch.to_pylist()
            if len(rows) >= _MOST_ROWS:
                break
    return [{name: _cell(value) for name, value in row.items()} for row in rows[:_MOST_ROWS]]


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
