"""Files to blocks of rows that travel as columns, and every row that cannot be read to a `Failure`.

pyarrow parses CSV and Parquet, the standard library JSON Lines, Beam's FileSystems open. What is added here:
the number of every row, and that damage (a broken line, bytes that are not UTF-8, a compressed file that ends
too early) becomes a failure of the rows concerned, and not an exception of the job or silence.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import lzma
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from apache_beam.io.filesystem import CompressedFile, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol.text import shorten
from beam_triton.score.job_report import PROGRESS

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}
SUFFIXES |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl")
SUFFIXES |= dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image")
FORMATS = (*dict.fromkeys(SUFFIXES.values()), "bytes")

# A block fills a process's requests in flight, so that the server works while the next block is parsed.
_BLOCK_BYTES = 4 << 20
_MAX_BLOCK_ROWS = 8192
# What a call for compressed data gives before damage is found is lost: calls are small.
_CALL_BYTES = 1 << 17

NOT_UTF8 = "not valid UTF-8"
OPEN_QUOTE = "a quote is not closed: it takes all that follows"
"""Messages of failures whose data are not the row's own."""

# Says which of a Parquet file's columns to read.
Wanted = Callable[[Sequence[str]], Collection[str]]


class RowError(LocalProtocolError):
    """A row that cannot be scored: a broken line, a missing column, text where a number belongs."""


class CorruptFileError(LocalProtocolError):
    """A file that ends too early or is not what its name says; rows before the damage have been read."""


class Failure(NamedTuple):
    """A row without a result; ``row`` is None when the file as a whole is at fault.

    ``error`` is the name of the error's class, ``data`` the row's own data as far as it could be read.
    """

    file: str
    row: int | None
    error: str
    message: str
    data: Any

    @property
    def reason(self) -> str:
        """Why it failed, without the request that did."""
        return f"{self.error}: {self.message}".partition(" [endpoint=")[0]

    def describe(self) -> str:
        """The row and the reason, for a message."""
        place = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{place}: {self.reason}"


@dataclass
class RowBlock:
    """Rows of one file, as columns: an Arrow table, or the objects of JSON Lines.

    ``numbers`` count a file's rows from 1: the lines of JSON Lines, and the records of a CSV below its
    header, blank lines left out. With ``is_text`` every value is text, as a CSV holds it.
    """

    file: str
    numbers: npt.NDArray[np.int64]
    table: pa.RecordBatch | None
    objects: Sequence[dict[str, Any]] = ()
    is_text: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def names(self) -> list[str] | None:
        """Names of the columns; None for JSON Lines, whose objects each have their own."""
        return None if self.table is None else self.table.schema.names

    @property
    def keys(self) -> list[str]:
        """Names of the columns, or those of the first objects together: one may lack what others have."""
        return self.names or list(dict.fromkeys(key for row in self.objects[:100] for key in row))

    def column(self, name: str) -> Any:
        """An Arrow array, or a list with None where an object of JSON Lines lacks the key."""
        if self.table is None:
            return [row.get(name) for row in self.objects]
        return self.table.column(self.table.schema.names.index(name))

    def values(self, name: str) -> list[Any]:
        """A column's values as Python objects."""
        column = self.column(name)
        return column if isinstance(column, list) else list(column.to_pylist())

    @property
    def origins(self) -> Any:
        """Each row's file."""
        return pa.repeat(self.file, len(self))

    def row(self, index: int) -> dict[str, Any]:
        """A row's own data, column name to value."""
        if self.table is None:
            return self.objects[index]
        return {name: self.column(name)[index].as_py() for name in self.table.schema.names}

    def take(self, indices: npt.NDArray[np.int64], names: Collection[str] | None = None) -> RowBlock:
        """Some of the rows; of a table with ``names`` only these columns."""
        objects, table = [self.objects[index] for index in indices] if self.objects else [], self.table
        if table is not None and names is not None:
            table = table.select([place for place, name in enumerate(table.schema.names) if name in names])
        if table is not None and table.num_columns and len(indices) != len(self):
            table = table.take(pa.array(indices))
        return RowBlock(self.file, self.numbers[indices], table, objects, self.is_text)

    def failure(self, index: int, error: LocalProtocolError | Any) -> Failure:
        """The failure of one row."""
        return Failure(self.file, int(self.numbers[index]), type(error).__name__, str(error), self.row(index))


