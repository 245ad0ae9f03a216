"""Results and failures as JSON Lines or Parquet, in files that are put in place atomically.

Results stay columns up to the file, so that pyarrow converts all rows of a block at once.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from apache_beam.io.filebasedsink import FileBasedSink
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Metrics

from beam_triton.errors import ConfigurationError
from beam_triton.score.job_report import METRICS_NAMESPACE, PROGRESS
from beam_triton.score.pipeline_steps import ScoredRows
from beam_triton.score.row_reading import SUFFIXES, Failure, compression_of, suffix_of
from beam_triton.transforms.arrow_columns import output_column

# A row group of a Parquet file.
_GROUP_BYTES = 4 << 20
# The characters that JSON escapes.
_ESCAPED = '["\\\\\x00-\x1f]'
# Field name to values: an Arrow array, or a list of what JSON Lines hold, which may be of several kinds.
Columns = Mapping[str, Any]


def check_fields(keep: Mapping[str, str], *, with_origin: bool, outputs: Iterable[str] = ()) -> None:
    """Raise ConfigurationError when two fields of a result would have one name."""
    taken = {*outputs, "model", *(("file", "row") if with_origin else ())}
    for name in taken & keep.keys():
        raise ConfigurationError(
            f"kept column {name!r} has the name of an output or of another field of the result; "
            f"keep it under another one, for example expected_{name}={keep[name]}"
        )


def result_columns(scored: ScoredRows, *, keep: Mapping[str, str], with_origin: bool) -> Columns:
    """The fields of results: kept columns, origin, outputs, and the model's name and version.

    An output without a dimension is a value, another one a list of its rank.
    """
    rows = scored.rows
    check_fields(keep, with_origin=with_origin, outputs=list(scored.outputs))
    columns = {name: rows.column(column) for name, column in keep.items()}
    if with_origin:
        columns |= {"file": rows.origins, "row": pa.array(rows.numbers)}
    columns |= {name: _lists(array) for name, array in scored.outputs.items()}
    return {**columns, "model": pa.repeat(scored.model_id, len(rows))}


def failure_columns(failure: Failure) -> Columns:
    """One row: ``file``, ``row``, ``error``, ``message`` and ``data``, the row's own data.

    Of these data, numbers that JSON lacks are ``{"float": "NaN"}``, so that `restored` makes numbers of them.
    """
    columns: dict[str, Any] = {name: [value] for name, value in failure._asdict().items()}
    try:
        json.dumps(failure.data, allow_nan=False, default=str)
    except ValueError:
        columns["data"] = [_with_marked_numbers(failure.data)]
    return columns


def _with_marked_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_marked_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_marked_numbers(each) for each in value]
    is_marked = isinstance(value, float) and not math.isfinite(value)
    return {"float": json_text(value).strip('"')} if is_marked else value


def restored(data: Any) -> Any:
    """A failure's data as they were before they were JSON."""
    if isinstance(data, dict):
        # The row itself may have one column, which may be called so.
        restore = json.JSONDecoder(object_hook=_restored_value).decode
        return {name: restore(json.dumps(value)) for name, value in data.items()}
    return data


def _restored_value(value: dict[str, Any]) -> Any:
    # A row's own objects may look alike.
    with contextlib.suppress(ValueError, TypeError):
        if [*value] == ["base64"]:
            return base64.b64decode(value["base64"], validate=True)
        if [*value] == ["float"] and not math.isfinite(number := float(value["float"])):
            return number
    return value


def _lists(array: Any) -> Any:
    """Rows of an output: values, or lists of the output's rank."""
    kind = pa.binary() if array.dtype.kind in "OSU" else pa.from_numpy_dtype(array.dtype)
    for _ in array.shape[1:]:
        kind = pa.list_(kind)
    return output_column([array], kind)


