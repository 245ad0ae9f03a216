"""A row of a file: where it stands, what it holds, and what to say when it is of no use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from beam_triton.errors import LocalProtocolError


class RowError(LocalProtocolError):
    """A row that cannot become an element: a missing column, text where a number belongs, a wrong length."""


class CorruptFileError(LocalProtocolError):
    """A file that ends too early or is not what its name says; rows before the damage have been read."""


class Columns(NamedTuple):
    """The columns of a table, shared by its rows.

    ``types`` holds a pyarrow type for each column of a Parquet file, and is None where values are text.
    """

    names: tuple[str, ...]
    types: tuple[Any, ...] | None = None


class Row(NamedTuple):
    """A row that could be read.

    ``number`` counts a file's rows from 1, a CSV's header left out and blank lines counted, so that row n of
    a JSON Lines file is its line n. ``columns`` is None where a row names its own columns (JSON Lines);
    ``values`` is then a mapping, otherwise a sequence in the order of the columns. A CSV's values are text.
    """

    file: str
    number: int
    columns: Columns | None
    values: Sequence[Any] | Mapping[str, Any]

    def data(self) -> dict[str, Any]:
        """Column name to value."""
        if self.columns is None:
            return dict(self.values)
        return dict(zip(self.columns.names, self.values, strict=False))

    def get(self, column: str) -> Any:
        """A column's value, None where the row has no such column."""
        if self.columns is None:
            assert isinstance(self.values, Mapping)
            return self.values.get(column)
        try:
            return cast("Sequence[Any]", self.values)[self.columns.names.index(column)]
        except (ValueError, IndexError):
            return None


class Failure(NamedTuple):
    """A row that has no result: where it stands, why, and the row's own data as far as it could be read.

    ``number`` is None when the file as a whole is at fault. ``error`` is the name of the error's class.
    """

    file: str
    number: int | None
    error: str
    message: str
    data: Any

    @classmethod
    def of(cls, row: Row, error: Exception) -> Failure:
        message = error.message if isinstance(error, LocalProtocolError) else str(error)
        return cls(row.file, row.number, type(error).__name__, message, row.data())
