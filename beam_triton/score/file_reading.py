"""Files to blocks of rows that travel as columns, and every row that cannot be read to a `Failure`.

pyarrow parses CSV and Parquet, the standard library JSON Lines, Beam's FileSystems open. What is added here:
the number of every row, and that damage (a broken line, bytes that are no UTF-8, a compressed file that ends
too early) becomes a failure of the rows concerned, and not an exception of the job or silence.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from apache_beam.io.filesystem import CompressedFile, CompressionTypes, FileMetadata
from apache_beam.io.filesystems import FileSystems

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol.text import shorten
from beam_triton.score.job_report import PROGRESS

FORMATS = ("csv", "jsonl", "parquet")
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}
SUFFIXES |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl")

# A block fills a process's requests in flight, so that the server works while the next block is parsed.
_BLOCK_BYTES = 4 << 20
_MAX_BLOCK_ROWS = 8192
# What one record may span: a quote that is never closed would otherwise take the whole file into memory.
_MAX_RECORD_BYTES = 16 << 20

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


@dataclass
class RowBlock:
    """Rows of one file, as columns: an Arrow table, or the objects of JSON Lines.

    ``numbers`` count a file's rows from 1: a CSV's header is left out and blank lines are counted, so that
    row n of a JSON Lines file is its line n. With ``is_text`` every value is text, as a CSV holds it.
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

    def row(self, index: int) -> dict[str, Any]:
        """A row's own data, column name to value."""
        if self.table is None:
            return self.objects[index]
        columns = zip(self.table.schema.names, self.table.columns, strict=True)
        return {name: column[index].as_py() for name, column in columns}

    def take(self, indices: npt.NDArray[np.int64], names: Collection[str] | None = None) -> RowBlock:
        """Some of the rows; of a table with ``names`` only these columns."""
        numbers, found = self.numbers[indices], self.table
        if found is None:
            return RowBlock(self.file, numbers, None, [self.objects[index] for index in indices])
        if names is not None:
            found = found.select([place for place, name in enumerate(found.schema.names) if name in names])
        if found.num_columns and len(numbers) != len(self):
            found = found.take(pa.array(indices))
        return RowBlock(self.file, numbers, found, is_text=self.is_text)

    def failure(self, index: int, error: LocalProtocolError | Any) -> Failure:
        """The failure of one row."""
        number, kind = int(self.numbers[index]), type(error).__name__
        return Failure(self.file, number, kind, error.message, self.row(index))


class Piece(NamedTuple):
    """What one worker reads: a file of text, or its Parquet row groups from ``start`` to before ``stop``."""

    file: str
    start: int = 0
    stop: int | None = None
    first_row: int = 1


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
        found = self.format or SUFFIXES.get(suffix_of(path))
        if found is None:
            raise ConfigurationError(
                f"{path}: the suffix does not tell the format ({', '.join(SUFFIXES)}); "
                f"give the input format: {', '.join(FORMATS)}"
            )
        return found

    def pieces(self, path: str, size_bytes: int) -> list[Piece]:
        """Where the file is split; one too damaged to be is one piece, and reading it gives the failure."""
        pieces = [Piece(path)]
        if self.format_of(path) != "parquet" or not self.piece_bytes or size_bytes <= self.piece_bytes:
            return pieces
        with contextlib.suppress(CorruptFileError), _open(path) as stored:
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
        with _open(path) as stored:
            blocks: Iterator[RowBlock | Failure]
            if kind == "parquet":
                blocks = _parquet_blocks(piece, stored, wanted)
            else:
                blocks = self._csv_blocks(path, stored) if kind == "csv" else _json_blocks(path, stored)
            try:
                for item in blocks:
                    row = max(row, (item.row or 0) if isinstance(item, Failure) else int(item.numbers[-1]))
                    yield item
            except CorruptFileError as error:
                yield Failure(path, row + 1 if row else None, type(error).__name__, error.message, None)

    def _delimiter(self, path: str) -> str:
        return self.delimiter or ("\t" if suffix_of(path) == ".tsv" else ",")

    def _csv_blocks(self, path: str, stored: Any) -> Iterator[RowBlock | Failure]:
        delimiter = self._delimiter(path)
        blocks = _line_blocks(path, stored, True)
        names = self.columns
        if names is None:
            names, blocks = _header(path, blocks, delimiter)
        first = 1
        for block, is_open in blocks:
            rows, failures, count = _parse_csv(block, path, names, delimiter, first)
            # Here a quote has taken all that follows for its field.
            last = len(rows) - 1
            if is_open and last >= 0 and any("\n" in text for text in rows.row(last).values()):
                failures.append(rows.failure(last, RowError("a quote is opened and not closed")))
                rows = rows.take(np.arange(last))
            yield from failures
            if len(rows):
                yield rows
            first += count


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
        found |= {each.path: each.size_in_bytes for each in matched or [_file_of_that_name(pattern)]}
    return sorted(found.items())