def json_text(value: Any) -> str:
    """A value as JSON.

    Non-finite numbers become "NaN", "Infinity" and "-Infinity", as in ProtoJSON; bytes become text where they
    are UTF-8 and otherwise ``{"base64": …}``; dates, decimals and the like become their text.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_json_value)
    except ValueError:
        text = json.dumps(value, default=_json_value)
        return json.dumps(json.loads(text, parse_constant=str), ensure_ascii=False)


def _json_value(value: Any) -> Any:
    with contextlib.suppress(UnicodeDecodeError):
        return value.decode() if isinstance(value, bytes) else str(value)
    return {"base64": base64.b64encode(value).decode("ascii")}


def _texts(values: Iterable[Any]) -> Any:
    # JSON escapes of the input may hold lone surrogates, which UTF-8 lacks.
    texts = [json_text(value).encode("utf-8", "backslashreplace") for value in values]
    return pa.array(texts, pa.binary()).cast(pa.string())


def json_column(column: Any) -> Any:
    """Each value as JSON text, an Arrow array; pyarrow converts the common types as whole columns."""
    if isinstance(column, list):
        return _texts(column)
    kind = column.type
    if pa.types.is_binary(kind):
        with contextlib.suppress(pa.ArrowInvalid):
            return json_column(column.cast(pa.string()))
    if pa.types.is_list(kind) and not column.null_count:
        # The offsets of a slice do not begin with 0.
        offsets = pc.subtract(column.offsets, column.offsets[0])
        values = pc.binary_join(pa.ListArray.from_arrays(offsets, json_column(column.flatten())), ", ")
        return pc.binary_join_element_wise("[", values, "]", "")
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        text = column.cast(pa.string())
    elif pa.types.is_floating(kind) and pc.all(pc.is_finite(column)).as_py():
        # The shortest text that reads back as the same number of the column's precision.
        text = (column.cast(pa.float32()) if pa.types.is_float16(kind) else column).cast(pa.string())
    elif pa.types.is_string(kind) and not pc.any(pc.match_substring_regex(column, _ESCAPED)).as_py():
        text = pc.binary_join_element_wise('"', column, '"', "")
    else:
        return _texts(column.to_pylist())
    return pc.fill_null(text, "null")


def json_lines(columns: Columns) -> memoryview:
    """The rows as lines of JSON."""
    parts: list[Any] = []
    for name, column in columns.items():
        parts += [f"{', ' if parts else '{'}{json_text(name)}: ", json_column(column)]
    lines = pc.binary_join_element_wise(*parts, "}\n", "")
    # The array's buffer holds the lines one after the other.
    _, offsets, data = lines.buffers()
    return memoryview(data)[: int(np.frombuffer(offsets, np.int32)[len(lines)])]


class ColumnWriter:
    """Writes columns to one stream; ``schema`` or the first rows set the types of a Parquet file."""

    def __init__(self, stream: IO[bytes], format: str, schema: pa.Schema | None = None) -> None:
        self._stream = stream
        self._is_parquet = format == "parquet"
        self._schema = schema
        self._parquet: Any = None
        self._group: list[pa.RecordBatch] = []
        self._group_bytes = 0

    def write(self, columns: Columns) -> int:
        """Write rows; returns how many. Raises ConfigurationError where values do not fit a Parquet type."""
        if not self._is_parquet:
            self._stream.write(json_lines(columns))
            return len(next(iter(columns.values())))
        try:
            batch = pa.RecordBatch.from_pydict(columns)
            writer = self._parquet or self._open_parquet(self._schema or batch.schema)
            self._group.append(batch.cast(writer.schema))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            message = f"results of several types: {error}; write JSON Lines, or keep other columns"
            raise ConfigurationError(message) from error
        self._group_bytes += batch.nbytes
        if self._group_bytes >= _GROUP_BYTES:
            self._write_group()
        return len(batch)

    def close(self) -> None:
        if self._is_parquet:
            writer = self._parquet or self._open_parquet(self._schema or pa.schema([]))
            if self._group:
                self._write_group()
            writer.close()
        self._stream.close()

    def _write_group(self) -> None:
        self._parquet.write_table(pa.Table.from_batches(self._group))
        self._group, self._group_bytes = [], 0

    def _open_parquet(self, schema: pa.Schema) -> Any:
        # A column of nulls does not show its type.
        typed = [each.with_type(pa.string()) if pa.types.is_null(each.type) else each for each in schema]
        self._parquet = pyarrow.parquet.ParquetWriter(
            self._stream, pa.schema(typed), use_dictionary=[*_repeating(typed)]
        )
        return self._parquet


def _repeating(fields: Iterable[pa.Field], folder: str = "") -> Iterator[str]:
    """Paths of a Parquet file's columns whose values may repeat: to look for equal ones among floating-point
    numbers takes seven times as long as to write them."""
    for each in fields:
        path, kind = folder + each.name, each.type
        if pa.types.is_struct(kind):
            yield from _repeating(kind.fields, f"{path}.")
        elif pa.types.is_nested(kind) and not pa.types.is_map(kind):
            yield from _repeating([kind.value_field.with_name("element")], f"{path}.list.")
        elif not pa.types.is_floating(kind):
            yield path


@dataclass(frozen=True)
class Target:
    """A path to write to, such as ``out/results.jsonl`` or ``gs://bucket/results-*.parquet``.

    A ``*`` in the name stands for the numbers of shards, ``00000-of-00042``, one for each bundle; without it,
    one worker joins them. ``format``, "jsonl" or "parquet", is by default what the suffix says. Raises
    ConfigurationError for a path that cannot be one.
    """

    path: str
    format: str = ""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        folder, name = os.path.split(self.path)
        if "*" in folder or name.count("*") > 1:
            raise ConfigurationError(f"output {self.path!r} must have one * at most, in the file's name")
        object.__setattr__(self, "format", self.format or SUFFIXES.get(suffix_of(name)))
        is_compressed = compression_of(name) != CompressionTypes.UNCOMPRESSED
        if not name or self.format not in ("jsonl", "jsonl" if is_compressed else "parquet"):
            raise ConfigurationError(
                f"output {self.path!r}: the suffix does not tell the format; it must be .parquet, or .jsonl, "
                f"which may have a compression's behind it"
            )

    @property
    def full_path(self) -> str:
        # Beam's sink does not find the files of a path without a folder.
        return self.path if "://" in self.path else os.path.abspath(self.path)

    @property
    def temporary_folder(self) -> str:
        """How the folder of this run's files is called until they are renamed, or how its name begins."""
        folder, name = os.path.split(self.full_path)
        return f"{folder.rstrip('/')}/.{name.replace('*', '')}-{self.run_id}"

    def files(self) -> list[str]:
        """The files of earlier runs with this target, in order."""
        (match,) = FileSystems.match([self.full_path])
        return sorted(each.path for each in match.metadata_list if self.writes(each.path))

    def writes(self, path: str) -> bool:
        """Whether some run with this target replaces or deletes the file of that path."""
        own, other = (each if "://" in each else os.path.realpath(each) for each in (self.path, path))
        shard = re.escape(own).replace(r"\*", r"\d{5,}-of-\d{5,}")
        return re.fullmatch(shard, other) is not None