class Piece(NamedTuple):
    """What one worker reads: a file of text, or its Parquet row groups from ``start`` to before ``stop``.

    Files that are a row each come with ``others``.
    """

    file: str
    start: int = 0
    stop: int | None = None
    first_row: int = 1
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """How files are read.

    ``format`` is one of `FORMATS`, or None: what the name's suffix says. ``delimiter`` separates a CSV's
    fields; None is a comma, or a tab where the name ends in .tsv. ``columns`` names the columns of CSV files
    that have no header. Parquet files larger than ``piece_bytes`` are read in pieces of whole row groups by
    several workers; 0 never splits. Raises ConfigurationError for values that cannot be.
    """

    format: str | None = None
    delimiter: str | None = None
    columns: tuple[str, ...] | None = None
    piece_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise ConfigurationError(f"input format {self.format!r} is none of {', '.join(FORMATS)}")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigurationError(f"delimiter must be one character, not {self.delimiter!r}")
        if self.columns is not None and len(set(self.columns)) != len(self.columns):
            raise ConfigurationError(f"columns {', '.join(self.columns)} name a column twice")
        if self.piece_bytes < 0:
            raise ConfigurationError(f"piece_bytes must be 0 (never split) or more, not {self.piece_bytes}")

    def format_of(self, path: str) -> str:
        """One of `FORMATS`. Raises ConfigurationError when neither option nor suffix says which."""
        if found := self.format or SUFFIXES.get(suffix_of(path)):
            return found
        known = f"({', '.join(SUFFIXES)}); give the input format: {', '.join(FORMATS)}"
        raise ConfigurationError(f"{path}: the suffix does not tell the format {known}")

    def all_pieces(self, files: Sequence[tuple[str, int]]) -> Iterator[Piece]:
        """The pieces of files, given by path and size."""
        for path, size_bytes in files:
            yield from self.pieces(path, size_bytes)

    def pieces(self, path: str, size_bytes: int) -> list[Piece]:
        """Where the file is split; one too damaged to be is one piece, and reading it gives the failure."""
        pieces = [Piece(path)]
        if self.format_of(path) != "parquet" or not self.piece_bytes or size_bytes <= self.piece_bytes:
            return pieces
        with contextlib.suppress(CorruptFileError), open_file(path) as stored:
            metadata = _parquet(path, stored).metadata
            size_bytes, row = 0, 1
            for index in range(metadata.num_row_groups):
                if size_bytes >= self.piece_bytes:
                    pieces[-1:] = [pieces[-1]._replace(stop=index), Piece(path, index, None, row)]
                    size_bytes = 0
                size_bytes += metadata.row_group(index).total_byte_size
                row += metadata.row_group(index).num_rows
        return pieces

    def read(self, piece: Piece, wanted: Wanted) -> Iterator[RowBlock | Failure]:
        """The piece's rows in order, and a failure for each that cannot be read.

        ``wanted`` says which of a Parquet file's columns to read; the other formats give all they have. A
        file that turns out to be damaged ends with a failure that says so.
        """
        path, kind, row = piece.file, self.format_of(piece.file), piece.first_row - 1
        with open_file(path) as stored:
            content = _Content(path, stored)
            if kind == "parquet":
                blocks: Iterator[RowBlock | Failure] = _parquet_blocks(piece, stored, wanted)
            else:
                blocks = self._csv_blocks(path, content) if kind == "csv" else _json_blocks(path, content)
            try:
                for item in blocks:
                    row = max(row, (item.row or 0) if isinstance(item, Failure) else int(item.numbers[-1]))
                    yield item
                if content.damage is not None:
                    raise content.damage
            except CorruptFileError as error:
                yield Failure(path, row + 1 if row else None, type(error).__name__, error.message, None)

    def _csv_blocks(self, path: str, content: _Content) -> Iterator[RowBlock | Failure]:
        lines = io.BufferedReader(content, _CALL_BYTES)
        delimiter = self.delimiter or ("\t" if suffix_of(path) == ".tsv" else ",")
        names = self.columns or _header(path, lines, delimiter)
        if not lines.peek(1):
            return
        refused: dict[int, Failure] = {}

        def refuse(row: Any) -> str:
            message = f"the row has {row.actual_columns} fields, its header {row.expected_columns}"
            refused[row.number] = Failure(path, row.number, "RowError", message, row.text)
            return "skip"

        parsing = pyarrow.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse
        )
        types = dict.fromkeys(names, pa.string())
        converting = pyarrow.csv.ConvertOptions(column_types=types, check_utf8=False)
        # Rows are numbered by one thread only.
        reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=names)
        first, rows = 1, None
        try:
            for table in pyarrow.csv.open_csv(lines, reading, parsing, converting):
                yield from _valid_text(rows)
                numbers = np.arange(first, first + table.num_rows + len(refused))
                numbers = np.setdiff1d(numbers, [*refused])[: table.num_rows]
                rows = RowBlock(path, numbers, table, is_text=True)
                first = int(numbers[-1]) + 1 if len(numbers) else first
                # Others belong to a block that pyarrow has read ahead.
                yield from [refused.pop(number) for number in [*refused] if number < first]
        except pa.ArrowInvalid as error:
            content.damage = CorruptFileError(f"{path}: {error}")
        else:
            # A record that breaks off may look whole.
            if content.damage is not None and refused:
                refused.popitem()
            elif content.damage is not None and rows is not None:
                rows = rows.take(np.arange(len(rows) - 1))
            elif rows and content.quotes % 2 and "\n" in "".join(rows.row(-1).values()):
                yield rows.failure(-1, RowError(OPEN_QUOTE))
                rows = rows.take(np.arange(len(rows) - 1))
        yield from _valid_text(rows)
        yield from refused.values()