def _file_of_that_name(path: str) -> FileMetadata:
    is_pattern = not set("[*?").isdisjoint(path)
    if is_pattern and FileSystems.exists(path):
        found: FileMetadata = FileSystems.get_filesystem(path).metadata(path)
        return found
    hint = " (the characters [ * ? make it a pattern)" if is_pattern else ""
    raise ConfigurationError(f"there is no file {path}{hint}")


def _open(path: str) -> Any:
    return contextlib.closing(FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED))


def _chunks(path: str, stored: Any) -> Iterator[bytes]:
    """The file's content, decompressed as its name says. Raises CorruptFileError where it ends too early."""
    openers: dict[str, Callable[[Any], Any]] = {
        CompressionTypes.UNCOMPRESSED: lambda file: file,
        CompressionTypes.GZIP: gzip.open,
        CompressionTypes.BZIP2: bz2.open,
        CompressionTypes.LZMA: lzma.open,
        # Beam's own readers take the end of a truncated file for the end of the data; these four raise.
        CompressionTypes.ZSTD: lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
    }
    kind = compression_of(path)
    opener = openers.get(kind)
    file: Any = opener(stored) if opener is not None else CompressedFile(stored, kind)
    read = file.read if kind == CompressionTypes.UNCOMPRESSED else getattr(file, "read1", file.read)
    # What comes out of one call before damage is found is lost: calls for compressed data are small.
    size = _BLOCK_BYTES if kind == CompressionTypes.UNCOMPRESSED else 1 << 16
    parts: list[bytes] = []
    error: Exception | None = None
    while error is None:
        before = stored.tell()
        try:
            part = read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as damage:
            # Broken data raise plain OSErrors; those of the system carry a number, and may pass when the
            # runner tries again.
            if isinstance(damage, OSError) and damage.errno is not None:
                raise
            part, error = b"", damage
        PROGRESS.bytes_read += stored.tell() - before
        parts.append(part)
        if not part or sum(map(len, parts)) >= _BLOCK_BYTES:
            yield b"".join(parts)
            parts.clear()
        if not part:
            break
    if error is not None:
        raise CorruptFileError(f"{path}: {error}") from error


def _line_blocks(path: str, stored: Any, has_quotes: bool = False) -> Iterator[tuple[bytes, bool]]:
    """Blocks of whole lines, or of whole CSV records, and whether a quote is open at the end of one.

    A quote inside an unquoted field misleads the count of them: such a block is merely larger.
    """
    rest, is_first = b"", True
    for data in _chunks(path, stored):
        block = rest + (data.removeprefix(codecs.BOM_UTF8) if is_first else data)
        is_first = False
        whole = end = block.rfind(b"\n") + 1
        odd = has_quotes and block.count(b'"', 0, end) % 2
        while end and odd:
            # Back to a newline outside of quotes; a block whose first record is not complete waits for more.
            before = block.rfind(b"\n", 0, end - 1) + 1
            odd = (odd + block.count(b'"', before, end)) % 2
            end = before
        if not end and len(block) > _MAX_RECORD_BYTES:
            end = whole
        if end:
            yield block[:end], end == whole and bool(has_quotes and block.count(b'"', 0, end) % 2)
        rest = block[end:]
    if rest:
        yield rest, has_quotes and rest.count(b'"') % 2 == 1


def _valid_utf8(block: bytes) -> tuple[bytes, dict[int, str]]:
    """The block with its lines that are not UTF-8 emptied, and their text by line number from 1."""
    with contextlib.suppress(UnicodeDecodeError):
        block.isascii() or block.decode()
        return block, {}
    lines = block.split(b"\n")
    wrong: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            wrong[number] = line.decode("utf-8", "backslashreplace").rstrip("\r")
            # A quote still opens or closes what stands around the line.
            lines[number - 1] = b'"' * (line.count(b'"') % 2)
    return b"\n".join(lines), wrong


def _header(
    path: str, blocks: Iterator[tuple[bytes, bool]], delimiter: str
) -> tuple[tuple[str, ...], Iterator[tuple[bytes, bool]]]:
    """The names of a CSV's columns, and the blocks without the header."""
    csv.field_size_limit(_MAX_RECORD_BYTES)
    block, is_open = next(blocks, (b"", False))
    lines = block.split(b"\n")
    reader = csv.reader((f"{line.decode()}\n" for line in lines), delimiter=delimiter)
    try:
        names = tuple(name.strip() for name in next(reader))
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path}: the header cannot be read: {error}") from None
    if not names:
        raise CorruptFileError(f"{path} is empty: a CSV begins with its header")
    rest = b"\n".join(lines[reader.line_num :])
    return names, (each for part in ([(rest, is_open)] if rest else [], blocks) for each in part)


