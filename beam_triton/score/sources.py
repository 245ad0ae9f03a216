"""What a file is, where it may be split, and how its rows are read.

Text files have no index, so the number of a row in the middle of one is not known. A file larger than
``piece_bytes`` is therefore read twice: once in order, counting line ends (and parsing only what holds
quotes), to find where pieces begin and with which row; then piece by piece, side by side on as many workers
as there are. Counting is some ten times cheaper than parsing. ``piece_bytes=0`` reads each file once, by one
worker. Compressed text cannot be entered in the middle and is always one piece; Parquet says itself where
its row groups begin.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import NamedTuple

from beam_triton.errors import ConfigurationError
from beam_triton.score import csv_records, json_lines, parquet_tables
from beam_triton.score.csv_records import Broken
from beam_triton.score.rows import Columns, CorruptFileError, Failure, Row
from beam_triton.score.streams import byte_order_mark_bytes, is_compressed, line_blocks

FORMATS = ("csv", "jsonl", "parquet")

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}

DEFAULT_PIECE_BYTES = 64 << 20

# An object of JSON Lines may lack a key that the others have.
_LINES_THAT_TELL_COLUMNS = 100


class Piece(NamedTuple):
    """A part of a file that one worker reads.

    ``start`` and ``stop`` are byte offsets of a text file or indexes of Parquet row groups; ``stop`` None is
    the end. ``first_row`` is the number of the first row. ``columns`` is what a CSV's header says, None
    where the piece begins with the header.
    """

    file: str
    start: int
    stop: int | None
    first_row: int
    columns: Columns | None


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """How files are read.

    ``format`` is one of `FORMATS`, or None: what the name's suffix says. ``delimiter`` separates a CSV's
    fields; None is a comma, or a tab where the name ends in .tsv. ``columns`` names the columns of CSV files
    that have no header. ``piece_bytes`` is the size from which a file is split; 0 never splits.
    Raises ConfigurationError for values that cannot be.
    """

    format: str | None = None
    delimiter: str | None = None
    columns: tuple[str, ...] | None = None
    piece_bytes: int = DEFAULT_PIECE_BYTES

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ConfigurationError(f"input format {self.format!r} is none of {', '.join(FORMATS)}")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigurationError(f"delimiter must be one character, not {self.delimiter!r}")
        if self.columns is not None and len(set(self.columns)) != len(self.columns):
            raise ConfigurationError(f"columns {', '.join(self.columns)} name a column twice")
        if self.piece_bytes < 0:
            raise ConfigurationError(f"piece_bytes must be 0 (never split) or more, not {self.piece_bytes}")

    def format_of(self, path: str) -> str:
        """One of `FORMATS`. Raises ConfigurationError when neither an option nor the name's suffix tells."""
        if self.format is not None:
            return self.format
        found = _SUFFIXES.get(_suffix(path))
        if found is None:
            raise ConfigurationError(
                f"{path}: the suffix does not tell the format ({', '.join(_SUFFIXES)}); "
                f"give the input format: {', '.join(FORMATS)}"
            )
        return found

    def delimiter_of(self, path: str) -> str:
        return self.delimiter or ("\t" if _suffix(path) == ".tsv" else ",")

    def columns_of(self, path: str) -> Columns:
        """The file's columns; for JSON Lines those of its first objects together, none where it holds none.

        Raises CorruptFileError for a file that cannot be read so far, a CSV without a header among them.
        """
        kind = self.format_of(path)
        if kind == "parquet":
            return parquet_tables.columns_of(path)
        if kind == "csv":
            return Columns(self.columns) if self.columns is not None else _header(self._records(path), path)
        lines = islice(json_lines.objects(line_blocks(path)), _LINES_THAT_TELL_COLUMNS)
        return Columns(tuple(dict.fromkeys(key for found in lines if type(found) is dict for key in found)))

    def pieces(self, path: str, size_bytes: int) -> Iterator[Piece]:
        """Where the file is split; ``size_bytes`` is its size as stored.

        A file too damaged to tell is one piece: reading it gives the failure.
        """
        given = Columns(self.columns) if self.format_of(path) == "csv" and self.columns is not None else None
        whole = Piece(path, 0, None, 1, given)
        try:
            # Header and footer are read first: nothing has come out when they turn out to be damaged.
            yield from self._split(whole, size_bytes)
        except CorruptFileError:
            yield whole

    def _split(self, whole: Piece, size_bytes: int) -> Iterator[Piece]:
        path, given = whole.file, whole.columns
        kind = self.format_of(path)
        if not self.piece_bytes or size_bytes <= self.piece_bytes:
            yield whole
        elif kind == "parquet":
            yield from self._row_group_pieces(path)
        elif is_compressed(path):
            yield whole
        elif kind == "jsonl":
            yield from self._cut(whole, json_lines.boundaries(line_blocks(path)), size_bytes)
        else:
            columns, header_records = given, 0
            if columns is None:
                columns, header_records = _header(self._records(path), path), 1
            width = len(columns.names)
            found = csv_records.boundaries(line_blocks(path), self.delimiter_of(path), width)
            for piece in self._cut(whole, found, size_bytes):
                yield (
                    piece._replace(columns=columns, first_row=piece.first_row - header_records)
                    if piece.start
                    else piece
                )

    def _cut(self, whole: Piece, boundaries: Iterator[tuple[int, int]], size_bytes: int) -> Iterator[Piece]:
        start, first_row = 0, 1
        skipped = byte_order_mark_bytes(whole.file)
        for counted, records in boundaries:
            offset = counted + skipped
            if offset - start >= self.piece_bytes and size_bytes - offset > self.piece_bytes // 2:
                yield whole._replace(start=start, stop=offset, first_row=first_row)
                start, first_row = offset, records + 1
        yield whole._replace(start=start, first_row=first_row)

    def _row_group_pieces(self, path: str) -> Iterator[Piece]:
        start, first_row, next_row, size = 0, 1, 1, 0
        groups = parquet_tables.row_groups(path)
        for index, (rows, group_bytes) in enumerate(groups, start=1):
            next_row += rows
            size += group_bytes
            if size >= self.piece_bytes or index == len(groups):
                yield Piece(path, start, index, first_row, None)
                start, first_row, size = index, next_row, 0

    def read(self, piece: Piece, wanted: Collection[str]) -> Iterator[Row | Failure]:
        """The piece's rows in order, and a failure for each that cannot be read.

        ``wanted`` are the columns that a Parquet file is asked for; the other formats give all they have.
        A file that turns out to be damaged ends with a failure that says so.
        """
        kind = self.format_of(piece.file)
        row = piece.first_row - 1
        try:
            if kind == "parquet":
                for columns, values in parquet_tables.rows(piece.file, piece.start, piece.stop, wanted):
                    row += 1
                    yield Row(piece.file, row, columns, values)
                return
            for item in self._csv(piece) if kind == "csv" else _json(piece):
                row = item.number or row
                yield item
        except CorruptFileError as error:
            number = row + 1 if row else None
            yield Failure(piece.file, number, type(error).__name__, error.message, None)

    def _records(self, path: str) -> Iterator[list[str] | Broken]:
        return csv_records.records(line_blocks(path), self.delimiter_of(path))

    def _csv(self, piece: Piece) -> Iterator[Row | Failure]:
        file = piece.file
        found = csv_records.records(
            line_blocks(file, piece.start, piece.stop, is_progress=True),
            self.delimiter_of(file),
            width=len(piece.columns.names) if piece.columns is not None else None,
        )
        columns = piece.columns if piece.columns is not None else _header(found, file)
        width = len(columns.names)
        for number, record in enumerate(found, start=piece.first_row):
            if type(record) is list:
                if len(record) == width:
                    yield Row(file, number, columns, record)
                elif record:
                    message = f"the row has {len(record)} fields, its header {width}"
                    data = dict(zip(columns.names, record, strict=False))
                    if len(record) > width:
                        data["(further fields)"] = ",".join(record[width:])
                    yield Failure(file, number, "RowError", message, data)
            elif isinstance(record, Broken):
                yield Failure(file, number, "RowError", record.message, record.text)


def _json(piece: Piece) -> Iterator[Row | Failure]:
    blocks = line_blocks(piece.file, piece.start, piece.stop, is_progress=True)
    for number, found in enumerate(json_lines.objects(blocks), start=piece.first_row):
        if type(found) is dict:
            yield Row(piece.file, number, None, found)
        elif isinstance(found, Broken):
            yield Failure(piece.file, number, "RowError", found.message, found.text)


def _header(found: Iterator[list[str] | Broken], path: str) -> Columns:
    first = next(found, None)
    if first is None:
        raise CorruptFileError(f"{path} is empty: a CSV begins with its header")
    if isinstance(first, Broken):
        raise CorruptFileError(f"{path}: the header cannot be read: {first.message}")
    return Columns(tuple(name.strip() for name in first))


def _suffix(path: str) -> str:
    name = PurePosixPath(path.replace("\\", "/"))
    if is_compressed(path):
        name = name.with_suffix("")
    return name.suffix.lower()
