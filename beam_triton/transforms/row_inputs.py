"""Rows in: which columns of an element feed which inputs of the model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast

import apache_beam as beam
import numpy as np

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol import ModelSpec
from beam_triton.protocol.text import shorten

Columns: TypeAlias = str | Sequence[str]
"""The column that feeds an input, or several that are its values, one each."""

FromElement: TypeAlias = Callable[[Any], Any] | Mapping[str, str]
"""A callable that takes an element with its key, or ``{"column": its column}``."""

# What most elements are, and never rows: spares them the questions of `columns_of`.
_NO_ROWS = frozenset({np.ndarray, list, str, bytes, int, float})


def columns_of(element: Any) -> Mapping[str, Any] | None:
    """The columns of a row by name; None for an element that is no row.

    Rows are ``beam.Row``, NamedTuples, dataclass instances, mappings, and pandas Series labelled by text.
    """
    kind = type(element)
    if kind in _NO_ROWS:
        return None
    if isinstance(element, beam.Row):
        columns: dict[str, Any] = element.__dict__
        return columns
    if isinstance(element, Mapping):
        return element
    if isinstance(element, tuple):
        return element._asdict() if hasattr(element, "_asdict") else None
    names = _dataclass_columns(cast(Any, kind))
    if names is not None:
        return {name: getattr(element, name) for name in names}
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(element, pandas.Series) and element.index.inferred_type == "string":
        return dict(element.items())
    return None


def said_of(element: Any, question: Any, option: str) -> Any:
    """What a `FromElement`, which is the value of an option, gives for an element.

    Raises:
        LocalProtocolError: the element has no such column, or the callable fails on it.
    """
    if isinstance(question, Mapping):
        inputs = element[1] if type(element) is tuple and len(element) == 2 else element
        columns, column = columns_of(inputs), question["column"]
        if columns is None or column not in columns:
            raise LocalProtocolError(
                f"{option} comes from column {column!r}, which the element does not have: {shorten(inputs)}"
            )
        return columns[column]
    try:
        return question(element)
    except Exception as error:
        raise LocalProtocolError(
            f"the callable of {option} failed: {type(error).__name__}: {error}"
        ) from error


@lru_cache(maxsize=256)
def _dataclass_columns(kind: Any) -> tuple[str, ...] | None:
    if not dataclasses.is_dataclass(kind):
        return None
    return tuple(field.name for field in dataclasses.fields(kind))


def checked_inputs(inputs: Any) -> dict[str, Columns] | None:
    """The option ``inputs``, as given.

    Raises:
        ConfigurationError: it does not map names to column names.
    """
    if inputs is None:
        return None
    if not isinstance(inputs, Mapping):
        raise ConfigurationError(
            f"inputs must map the model's inputs to columns, such as {{'image': 'pixels'}}, and is {inputs!r}"
        )
    for name, columns in inputs.items():
        listed = [columns] if isinstance(columns, str) else columns
        if not isinstance(listed, Sequence) or not listed or not all(map(_is_name, (name, *listed))):
            raise ConfigurationError(
                f"inputs: {name!r} takes the name of a column, or a list of names whose values make up one "
                f"tensor, and not {columns!r}"
            )
    return {name: columns if isinstance(columns, str) else tuple(columns) for name, columns in inputs.items()}


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name)


class KeptColumn(NamedTuple):
    """A column that results keep, of elements whose type does not say what it holds.

    Beam's coder would fail the bundle for a value that it cannot write, or write another: 5 for 5.7.
    """

    name: str
    types: tuple[type, ...]
    """Of the values; all if empty."""
    may_be_null: bool

    def check(self, columns: Mapping[str, Any]) -> None:
        """Refuse a row without such a value.

        Raises:
            LocalProtocolError: the column is missing, null, or of another type.
        """
        value = columns.get(self.name)
        if value is None:
            if not self.may_be_null:
                raise LocalProtocolError(
                    f"keep: column {self.name!r} is missing or null. Its columns: "
                    f"{', '.join(map(shorten, columns)) or 'none'}; if it may be, say keep={{{self.name!r}: "
                    f"Optional[…]}}"
                )
        elif self.types and not isinstance(value, self.types):
            raise LocalProtocolError(
                f"keep: column {self.name!r} holds {shorten(value)} ({type(value).__name__}), and not "
                f"{self.types[0].__name__}"
            )


class InputReader:
    """Gives of a row what the model takes, by the names of its inputs; other elements unchanged.

    Columns that feed no input are left out. Where the server does not name the model's inputs, all columns
    are inputs, unless ``inputs`` says which.

    Args:
        model: the model.
        inputs: input name to the column that feeds it, or to several columns of one value each; the others
            are fed by columns of their own name.
        kept: further columns that an element must have, with values of their types.

    Raises:
        ConfigurationError: ``inputs`` names an input that the model does not have.
    """

    __slots__ = ("_by_name", "_columns", "_kept", "_model", "_required")

    def __init__(
        self, model: ModelSpec, inputs: Mapping[str, Columns] | None, kept: Sequence[KeptColumn] = ()
    ) -> None:
        self._model = model
        self._kept = kept
        known = [spec.name for spec in model.inputs]
        unknown = [name for name in inputs or () if known and name not in known]
        if unknown:
            raise ConfigurationError(
                f"inputs: model {model.name!r} has no input {', '.join(map(repr, unknown))}; "
                f"{model.describe()}"
            )
        self._columns: dict[str, Columns] = {name: name for name in known} | dict(inputs or {})
        self._by_name = None if inputs else self._columns.keys()
        self._required = tuple(spec.name for spec in model.inputs if not spec.optional)

    def __call__(self, element: Any) -> Any:
        """What `InferRequestEncoder.prepare` takes of the element.

        Raises:
            LocalProtocolError: a column is missing.
        """
        columns = columns_of(element)
        if columns is None:
            return element
        for kept in self._kept:
            kept.check(columns)
        if not self._columns or columns.keys() == self._by_name:
            return columns
        taken = {}
        for name, column in self._columns.items():
            if type(column) is str:
                if column in columns:
                    taken[name] = columns[column]
            elif all(each in columns for each in column):
                taken[name] = [columns[each] for each in column]
        if len(taken) < len(self._columns):
            for name in self._required:
                if name not in taken:
                    raise self._missing(name, columns)
        return taken

    def _missing(self, name: str, columns: Mapping[str, Any]) -> LocalProtocolError:
        column, found = self._columns[name], ", ".join(map(shorten, columns)) or "none"
        wanted = ", ".join(map(shorten, [column] if isinstance(column, str) else column))
        if column == name:
            wanted = f"{wanted}; if another column feeds it, name that by inputs={{{name!r}: …}}"
        return LocalProtocolError(
            f"input {name!r} of model {self._model.name!r} is missing: the element has no column {wanted}. "
            f"Its columns: {found}; {self._model.describe()}"
        )
