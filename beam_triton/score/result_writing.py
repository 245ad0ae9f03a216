"""Results and failures to files: columns to the bytes of a format, and files put in place atomically.

A result's fields are the kept columns, ``file`` and ``row`` where they are asked for, one field an output
under the output's name, and ``model``, the name and version that the server gave. A block of results becomes
one Arrow table, which pyarrow turns into text or Parquet, all rows at once.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from apache_beam.io.filebasedsink import FileBasedSink
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Metrics

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES
from beam_triton.protocol.text import shorten
from beam_triton.score.file_reading import SUFFIXES, Failure, compression_of, suffix_of
from beam_triton.score.job_report import METRICS_NAMESPACE, PROGRESS
from beam_triton.score.row_steps import ScoredRows, ServedModel

OUTPUT_FORMATS = ("jsonl", "parquet", "csv")
_ROW_GROUP_ROWS = 1 << 14
# A column that holds JSON text, not text that becomes a JSON string.
_IS_JSON = {b"beam_triton": b"json"}


def check_fields(keep: Mapping[str, str], *, with_origin: bool, outputs: Sequence[str] = ()) -> None:
    """Raise ConfigurationError when two fields of a result would have one name.

    ``keep`` maps a field's name to the column that it comes from.
    """
    taken = {"model": "the model's name", **dict.fromkeys(outputs, "an output of the model")}
    if with_origin:
        taken |= dict.fromkeys(("file", "row"), "the row's origin")
    for name, column in keep.items():
        if name in taken:
            raise ConfigurationError(
                f"kept column {name!r} has the name of {taken[name]} in the result; "
                f"keep it under another one, for example expected_{name}={column}"
            )


def result_table(scored: ScoredRows, *, keep: Mapping[str, str], with_origin: bool) -> pa.RecordBatch:
    """The fields of results, typed: a value where an output has no dimension, otherwise lists of its rank."""
    rows, count = scored.rows, len(scored.rows)
    check_fields(keep, with_origin=with_origin, outputs=list(scored.outputs))
    columns: dict[str, Any] = {}
    json_fields = set()
    for name, column in keep.items():
        columns[name], is_json = _kept(rows.column(column))
        json_fields |= {name} if is_json else set()
    if with_origin:
        columns |= {"file": pa.repeat(rows.file, count), "row": pa.array(rows.numbers)}
    columns |= {name: _lists(array) for name, array in scored.outputs.items()}
    columns["model"] = pa.repeat(scored.model_id, count)
    return _table(columns, json_fields)


def failure_table(failure: Failure) -> pa.RecordBatch:
    """One row: ``file``, ``row``, ``error``, ``message`` and ``data``, the row's own data, as JSON text."""
    columns = {name: _texts([json_text(value)]) for name, value in failure._asdict().items()}
    return _table(columns, set(columns))


def empty_results(model: ServedModel, *, outputs: Sequence[str] | None, with_origin: bool) -> pa.Schema:
    """The fields that every result has, for a file without one; kept columns have no type then."""
    types: dict[str, Any] = {"file": pa.string(), "row": pa.int64()} if with_origin else {}
    for spec in model.describe(wait_seconds=model.options.timeout_seconds).outputs:
        if outputs is None or spec.name in outputs:
            shape = () if all(dim == 1 for dim in spec.shape) else np.abs(spec.shape)
            types[spec.name] = _lists(np.empty((0, *shape), DATATYPES[spec.datatype].array_dtype)).type
    return pa.schema([*types.items(), ("model", pa.string())])


def _table(columns: Mapping[str, Any], json_fields: Collection[str]) -> pa.RecordBatch:
    fields = [
        pa.field(name, column.type, metadata=_IS_JSON if name in json_fields else None)
        for name, column in columns.items()
    ]
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(fields))


def _kept(column: Any) -> tuple[Any, bool]:
    """A kept column, and whether it is JSON text: the objects of JSON Lines hold lists and objects, too."""
    if not isinstance(column, list):
        return column, False
    with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
        found = pa.array(column)
        if not pa.types.is_nested(found.type):
            return found, False
    return _texts(map(json_text, column)), True


def _texts(texts: Iterable[str]) -> Any:
    # A lone surrogate may come out of a JSON escape of the input.
    return pa.array([text.encode("utf-8", "backslashreplace") for text in texts], pa.binary()).cast(
        pa.string()
    )