class ColumnSink(FileBasedSink):
    """Beam's writer of files, for elements that ``to_columns`` converts.

    Each bundle writes a file of its own in a temporary folder; Beam lists the files of committed bundles,
    and they are renamed when all exist. Without an element there is one empty file. ``kind``, "results" or
    "failures", names the counters of the rows written. With ``joins`` the target's rows of earlier runs stay.
    """

    def __init__(
        self, target: Target, to_columns: Callable[[Any], Columns], kind: str, *, joins: bool = False
    ) -> None:
        prefix, star, suffix = target.full_path.partition("*")
        template = "SSSSS-of-NNNNN" if star else ""
        super().__init__(prefix, None, suffix, shard_name_template=template)  # type: ignore[no-untyped-call]
        # With one shard, Beam would group all elements at one worker, in memory.
        self.num_shards = 0
        self._target = target
        self._is_sharded = bool(star)
        self._to_columns = to_columns
        self._kind = kind
        self._joins = joins

    def initialize_write(self) -> str:
        if not self._joins:
            return self._target.temporary_folder
        # Copied, and counted in the folder's name, so that the last step does the same when it is repeated.
        earlier = self._target.files()
        folder = f"{self._target.temporary_folder}-{len(earlier)}"
        if earlier:
            with contextlib.suppress(BeamIOError):
                FileSystems.mkdirs(folder)
            FileSystems.copy(earlier, self._earlier(folder))
        return folder

    def open(self, temp_path: str) -> ColumnWriter:
        return ColumnWriter(super().open(temp_path), self._target.format, self._earlier_schema(temp_path))

    def write_record(self, file_handle: ColumnWriter, value: Any) -> None:
        count = file_handle.write(self._to_columns(value))
        Metrics.counter(METRICS_NAMESPACE, f"{self._kind}_written").inc(count)
        PROGRESS.written[self._kind] += count
        if isinstance(value, Failure):
            PROGRESS.failed(value.reason, value.describe())

    def pre_finalize(self, init_result: str, writer_results: Iterable[str]) -> None:
        # Beam deletes what is to be replaced here; a single file is replaced by the renaming itself.
        # Rows that others are to join stay until their copies are in place.
        if self._is_sharded:
            shards = [*self._earlier(init_result), *writer_results]
            super().pre_finalize(init_result, shards)  # type: ignore[no-untyped-call]

    def finalize_write(
        self, init_result: str, writer_results: Iterable[str], pre_finalize: Any
    ) -> Iterator[str]:
        shards = [*self._earlier(init_result), *sorted(writer_results)]
        if not self._is_sharded:
            yield self._put_in_place(init_result, shards)
            return
        yield from super().finalize_write(init_result, shards, pre_finalize)
        # A reader of the pattern would read the shards of an earlier run with another number of them.
        found = self._target.files()
        FileSystems.delete([path for path in found if f"-of-{len(shards):05d}" not in os.path.split(path)[1]])

    def _earlier(self, folder: str) -> list[str]:
        """The copies of the files that others are to join."""
        count = int(folder.rpartition("-")[2]) if self._joins else 0
        return [f"{folder}/earlier-{number:05d}" for number in range(count)]

    def _earlier_schema(self, temp_path: str) -> pa.Schema | None:
        """The types of the rows that others are to join, if it is a Parquet file that has any."""
        earlier = self._earlier(os.path.split(temp_path)[0]) if self._target.format == "parquet" else []
        for path in earlier:
            with contextlib.closing(FileSystems.open(path)) as source:
                schema = pyarrow.parquet.read_schema(source)
            if schema.names:
                return schema
        return None

    def _put_in_place(self, folder: str, shards: Sequence[str]) -> str:
        path, made = self._target.full_path, shards[0]
        if len(shards) > 1:
            made = f"{folder}/joined-{os.path.split(path)[1]}"
            # An earlier attempt at this step may have deleted them, with the joined file in its place.
            if all(map(FileSystems.exists, shards)):
                self._join(shards, made)
        if FileSystems.exists(made):
            try:
                FileSystems.rename([made], [path])
            except BeamIOError:
                # HDFS renames over no file.
                FileSystems.delete([path])
                FileSystems.rename([made], [path])
        elif not FileSystems.exists(path):
            raise BeamIOError(f"{made} and {path} do not exist")
        FileSystems.report_sink_lineage(path)
        with contextlib.suppress(BeamIOError):
            FileSystems.delete([f"{folder}/*", folder])
        return path

    def _join(self, shards: Sequence[str], joined: str) -> None:
        # Lines follow each other as they are stored: the members of a compressed file may do so, too.
        raw = {"compression_type": CompressionTypes.UNCOMPRESSED}
        with contextlib.closing(FileSystems.create(joined, **raw)) as stream:
            writer = ColumnWriter(stream, self._target.format, self._earlier_schema(joined))
            for shard in shards:
                with contextlib.closing(FileSystems.open(shard, **raw)) as source:
                    if self._target.format == "jsonl":
                        shutil.copyfileobj(source, stream, 1 << 20)
                        continue
                    file = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
                    for batch in file.iter_batches(1 << 14):
                        writer.write(dict(zip(batch.schema.names, batch.columns, strict=True)))
            writer.close()
