"""Rows out: kept columns and the model's outputs, with a schema that is known while the pipeline is built."""

# Beam's schemas (2.77) do not read the spelling `str | None`.
# ruff: noqa: UP045

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional, TypeAlias

import apache_beam as beam
import numpy as np
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.errors import ConfigurationError, TritonError, UnexpectedOutputError
from beam_triton.protocol import InferRequestEncoder, InferResponse, TensorSpec
from beam_triton.protocol.datatypes import Array
from beam_triton.protocol.text import shorten
from beam_triton.transforms.results import RESULTS_AT_A_TIME, DefaultValue, Outputs, rows_of, split_key
from beam_triton.transforms.row_inputs import Columns, InputReader, KeptColumn, columns_of

Cuts: TypeAlias = Mapping[str, Sequence[tuple[slice, ...]]]
"""Of outputs that are padded: what of each row is the element's own."""
Fields: TypeAlias = Sequence[tuple[str, Any]]
"""Names and types of a row's columns."""

# Beam's schemas have no unsigned integers, and its coder of single bytes (2.77) refuses negative ones.
_COLUMN_TYPES: dict[str, Any] = {
    "BOOL": bool,
    "INT8": np.int16,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.int16,
    "UINT16": np.int32,
    "UINT32": np.int64,
    "UINT64": np.int64,
    "FP16": np.float32,
    "BF16": np.float32,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": bytes,
}

FAILURE_FIELDS: Fields = (
    ("error_type", str),
    ("error_message", str),
    ("error_endpoint", Optional[str]),
    ("error_status", Optional[np.int64]),
    ("error_attempts", np.int64),
)
"""What the row of a failure says beside the element's own columns."""


@dataclass(frozen=True)
class OutputColumn:
    """An output of the model as a column; the classes of one, as three.

    Attributes:
        output: the output as it is asked for.
        name: of the column, or the beginning of the three names.
        text: BYTES are UTF-8 text.
        classes: the output was asked for by ``classification``: its values are ``score:index:label``.
    """

    output: TensorSpec
    name: str
    text: bool = False
    classes: bool = False

    def fields(self) -> Fields:
        """Names and types of the columns."""
        if self.classes:
            types = {"label": Optional[str], "score": np.float64, "index": np.int64}
            return [(f"{self.name}_{part}", self._nested(kind)) for part, kind in types.items()]
        return [(self.name, self._nested(str if self.text else _COLUMN_TYPES[self.output.datatype]))]

    def _nested(self, kind: Any) -> Any:
        for _ in () if self._is_scalar else self.output.shape:
            kind = Sequence[kind]
        return kind

    @property
    def _is_scalar(self) -> bool:
        return self.output.shape == (1,)

    def check(self, rows: Array) -> None:
        """Refuse values that the column cannot hold.

        Raises:
            UnexpectedOutputError: the rows have another shape than the column's, or are no text.
        """
        shape, wanted = rows.shape[1:], self.output.shape
        # The best classes may be fewer than were asked for.
        fits = len(shape) == len(wanted) and (
            self.classes or all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))
        )
        if not fits:
            raise UnexpectedOutputError(
                f"output {self.output.describe()} has shape {list(shape)} for an element, which column "
                f"{self.name!r} cannot hold"
            )
        if not self.text:
            return
        for value in rows.flat:
            try:
                value.decode()
            except UnicodeDecodeError as error:
                refusal = UnexpectedOutputError(
                    f"output {self.output.name!r} is no UTF-8 text: {shorten(value)} ({error.reason}). "
                    f"Leave it out of text_outputs to get bytes"
                )
                refusal.splits_batch = True
                raise refusal from None

    def values(self, rows: Array) -> list[list[Any]]:
        """For each column the values of the rows, as plain Python objects."""
        if self.classes:
            taken = [[_class_of(each) for each in row] for row in rows.tolist()]
            if self._is_scalar:
                return [list(column) for column in zip(*(row[0] for row in taken), strict=True)]
            return [[[each[part] for each in row] for row in taken] for part in range(3)]
        values = (rows.reshape(len(rows)) if self._is_scalar else rows).tolist()
        return [_as_text(values) if self.text else values]


def _class_of(value: bytes) -> tuple[str | None, float, int]:
    """Label, score and index of ``score:index:label``, which has no label if the model has none."""
    score, index, *label = value.decode(errors="replace").split(":", 2)
    return label[0] if label else None, float(score), int(index)


def _as_text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else [_as_text(each) for each in value]


def check_outputs(columns: Iterable[OutputColumn], encoder: InferRequestEncoder) -> None:
    """Refuse a model that has changed since the pipeline's types were made of its outputs.

    Raises:
        ConfigurationError: an output is gone, or has another datatype or shape.
    """
    given = {spec.name: spec for spec in encoder.expected_outputs}
    for column in columns:
        built_for, spec = column.output, given.get(column.output.name)
        if spec is None or (spec.datatype, spec.shape) != (built_for.datatype, built_for.shape):
            now = f"no output {built_for.name!r}" if spec is None else f"output {spec.describe()}"
            raise ConfigurationError(
                f"model {encoder.model.name!r} gives {now} now. The pipeline was built for "
                f"{built_for.describe()}, and its types cannot change: build and start it again"
            )