def _lists(array: Any) -> Any:
    flat = array.reshape(-1)
    values = pa.array(flat.tolist(), pa.binary()) if flat.dtype.kind in "OSU" else pa.array(flat)
    for axis in range(array.ndim - 1, 0, -1):
        offsets = np.arange(math.prod(array.shape[:axis]) + 1, dtype=np.int32) * array.shape[axis]
        values = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
    return values


def json_text(value: Any) -> str:
    """A value as JSON; what JSON lacks becomes what `plain` makes of it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """A value that JSON lacks as one that it has.

    Non-finite numbers become "NaN", "Infinity" and "-Infinity" as in ProtoJSON, bytes text where they are
    UTF-8 and otherwise ``{"base64": …}``, and dates, decimals and the like their text.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode("ascii")}
    return str(value)


def json_column(column: Any) -> Any:
    """Each value of an Arrow array as JSON, made of whole columns wherever pyarrow can."""
    kind = column.type
    if pa.types.is_binary(kind):
        try:
            return json_column(column.cast(pa.string()))
        except pa.ArrowInvalid:
            return _texts(map(json_text, column.to_pylist()))
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        text = column.cast(pa.string())
    elif pa.types.is_floating(kind):
        # The shortest text that reads back as the same number of the column's precision.
        text = (column.cast(pa.float32()) if pa.types.is_float16(kind) else column).cast(pa.string())
        if not pc.all(pc.is_finite(column)).as_py():
            for wrong, name in (("nan", "NaN"), ("inf", "Infinity"), ("-inf", "-Infinity")):
                text = pc.if_else(pc.equal(text, wrong), f'"{name}"', text)
    elif pa.types.is_string(kind):
        if pc.any(pc.match_substring_regex(column, '["\\\\\x00-\x1f]')).as_py():
            texts = column.to_pylist()
            return _texts("null" if each is None else encode_basestring(each) for each in texts)
        text = pc.binary_join_element_wise('"', column, '"', "")
    elif pa.types.is_list(kind) and not column.null_count:
        joined = pc.binary_join(
            pa.ListArray.from_arrays(_offsets(column), json_column(column.flatten())), ", "
        )
        return pc.binary_join_element_wise("[", joined, "]", "")
    else:
        return _texts(map(json_text, column.to_pylist()))
    return pc.fill_null(text, "null")


def _offsets(lists: Any) -> Any:
    # Those of a slice do not begin with 0.
    return pc.subtract(lists.offsets, lists.offsets[0])


def json_lines(table: pa.RecordBatch) -> memoryview:
    """The rows as lines of JSON."""
    parts: list[Any] = []
    for place, (name, column) in enumerate(zip(table.schema, table.columns, strict=True)):
        parts.append(f"{', ' if place else '{'}{encode_basestring(name.name)}: ")
        parts.append(column if name.metadata else json_column(column))
    lines = pc.binary_join_element_wise(*parts, "}\n", "")
    # The lines lie one behind the other in the array's own buffer.
    _, offsets, data = lines.buffers()
    return memoryview(data)[: int(np.frombuffer(offsets, np.int32)[len(lines)])]