def _parse_csv(
    block: bytes, path: str, names: Sequence[str], delimiter: str, first: int
) -> tuple[RowBlock, list[Failure], int]:
    """The rows of a block, failures in place of the others, and how many records it holds, blank ones too."""
    failures: dict[int, Failure] = {}
    broken: list[int] = []
    block, wrong = _valid_utf8(block)

    def refuse(row: Any) -> str:
        broken.append(row.number - 1)
        fields = next(csv.reader(io.StringIO(row.text, newline=""), delimiter=delimiter))
        data = dict(zip(names, fields, strict=False))
        if len(fields) > len(names):
            data["(further fields)"] = delimiter.join(fields[len(names) :])
        message = f"the row has {row.actual_columns} fields, its header {row.expected_columns}"
        number = first + row.number - 1
        failures[number] = Failure(path, number, "RowError", message, data)
        return "skip"

    try:
        parsed = pyarrow.csv.read_csv(
            pa.py_buffer(block),
            # Rows are numbered by one thread only.
            pyarrow.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                newlines_in_values=b'"' in block,
                ignore_empty_lines=False,
                invalid_row_handler=refuse,
            ),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), check_utf8=False),
        )
    except pa.ArrowInvalid as error:
        raise CorruptFileError(f"{path}, in the rows from {first}: {error}") from error
    count = parsed.num_rows + len(broken)
    numbers = np.delete(np.arange(first, first + count), broken)
    tables = parsed.combine_chunks().to_batches()
    table = tables[0] if tables else pa.RecordBatch.from_pylist([], schema=parsed.schema)
    rows = RowBlock(path, numbers, table, is_text=True)
    if wrong or b"\n\n" in block or b"\n\r\n" in block or block[:1] in b"\r\n":
        left_out, line = [], 0
        records = csv.reader(io.StringIO(block.decode(), newline=""), delimiter=delimiter)
        for number, record in enumerate(records, start=first):
            texts = [wrong[each] for each in range(line + 1, records.line_num + 1) if each in wrong]
            line = records.line_num
            if texts:
                failures[number] = Failure(path, number, "RowError", "not valid UTF-8", "\n".join(texts))
            if texts or not record:
                left_out.append(number)
        rows = rows.take(np.flatnonzero(~np.isin(numbers, left_out)))
    return rows, list(failures.values()), count


def _json_blocks(path: str, stored: Any) -> Iterator[RowBlock | Failure]:
    first = 1
    for block, _ in _line_blocks(path, stored):
        valid, wrong = _valid_utf8(block)
        lines = valid.decode().removesuffix("\n").split("\n")
        objects: list[dict[str, Any]] = []
        numbers: list[int] = []
        for number, line in enumerate(lines, start=first):
            text, message = wrong.get(number - first + 1), "not valid UTF-8"
            try:
                found = json.loads(line) if line and not line.isspace() else None
            except (ValueError, RecursionError) as error:
                # With its end, a line that breaks off would be said to be broken in a second one.
                text, message = line.rstrip("\r"), f"not JSON: {error}"
                if isinstance(error, json.JSONDecodeError):
                    message = f"not JSON: {error.msg} at column {min(error.pos, len(text)) + 1}"
            else:
                if type(found) is dict:
                    objects.append(found)
                    numbers.append(number)
                elif line and not line.isspace():
                    text, message = line, f"a JSON object was expected, not {shorten(found)}"
                    if type(found) is list:
                        message += "; a file that is one JSON array must become JSON Lines first"
            if text is not None:
                yield Failure(path, number, "RowError", message, text)
        if objects:
            yield RowBlock(path, np.array(numbers), None, objects)
        first += len(lines)


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
    block_rows = max(1, min(_MAX_BLOCK_ROWS, _BLOCK_BYTES * rows // max(size_bytes, 1)))
    chosen = wanted(file.schema_arrow.names)
    names = [name for name in dict.fromkeys(file.schema_arrow.names) if name in chosen]
    first = piece.first_row
    with _parquet_damage(piece.file):
        for table in file.iter_batches(block_rows, row_groups=list(groups), columns=names):
            yield RowBlock(piece.file, np.arange(first, first + table.num_rows), table)
            first += table.num_rows
            PROGRESS.bytes_read += stored_bytes * table.num_rows // file.metadata.num_rows