def suffix_of(path: str) -> str:
    """The suffix that names a format, in lower case; that of a compression is left out."""
    name = path.replace("\\", "/").rpartition("/")[2]
    if compression_of(path) != CompressionTypes.UNCOMPRESSED:
        name = name.rpartition(".")[0]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def compression_of(path: str) -> str:
    """The compression that the name's suffix (.gz, .bz2, .zst, .xz, …) says, as one of CompressionTypes."""
    types: Any = CompressionTypes
    return str(types.detect_compression_type(path))


def match_files(patterns: Sequence[str]) -> list[tuple[str, int]]:
    """Path and size in bytes of each file that a pattern matches, each once, in order of their paths.

    A pattern that matches nothing may be the path of a file whose name holds glob characters. Raises
    ConfigurationError when there is no such file either.
    """
    found: dict[str, int] = {}
    # One at a time: FileSystems asks the first pattern's FileSystem for all of them.
    for pattern in patterns:
        matched = [metadata for result in FileSystems.match([pattern]) for metadata in result.metadata_list]
        if not matched:
            is_glob = not set("[*?").isdisjoint(pattern)
            if not (is_glob and FileSystems.exists(pattern)):
                hint = " (the characters [ * ? make it a pattern)" if is_glob else ""
                raise ConfigurationError(f"there is no file {pattern}{hint}")
            matched = [FileSystems.get_filesystem(pattern).metadata(pattern)]
        found |= {each.path: each.size_in_bytes for each in matched}
    return sorted(found.items())


def open_file(path: str) -> Any:
    """A context with the file as it is stored."""
    return contextlib.closing(FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED))


# Beam's own readers take the end of a truncated file for the end of the data; pyarrow's and lzma's raise.
_CODECS = {CompressionTypes.GZIP: "gzip", CompressionTypes.BZIP2: "bz2", CompressionTypes.ZSTD: "zstd"}


class _Content(io.RawIOBase):
    """A file's content, decompressed as its name says; it ends early at ``damage``. Counts ``quotes``."""

    def __init__(self, path: str, stored: Any) -> None:
        super().__init__()
        kind = compression_of(path)
        self.damage: CorruptFileError | None = None
        self.quotes = 0
        self._path, self._stored = path, stored
        if kind in _CODECS:
            stored = pa.CompressedInputStream(pa.PythonFile(stored, "r"), _CODECS[kind])
        elif kind == CompressionTypes.LZMA:
            stored = lzma.LZMAFile(stored)  # noqa: SIM115 # closed with the stored file
        elif kind != CompressionTypes.UNCOMPRESSED:
            stored = CompressedFile(stored, kind)
        self._read = stored.read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        before, part = self._stored.tell(), b""
        try:
            part = self._read(len(buffer)) if self.damage is None else b""
        except (EOFError, OSError, lzma.LZMAError) as damage:
            # Broken data raise plain OSErrors; those of the system carry a number, and may pass when the
            # runner tries again.
            if isinstance(damage, OSError) and damage.errno is not None:
                raise
            self.damage = CorruptFileError(f"{self._path}: {damage}")
        PROGRESS.bytes_read += self._stored.tell() - before
        self.quotes += part.count(b'"')
        buffer[: len(part)] = part
        return len(part)


