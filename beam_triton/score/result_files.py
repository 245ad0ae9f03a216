"""Results and failures as flat records: what a line of JSON or a row of a table holds.

A result's fields are the kept columns, ``file`` and ``row`` where they are asked for, one field an output
under the output's name, and ``model``, the name and version that the server gave.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.protocol.datatypes import Array
from beam_triton.score.rows import Columns, Failure, Row

MODEL_FIELD = "model"
ORIGIN_FIELDS = ("file", "row")


def check_fields(keep: Mapping[str, str], *, with_origin: bool, outputs: Sequence[str] = ()) -> None:
    """Raise ConfigurationError when two fields of a result would have one name.

    ``keep`` maps a field's name to the column that it comes from.
    """
    taken = {MODEL_FIELD: "the model's name", **dict.fromkeys(outputs, "an output of the model")}
    if with_origin:
        taken.update(dict.fromkeys(ORIGIN_FIELDS, "the row's origin"))
    for field, column in keep.items():
        if field in taken:
            raise ConfigurationError(
                f"kept column {field!r} has the name of {taken[field]} in the result; "
                f"keep it under another one, for example expected_{field}={column}"
            )


class ResultRecords:
    """Makes the record of a scored row.

    ``model`` says which outputs hold one value: those become a number or a text, all others lists of the
    output's rank. An output that the description does not name becomes a number if its rank is 0.
    Values of BYTES become text where they are UTF-8, and otherwise ``{"base64": …}``, unless
    ``bytes_as_they_are``.
    """

    def __init__(
        self,
        model: ModelSpec,
        keep: Mapping[str, str],
        *,
        with_origin: bool = False,
        bytes_as_they_are: bool = False,
    ) -> None:
        check_fields(keep, with_origin=with_origin, outputs=[spec.name for spec in model.outputs])
        self._keep = dict(keep)
        self._with_origin = with_origin
        self._single = {spec.name for spec in model.outputs if is_single(spec)}
        self._bytes_as_they_are = bytes_as_they_are
        self._columns: Columns | None = None
        self._places: list[tuple[str, int]] = []

    def record(self, row: Row, inference: Mapping[str, Array], model_id: str) -> dict[str, Any]:
        """The whole record, fields in the order of a result."""
        record = self.kept(row)
        for name, array in inference.items():
            record[name] = self.output(name, array)
        record[MODEL_FIELD] = model_id
        return record

    def kept(self, row: Row) -> dict[str, Any]:
        """The fields that come from the row."""
        columns = row.columns
        if columns is None:
            record = {field: row.get(column) for field, column in self._keep.items()}
        else:
            if columns is not self._columns:
                self._places = [(field, columns.names.index(name)) for field, name in self._keep.items()]
                self._columns = columns
            values: Any = row.values
            record = {field: values[place] for field, place in self._places}
        if self._with_origin:
            record["file"] = row.file
            record["row"] = row.number
        return record

    def output(self, name: str, array: Array) -> Any:
        """An output's value."""
        value: Any = array.tolist()
        if array.dtype.kind in "OSU" and not self._bytes_as_they_are:
            value = _texts(value)
        if name in self._single:
            while type(value) is list and len(value) == 1:
                value = value[0]
        return value


def is_single(spec: TensorSpec) -> bool:
    """Whether an output always holds exactly one value."""
    return all(dim == 1 for dim in spec.shape)


def failure_record(failure: Failure) -> dict[str, Any]:
    """``file``, ``row``, ``error`` (the name of its class), ``message`` and ``data``, the row's own data."""
    return {
        "file": failure.file,
        "row": failure.number,
        "error": failure.error,
        "message": failure.message,
        "data": failure.data,
    }


def plain(value: Any) -> Any:
    """A value that JSON lacks as one that it has.

    Non-finite numbers become "NaN", "Infinity" and "-Infinity" as in ProtoJSON, bytes text or
    ``{"base64": …}``, and dates, decimals and the like their text.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return _texts(bytes(value))
    return str(value)


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(item) for item in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode("ascii")}
