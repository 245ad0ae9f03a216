"""Rows of a Parquet file, a thousand at a time. pyarrow is imported when such a file is met, not before."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

from beam_triton.errors import ConfigurationError
from beam_triton.score.rows import Columns, CorruptFileError
from beam_triton.score.streams import open_stored

_BATCH_ROWS = 1024


def import_parquet() -> Any:
    """pyarrow.parquet, or a ConfigurationError that says how to get it."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigurationError(
            "Parquet files need pyarrow: pip install 'beam-triton[demo]', or pyarrow alone"
        ) from error


@contextlib.contextmanager
def _open(path: str, *, is_progress: bool = False) -> Iterator[Any]:
    parquet = import_parquet()
    arrow_exception = importlib.import_module("pyarrow").ArrowException
    with open_stored(path, is_progress=is_progress) as stored:
        try:
            # Pages are read as rows are wanted; a pre-buffered row group may be gigabytes.
            yield parquet.ParquetFile(stored, buffer_size=1 << 20, pre_buffer=False)
        except (arrow_exception, OSError) as error:
            # Damaged pages and footers are plain OSErrors to pyarrow; those of the system carry a number,
            # those of a FileSystem have classes of their own, and both may pass when the runner tries again.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            raise CorruptFileError(f"{path} cannot be read as Parquet: {error}") from error


def columns_of(path: str) -> Columns:
    """Names and types of the file's columns. Raises CorruptFileError for a file that is no Parquet."""
    with _open(path) as file:
        return _columns(file)


def row_groups(path: str) -> list[tuple[int, int]]:
    """Number of rows and size in bytes (uncompressed) of each row group."""
    with _open(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def rows(path: str, start: int, stop: int | None, wanted: Collection[str]) -> Iterator[tuple[Columns, Any]]:
    """The rows of the row groups from ``start`` to before ``stop``: their columns and a tuple of values.

    Only the ``wanted`` columns are read, in the file's order; those that the file has not are left out.
    """
    with _open(path, is_progress=True) as file:
        every = _columns(file)
        assert every.types is not None
        chosen = [index for index, name in enumerate(every.names) if name in wanted]
        columns = Columns(
            tuple(every.names[index] for index in chosen), tuple(every.types[index] for index in chosen)
        )
        groups = list(range(start, file.metadata.num_row_groups if stop is None else stop))
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(columns.names)):
            if not chosen:
                yield from ((columns, ()) for _ in range(batch.num_rows))
                continue
            # A batch comes in its own order of columns where names are nested or repeated.
            lists = [_values(batch.column(name)) for name in columns.names]
            for values in zip(*lists, strict=True):
                yield columns, values


def _values(column: Any) -> list[Any]:
    # pyarrow makes Python values one by one; NumPy makes those of a whole column, several times as fast.
    types = importlib.import_module("pyarrow").types
    if column.null_count == 0:
        if types.is_integer(column.type) or types.is_floating(column.type):
            numbers: list[Any] = column.to_numpy().tolist()
            return numbers
        if types.is_list(column.type) and (
            types.is_integer(column.type.value_type) or types.is_floating(column.type.value_type)
        ):
            flat = column.flatten()
            if flat.null_count == 0:
                values = flat.to_numpy()
                offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
                return [values[first:last].tolist() for first, last in pairwise(offsets)]
    made: list[Any] = column.to_pylist()
    return made


def _columns(file: Any) -> Columns:
    schema = file.schema_arrow
    return Columns(tuple(schema.names), tuple(schema.types))