def _header(path: str, lines: io.BufferedReader[Any], delimiter: str) -> tuple[str, ...]:
    reader = csv.reader((line.decode("utf-8-sig") for line in lines), delimiter=delimiter)
    try:
        names = tuple(name.strip() for name in next(filter(None, reader), ()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path}: the header cannot be read: {error}") from None
    if not names:
        raise CorruptFileError(f"{path} is empty: a CSV begins with its header")
    return names


def _valid_text(rows: RowBlock | None) -> Iterator[RowBlock | Failure]:
    """The rows whose text is UTF-8, and a failure for each of the others."""
    if rows is None or rows.table is None:
        return
    try:
        rows.table.validate(full=True)
    except pa.ArrowInvalid:
        good = []
        for index, number in enumerate(rows.numbers.tolist()):
            stored = {name: bytes(rows.column(name)[index].as_buffer()) for name in rows.table.schema.names}
            data = {name: text.decode("utf-8", "backslashreplace") for name, text in stored.items()}
            if all(data[name].encode() == text for name, text in stored.items()):
                good.append(index)
            else:
                yield Failure(rows.file, number, "RowError", NOT_UTF8, data)
        rows = rows.take(np.array(good, np.int64))
    if len(rows):
        yield rows


def _json_blocks(path: str, content: _Content) -> Iterator[RowBlock | Failure]:
    objects: dict[int, dict[str, Any]] = {}
    size_bytes = 0
    for number, line in enumerate(io.BufferedReader(content, _CALL_BYTES), start=1):
        if content.damage is not None and not line.endswith(b"\n"):
            break
        text = line.decode("utf-8", "backslashreplace").rstrip("\r\n").removeprefix("\ufeff")
        if text and not text.isspace():
            try:
                objects[number] = _json_object(line, text)
            except RowError as error:
                yield Failure(path, number, "RowError", error.message, text)
        size_bytes += len(line)
        if size_bytes >= _BLOCK_BYTES and objects:
            yield RowBlock(path, np.array([*objects]), None, [*objects.values()])
            objects, size_bytes = {}, 0
    if objects:
        yield RowBlock(path, np.array([*objects]), None, [*objects.values()])


def _json_object(line: bytes, text: str) -> dict[str, Any]:
    try:
        line.decode()
        found = json.loads(text)
    except UnicodeDecodeError:
        raise RowError(NOT_UTF8) from None
    except (ValueError, RecursionError) as error:
        where = f"{error.msg} at column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise RowError(f"not JSON: {where}") from None
    if type(found) is not dict:
        hint = "; a file that is one JSON array must become JSON Lines first" if type(found) is list else ""
        raise RowError(f"a JSON object was expected, not {shorten(found)}{hint}")
    return found


@contextlib.contextmanager
def _parquet_damage(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # Damaged pages and footers are plain OSErrors to pyarrow; those of the system carry a number, those
        # of a FileSystem have classes of their own, and both may pass when the runner tries again.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise CorruptFileError(f"{path} cannot be read as Parquet: {error}") from error


def _parquet(path: str, stored: Any) -> Any:
    with _parquet_damage(path):
        # Pages are read as rows are wanted; a pre-buffered row group may be gigabytes.
        return pyarrow.parquet.ParquetFile(stored, buffer_size=1 << 20, pre_buffer=False)


def _parquet_blocks(piece: Piece, stored: Any, wanted: Wanted) -> Iterator[RowBlock]:
    file = _parquet(piece.file, stored)
    stored_bytes = stored.seek(0, io.SEEK_END) or stored.tell()
    groups = range(piece.start, file.metadata.num_row_groups if piece.stop is None else piece.stop)
    size_bytes = sum(file.metadata.row_group(index).total_byte_size for index in groups)
    rows = sum(file.metadata.row_group(index).num_rows for index in groups)
    # Less than elsewhere: what the rows and their results take stays in the processor's caches.
    block_rows = max(1, min(_MAX_BLOCK_ROWS, _BLOCK_BYTES // 8 * rows // max(size_bytes, 1)))
    chosen = wanted(file.schema_arrow.names)
    names = [name for name in dict.fromkeys(file.schema_arrow.names) if name in chosen]
    first = piece.first_row
    with _parquet_damage(piece.file):
        for table in file.iter_batches(block_rows, row_groups=list(groups), columns=names):
            yield RowBlock(piece.file, np.arange(first, first + table.num_rows), table)
            first += table.num_rows
            PROGRESS.bytes_read += stored_bytes * table.num_rows // file.metadata.num_rows
