"""Lines and records to the bytes of a file, a shard at a time, and several shards to one file."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterable, Sequence
from typing import IO, Any

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, ModelSpec
from beam_triton.protocol.text import shorten
from beam_triton.score.parquet_tables import import_parquet
from beam_triton.score.result_lines import json_line

OUTPUT_FORMATS = ("jsonl", "parquet")

_FLUSH_CHARACTERS = 1 << 18
_ROW_GROUP_ROWS = 1 << 14


class JsonLinesWriter:
    """Lines of UTF-8, given as text without their ends."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._characters = 0

    def write(self, line: str) -> None:
        self._lines.append(line)
        self._characters += len(line)
        if self._characters >= _FLUSH_CHARACTERS:
            self.finish()

    def finish(self) -> None:
        """Write what is left; the stream stays open."""
        if self._lines:
            text = "\n".join(self._lines) + "\n"
            # A lone surrogate may come out of a JSON escape of the input.
            self._stream.write(text.encode("utf-8", "backslashreplace"))
            self._lines = []
            self._characters = 0


class ParquetWriter:
    """One row a record; the columns' types come from the model and from what is kept.

    A kept column has the type of its values among the first rows. BYTES are columns of type binary. Raises
    ConfigurationError when a later row of a kept column does not fit the type.
    """

    def __init__(self, stream: IO[bytes], types: dict[str, Any]) -> None:
        self._stream = stream
        self._types = types
        self._records: list[dict[str, Any]] = []
        self._writer: Any = None
        self._schema: Any = None

    def write(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if len(self._records) >= _ROW_GROUP_ROWS:
            self._flush()

    def finish(self) -> None:
        """Write what is left and the file's footer; the stream stays open."""
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        pyarrow = importlib.import_module("pyarrow")
        if self._writer is None:
            self._schema = self._make_schema(pyarrow)
            self._writer = import_parquet().ParquetWriter(self._stream, self._schema)
        if not self._records:
            return
        arrays = []
        for field in self._schema:
            values = [record.get(field.name) for record in self._records]
            if pyarrow.types.is_string(field.type):
                values = [
                    value if value is None or type(value) is str else json_line(value) for value in values
                ]
            try:
                arrays.append(pyarrow.array(values, field.type))
            except (pyarrow.ArrowException, TypeError, ValueError) as error:
                self._writer.close()
                raise ConfigurationError(
                    f"column {field.name!r} of the result is {field.type} and cannot hold every row's value: "
                    f"{shorten(str(error), 200)}; write JSON Lines, or keep other columns"
                ) from error
        self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))
        self._records = []

    def _make_schema(self, pyarrow: Any) -> Any:
        # What is kept of a record stands first, before the fields that every record has.
        names = [name for name in (self._records[0] if self._records else ()) if name not in self._types]
        kept = [(name, self._kept_type(pyarrow, name)) for name in names]
        return pyarrow.schema([*kept, *self._types.items()])

    def _kept_type(self, pyarrow: Any, name: str) -> Any:
        values = [record.get(name) for record in self._records]
        try:
            found = pyarrow.array(values).type
        except (pyarrow.ArrowException, TypeError, ValueError):
            return pyarrow.string()
        return pyarrow.string() if pyarrow.types.is_null(found) else found


def result_types(model: ModelSpec, outputs: Sequence[str] | None, *, with_origin: bool) -> dict[str, Any]:
    """pyarrow types of the fields that every result has, in the order of a record."""
    import_parquet()
    pyarrow = importlib.import_module("pyarrow")
    types: dict[str, Any] = {}
    if with_origin:
        types.update(file=pyarrow.string(), row=pyarrow.int64())
    for spec in model.outputs:
        if outputs is not None and spec.name not in outputs:
            continue
        datatype = DATATYPES[spec.datatype]
        kind = pyarrow.binary() if datatype.is_bytes else pyarrow.from_numpy_dtype(datatype.array_dtype)
        if not all(dim == 1 for dim in spec.shape):
            for _ in spec.shape:
                kind = pyarrow.list_(kind)
        types[spec.name] = kind
    types["model"] = pyarrow.string()
    return types


def join_json_lines(shards: Iterable[IO[bytes]], target: IO[bytes]) -> None:
    """Put files one after the other; members of compressed files may be put together so, too."""
    for shard in shards:
        shutil.copyfileobj(shard, target, 1 << 20)


def join_parquet(shards: Iterable[IO[bytes]], target: IO[bytes]) -> None:
    """Copy batches of rows into one file, whose schema is the first shard's."""
    parquet = import_parquet()
    writer: Any = None
    try:
        for shard in shards:
            file = parquet.ParquetFile(shard, pre_buffer=False)
            if writer is None:
                schema = file.schema_arrow
                writer = parquet.ParquetWriter(target, schema)
            for batch in file.iter_batches(_ROW_GROUP_ROWS):
                writer.write_batch(batch if batch.schema.equals(schema) else batch.cast(schema))
    finally:
        if writer is not None:
            writer.close()