@dataclass(frozen=True)
class RowResults:
    """Makes rows of kept columns and outputs: one of the two kinds of results, beside `PredictionResults`.

    Attributes:
        inputs: input name to the columns that feed it.
        kept: the element's columns that the row begins with.
        outputs: the others.
        checked: kept columns of elements whose type does not say what they hold.
        version_column: the last column, of the version that answered; None: there is none.
    """

    inputs: Mapping[str, Columns] | None
    kept: Fields
    outputs: tuple[OutputColumn, ...]
    checked: tuple[KeptColumn, ...] = ()
    version_column: str | None = None

    @property
    def fields(self) -> Fields:
        """Names and types of a result's columns."""
        version: Fields = [] if self.version_column is None else [(self.version_column, Optional[str])]
        return [*self.kept, *(field for column in self.outputs for field in column.fields()), *version]

    @cached_property
    def _kept_names(self) -> list[str]:
        return [name for name, _ in self.kept]

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, _ in self.fields]

    def reader(self, encoder: InferRequestEncoder) -> InputReader:
        """Takes the inputs of ``encoder``'s model out of elements.

        Raises:
            ConfigurationError: as `check_outputs`.
        """
        check_outputs(self.outputs, encoder)
        return InputReader(encoder.element_model, self.inputs, self.checked)

    def of_answer(
        self, windowed_values: list[WindowedValue], response: InferResponse, is_batched: bool
    ) -> Iterable[WindowedValue]:
        """Results in the windows of their elements, made while they are iterated.

        Raises:
            RemoteProtocolError: the answer does not account for every element.
            UnexpectedOutputError: values do not fit the schema.
        """
        # Checks the answer.
        rows_of(response, is_batched, len(windowed_values))
        outputs = response.outputs
        if not is_batched:
            outputs = {name: array[np.newaxis] for name, array in outputs.items()}
        for column in self.outputs:
            column.check(outputs[column.output.name])
        return Outputs(
            self._rows, windowed_values, outputs, response.cuts or {}, response.model_version or None
        )

    def _rows(
        self,
        windowed_values: list[WindowedValue],
        outputs: Mapping[str, Array],
        cuts: Cuts,
        version: str | None,
    ) -> Iterator[WindowedValue]:
        for start in range(0, len(windowed_values), RESULTS_AT_A_TIME):
            part = slice(start, start + RESULTS_AT_A_TIME)
            for windowed_value, *values in zip(
                windowed_values[part], *self._values(outputs, cuts, part), strict=True
            ):
                yield windowed_value.with_value(self._result(windowed_value.value, values, version))

    def _values(self, outputs: Mapping[str, Array], cuts: Cuts, part: slice) -> Iterator[list[Any]]:
        for column in self.outputs:
            rows, own = outputs[column.output.name][part], cuts.get(column.output.name)
            if own is None:
                yield from column.values(rows)
                continue
            # Padded rows end at different places: each is taken by itself.
            values = [column.values(row[cut][np.newaxis]) for row, cut in zip(rows, own[part], strict=True)]
            yield from ([value for (value,) in of_column] for of_column in zip(*values, strict=True))

    def _result(self, element: Any, values: list[Any], version: str | None) -> Any:
        is_keyed, key, row = split_key(element)
        if self.version_column is not None:
            values = [*values, version]
        if self._kept_names:
            columns = columns_of(row) or {}
            values = [*map(columns.get, self._kept_names), *values]
        result = beam.Row(**dict(zip(self._names, values, strict=True)))
        return (key, result) if is_keyed else result

    def default(self, element: Any, default: DefaultValue) -> Any:
        """The row of an element that failed and has a default value."""
        outputs = {column.output.name: default.rows(column.output.name, 1) for column in self.outputs}
        values = [each for (each,) in self._values(outputs, {}, slice(None))]
        return self._result(element, values, None)


@dataclass(frozen=True)
class RowFailures:
    """Makes rows of failures: the element's columns, and those of `FAILURE_FIELDS`.

    Attributes:
        columns: the element's columns; None where they are not known while the pipeline is built: the whole
            element is a column then.
    """

    columns: Fields | None

    @property
    def fields(self) -> Fields:
        """Names and types of a failure's columns."""
        return [*([("element", Any)] if self.columns is None else self._own), *FAILURE_FIELDS]

    @cached_property
    def _own(self) -> Fields:
        # Failures that are scored again bring columns of these names from the first time.
        names = {name for name, _ in FAILURE_FIELDS}
        return [field for field in self.columns or () if field[0] not in names]

    def __call__(self, element: Any, error: TritonError) -> Any:
        """The row of one failure, keyed if the element is."""
        is_keyed, key, row = split_key(element)
        if self.columns is None:
            values = {"element": row}
        else:
            columns = columns_of(row) or {}
            values = {name: columns.get(name) for name, _ in self._own}
        values |= {
            "error_type": type(error).__name__,
            "error_message": error.message,
            "error_endpoint": error.endpoint,
            "error_status": error.status,
            "error_attempts": error.attempt_count,
        }
        failure = beam.Row(**values)
        return (key, failure) if is_keyed else failure


def row_of_outputs(columns: Iterable[OutputColumn], outputs: Mapping[str, Array]) -> beam.Row:
    """One element's outputs, without their batch dimension, as a row.

    Raises:
        UnexpectedOutputError: values do not fit their columns.
    """
    values: dict[str, Any] = {}
    for column in columns:
        rows = outputs[column.output.name][np.newaxis]
        column.check(rows)
        for (name, _), (value,) in zip(column.fields(), column.values(rows), strict=True):
            values[name] = value
    return beam.Row(**values)


def row_type(fields: Fields) -> Any:
    """Beam's type of rows with these columns."""
    return RowTypeConstraint.from_fields(list(fields))