class TableWriter:
    """Writes tables to one stream in one of `OUTPUT_FORMATS`.

    The first rows decide on the types of columns; ``write`` raises ConfigurationError when a later row does
    not fit.
    """

    def __init__(self, stream: IO[bytes], format: str) -> None:
        self._stream = stream
        self._format = format
        self._writer: Any = None
        self._has_header = False
        self._waiting: list[Any] = []

    def write(self, table: pa.RecordBatch) -> None:
        if self._format == "jsonl":
            self._stream.write(json_lines(table))
            return
        if self._format == "csv":
            self._write_csv(table)
            return
        if self._writer is None:
            self._open(table.schema)
        self._waiting.append(self._fitting(table))
        if sum(map(len, self._waiting)) >= _ROW_GROUP_ROWS:
            self._flush()

    def _write_csv(self, table: pa.RecordBatch) -> None:
        # Text as it is, everything else as JSON in a field.
        columns = [each if pa.types.is_string(each.type) else json_column(each) for each in table.columns]
        buffer = pa.BufferOutputStream()
        header = pyarrow.csv.WriteOptions(include_header=not self._has_header)
        pyarrow.csv.write_csv(pa.RecordBatch.from_arrays(columns, names=table.schema.names), buffer, header)
        self._stream.write(buffer.getvalue())
        self._has_header = True

    def close(self, empty: Callable[[], pa.Schema] | None = None) -> None:
        """Write what is left, and close the stream; ``empty`` gives the columns of a file without rows."""
        if self._writer is None and empty is not None:
            self._open(empty())
        if self._waiting:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        self._stream.close()

    def _open(self, schema: pa.Schema) -> None:
        # A column of nulls says nothing of its type.
        typed = [each.with_type(pa.string()) if pa.types.is_null(each.type) else each for each in schema]
        self._schema = pa.schema(typed)
        self._writer = pyarrow.parquet.ParquetWriter(self._stream, self._schema)

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema).combine_chunks())
        self._waiting = []

    def _fitting(self, table: pa.RecordBatch) -> pa.RecordBatch:
        columns = []
        for wanted in self._schema:
            column = table.column(wanted.name)
            try:
                if pa.types.is_string(wanted.type) and not (
                    pa.types.is_string(column.type) or pa.types.is_null(column.type)
                ):
                    column = json_column(column)
                columns.append(column.cast(wanted.type))
            except pa.ArrowException as error:
                raise ConfigurationError(
                    f"column {wanted.name!r} of the result is {wanted.type} and cannot hold every row's "
                    f"value: {shorten(str(error), 200)}; write JSON Lines, or keep other columns"
                ) from error
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A path to write to, such as ``out/results.jsonl`` or ``gs://bucket/results-*.parquet``.

    A ``*`` in the name stands for the numbers of shards, ``00000-of-00042``, one for each bundle. Without
    it, there is one file in the end, copied together from the shards by one worker. ``format`` is one of
    `OUTPUT_FORMATS`; None is what the suffix says. Raises ConfigurationError for a path that cannot be.
    """

    path: str
    format: str | None = None
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        folder, name = _split(self.path)
        if not name or "*" in folder or name.count("*") > 1:
            raise ConfigurationError(
                f"output {self.path!r} must be a file, or shards with one * in the file's name"
            )
        found = self.format or SUFFIXES.get(suffix_of(name))
        if found is None:
            raise ConfigurationError(
                f"output {self.path!r}: the suffix does not tell the format ({', '.join(SUFFIXES)}); "
                f"give the output format: {', '.join(OUTPUT_FORMATS)}"
            )
        if found not in OUTPUT_FORMATS:
            raise ConfigurationError(f"output format {found!r} is none of {', '.join(OUTPUT_FORMATS)}")
        if found == "parquet" and compression_of(name) != CompressionTypes.UNCOMPRESSED:
            raise ConfigurationError(f"output {self.path!r}: Parquet compresses by itself")
        object.__setattr__(self, "format", found)

    @property
    def is_sharded(self) -> bool:
        return "*" in self.path

    @property
    def full_path(self) -> str:
        # Beam's sink does not find the files of a path without a folder again.
        return self.path if "://" in self.path else os.path.abspath(self.path)

    @property
    def temporary_folder(self) -> str:
        """Where this run writes before files are put in place: beside the target."""
        folder, name = _split(self.full_path)
        hidden = f".{name.replace('*', '')}-{self.run_id}"
        return f"{folder.rstrip('/')}/{hidden}"

    def writes(self, path: str) -> bool:
        """Whether a run with this target replaces or deletes the file of that path, however it is written."""
        own, other = (each if "://" in each else os.path.realpath(each) for each in (self.path, path))
        return own == other or (_split(own)[0] == _split(other)[0] and self.is_shard(other))

    def is_shard(self, path: str) -> bool:
        """Whether a path's name is one that some run with this target gave to a shard."""
        pattern = re.escape(_split(self.path)[1]).replace(r"\*", r"\d{5,}-of-\d{5,}")
        return self.is_sharded and re.fullmatch(pattern, _split(path)[1]) is not None


def _split(path: str) -> tuple[str, str]:
    # As every FileSystem does it, but without asking one: its package may be on the workers only.
    folder, slash, name = path.rpartition("/")
    return folder or slash, name


class TableSink(FileBasedSink):
    """Beam's writer of files, for elements that ``to_table`` makes tables of.

    Each bundle writes a file of its own in a temporary folder; Beam lists the files of bundles that the
    runner commits, and renames them into their places when all are there. Without an element there is one
    file that holds none, Parquet with the columns that ``empty`` gives. ``counter`` names the Beam counter of
    the rows written.
    """

    def __init__(
        self,
        target: Target,
        to_table: Callable[[Any], pa.RecordBatch],
        *,
        counter: str,
        empty: Callable[[], pa.Schema] | None = None,
    ) -> None:
        prefix, _, suffix = target.full_path.partition("*")
        template = "SSSSS-of-NNNNN" if target.is_sharded else ""
        super().__init__(prefix, None, suffix, shard_name_template=template)  # type: ignore[no-untyped-call]
        # Beam would group all elements at one worker, in memory, for the one file.
        self.num_shards = 0
        self._target = target
        self._to_table = to_table
        self._counter = counter
        self._empty = empty

    def initialize_write(self) -> str:
        # Another attempt at this step may have made it already.
        with contextlib.suppress(BeamIOError):
            FileSystems.mkdirs(self._target.temporary_folder)
        return self._target.temporary_folder

    def open(self, temp_path: str) -> TableWriter:
        return TableWriter(super().open(temp_path), str(self._target.format))

    def write_record(self, file_handle: TableWriter, value: Any) -> None:
        table = self._to_table(value)
        file_handle.write(table)
        Metrics.counter(METRICS_NAMESPACE, self._counter).inc(len(table))
        if isinstance(value, Failure):
            PROGRESS.failures += 1
        else:
            PROGRESS.results += len(table)

    def close(self, file_handle: TableWriter) -> None:
        is_parquet = self._target.format == "parquet"
        file_handle.close(self._empty if is_parquet else None)

    def finalize_write(
        self, init_result: str, writer_results: Iterable[str], pre_finalize: Any
    ) -> Iterator[str]:
        shards = sorted(writer_results)
        if not self._target.is_sharded and len(shards) > 1:
            joined = f"{init_result}/joined-{_split(self._target.path)[1]}"
            if all(map(FileSystems.exists, shards)):
                self._join(shards, joined)
            shards = [joined]
        places = [self._get_final_name(place, len(shards)) for place in range(len(shards))]
        yield from super().finalize_write(init_result, shards, pre_finalize)
        if self._target.is_sharded:
            # Shards of an earlier run with another number of bundles would be read along with this run's.
            names = {_split(place)[1] for place in places}
            there = [
                each.path
                for match in FileSystems.match([self._target.full_path])
                for each in match.metadata_list
            ]
            stale = [path for path in there if self._target.is_shard(path) and _split(path)[1] not in names]
            if stale:
                FileSystems.delete(stale)

    def _join(self, shards: Sequence[str], joined: str) -> None:
        """One file of all shards: Parquet through pyarrow, lines as they are, compressed or not."""
        # The members of compressed files may follow each other; a CSV's header has to be taken off.
        kind = CompressionTypes.AUTO if self._target.format == "csv" else CompressionTypes.UNCOMPRESSED
        with contextlib.ExitStack() as open_files:
            stream = open_files.enter_context(
                contextlib.closing(FileSystems.create(joined, compression_type=kind))
            )
            writer: Any = None
            for place, shard in enumerate(shards):
                opened = contextlib.closing(FileSystems.open(shard, compression_type=kind))
                source = open_files.enter_context(opened)
                if self._target.format == "parquet":
                    file = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
                    if writer is None:
                        writer = open_files.enter_context(
                            pyarrow.parquet.ParquetWriter(stream, file.schema_arrow)
                        )
                    for batch in file.iter_batches(_ROW_GROUP_ROWS):
                        writer.write_batch(batch.cast(writer.schema))
                else:
                    if self._target.format == "csv" and place:
                        source.readline()
                    shutil.copyfileobj(source, stream, 1 << 20)


def discard_temporary_files(target: Target) -> None:
    """Delete what a run left in the temporary folder; a runner that fails cannot do it itself."""
    for path in (f"{target.temporary_folder}/*", target.temporary_folder):
        with contextlib.suppress(BeamIOError, OSError):
            found = [file.path for match in FileSystems.match([path]) for file in match.metadata_list]
            if found:
                FileSystems.delete(found)
