"""Files of every format: rows, their numbers, pieces, compression and damage."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from beam_triton.errors import ConfigurationError
from beam_triton.score.rows import CorruptFileError, Failure, Row
from beam_triton.score.sources import FileSource, Piece

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    # Small blocks: half of one block is nothing.
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstandard.ZstdCompressor().compress,
}


def read_all(source: FileSource, path: Path, wanted: frozenset[str] = frozenset()) -> list[Row | Failure]:
    pieces = source.pieces(str(path), path.stat().st_size)
    return [row for piece in pieces for row in source.read(piece, wanted)]


def rows_of(found: list[Row | Failure]) -> list[tuple[int, dict[str, object]]]:
    return [(row.number, row.data()) for row in found if isinstance(row, Row)]


def test_csv_rows_know_file_number_and_columns(tmp_path: Path) -> None:
    """Rows are numbered from 1 below the header; a blank line counts and gives no row."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfid, x\n1,2\n\n3,4")
    found = read_all(FileSource(), path)
    assert rows_of(found) == [(1, {"id": "1", "x": "2"}), (3, {"id": "3", "x": "4"})]
    assert {row.file for row in found} == {str(path)}


def test_tabs_and_named_columns(tmp_path: Path) -> None:
    """A .tsv is split at tabs, and columns may be named for files without a header."""
    path = tmp_path / "a.tsv"
    path.write_text("1\t2\n3\t4\n")
    found = read_all(FileSource(columns=("a", "b")), path)
    assert rows_of(found) == [(1, {"a": "1", "b": "2"}), (2, {"a": "3", "b": "4"})]


def test_rows_of_a_wrong_length_are_failures(tmp_path: Path) -> None:
    """Too few and too many fields are told with what was there; the other rows are read."""
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1\n1,2\n1,2,3,4\n")
    short, good, long = read_all(FileSource(), path)
    assert isinstance(good, Row)
    assert isinstance(short, Failure)
    assert isinstance(long, Failure)
    assert (short.number, short.data) == (1, {"a": "1"})
    assert (long.number, long.data) == (3, {"a": "1", "b": "2", "(further fields)": "3,4"})
    assert "4 fields, its header 2" in long.message


def test_json_lines_say_what_is_broken(tmp_path: Path) -> None:
    """Broken JSON, other values than objects and bytes that are no UTF-8 fail, line by line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{oops\n[1]\n\n"x"\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    found = read_all(FileSource(), path)
    assert rows_of(found) == [(1, {"a": 1}), (8, {"a": 2})]
    failures = {row.number: row.message for row in found if isinstance(row, Failure)}
    assert sorted(failures) == [2, 3, 5, 6, 7]  # type: ignore[type-var]
    assert "not JSON" in failures[2]
    assert "JSON Lines" in failures[3]
    assert failures[6] == "not valid UTF-8"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_line_that_breaks_off_is_told_by_its_column(tmp_path: Path, end: str) -> None:
    """The row says which line it is; the position within it is the same whatever ends it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": [1, 2' + end.encode())
    (failure,) = read_all(FileSource(), path)
    assert isinstance(failure, Failure)
    assert failure.message == "not JSON: Expecting ',' delimiter at column 12"
    assert failure.data == '{"x": [1, 2'


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read(tmp_path: Path, suffix: str) -> None:
    """The name's last suffix says how it is compressed; files put together are read to their end."""
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(COMPRESSORS[suffix](b'{"a": 1}\n') + COMPRESSORS[suffix](b'{"a": 2}\n'))
    assert rows_of(read_all(FileSource(), path)) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_truncated_file_gives_its_rows_and_a_failure(tmp_path: Path, suffix: str) -> None:
    """Rows before the end of the data come out, and the damage is a failure, not silence."""
    path = tmp_path / f"a.jsonl.{suffix}"
    # Incompressible text, so that half of the file holds about half of the rows.
    lines = b"".join(b'{"a": %d}\n' % (number * 2654435761 % 2**32) for number in range(40_000))
    whole = COMPRESSORS[suffix](lines)
    path.write_bytes(whole[: len(whole) // 2])
    found = read_all(FileSource(), path)
    assert isinstance(found[-1], Failure)
    assert found[-1].error == "CorruptFileError"
    assert all(isinstance(row, Row) for row in found[:-1])
    assert found[-1].number == len(found)
    assert len(found) > 10_000


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_pieces_hold_every_row_once_with_its_number(tmp_path: Path, name: str) -> None:
    """A file cut into many pieces gives the same rows as a whole one, newlines in quotes included."""
    path = tmp_path / name
    text = ["id,text\n"] if name == "a.csv" else []
    for number in range(1, 40_001):
        value = "two\nlines" if number % 7 == 0 else "x" * (number % 50)
        line = f'{number},"{value}"' if name == "a.csv" else json.dumps({"id": number, "text": value})
        text.append(line + "\n")
    path.write_bytes(b"\xef\xbb\xbf" + "".join(text).encode())
    whole = read_all(FileSource(piece_bytes=0), path)
    source = FileSource(piece_bytes=300_000)
    pieces = list(source.pieces(str(path), path.stat().st_size))
    assert len(pieces) >= 2
    # Each piece on its own, as different workers would read them.
    cut = [row for piece in reversed(pieces) for row in source.read(piece, ())]
    assert sorted(rows_of(cut)) == rows_of(whole)
    assert [int(str(data["id"])) for _, data in rows_of(whole)] == [number for number, _ in rows_of(whole)]


def test_compressed_text_is_one_piece(tmp_path: Path) -> None:
    """Nothing can be entered in the middle of a compressed file."""
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a\n" + b"1\n" * 100_000))
    assert list(FileSource(piece_bytes=10).pieces(str(path), 10_000)) == [Piece(str(path), 0, None, 1, None)]


def make_parquet(path: Path, rows: int = 10, group: int = 3) -> None:
    table = pyarrow.table(
        {
            "id": list(range(rows)),
            "x": [[float(number), 0.5] for number in range(rows)],
            "gap": [None if number % 2 else number for number in range(rows)],
            "unused": ["text"] * rows,
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def test_parquet_rows_of_the_wanted_columns(tmp_path: Path) -> None:
    """Only what is wanted is read, in the file's order, lists and nulls included."""
    path = tmp_path / "a.parquet"
    make_parquet(path)
    found = read_all(FileSource(), path, frozenset({"x", "id", "gap"}))
    assert rows_of(found)[1] == (2, {"id": 1, "x": [1.0, 0.5], "gap": None})
    assert len(found) == 10


def test_parquet_pieces_are_row_groups_with_right_row_numbers(tmp_path: Path) -> None:
    """Row groups are read apart, and their rows are numbered through the file."""
    path = tmp_path / "a.parquet"
    make_parquet(path)
    source = FileSource(piece_bytes=1)
    pieces = list(source.pieces(str(path), path.stat().st_size))
    assert [piece.first_row for piece in pieces] == [1, 4, 7, 10]
    found = [row for piece in pieces for row in source.read(piece, {"id"})]
    assert rows_of(found) == [(number + 1, {"id": number}) for number in range(10)]


def test_a_file_that_is_no_parquet_is_a_failure(tmp_path: Path) -> None:
    """What the name promises and the bytes do not keep fails the file, not the job."""
    path = tmp_path / "a.parquet"
    path.write_bytes(b"this is no Parquet file at all")
    (failure,) = read_all(FileSource(), path)
    assert isinstance(failure, Failure)
    assert (failure.number, failure.error) == (None, "CorruptFileError")
    assert str(path) in failure.message


@pytest.mark.parametrize("piece_bytes", [0, 1])
@pytest.mark.parametrize("place", ["pages", "footer", "end"])
def test_a_damaged_parquet_is_a_failure(tmp_path: Path, place: str, piece_bytes: int) -> None:
    """Wherever the damage is, and whether the file is read in pieces or whole."""
    path = tmp_path / "a.parquet"
    make_parquet(path)
    stored = bytearray(path.read_bytes())
    footer = len(stored) - 8 - int.from_bytes(stored[-8:-4], "little")
    start, stop = {"pages": (4, footer), "footer": (footer, len(stored) - 8), "end": (100, len(stored))}[
        place
    ]
    path.write_bytes(stored[:start] + b"\xff" * (stop - start if place != "end" else 0) + stored[stop:])
    found = read_all(FileSource(piece_bytes=piece_bytes), path, frozenset({"id", "x"}))
    assert found
    assert {row.error for row in found if isinstance(row, Failure)} == {"CorruptFileError"}
    assert not rows_of(found)


def test_a_parquet_without_rows_is_no_failure(tmp_path: Path) -> None:
    """It has columns and no row group, so that there is nothing to read."""
    path = tmp_path / "a.parquet"
    make_parquet(path, rows=0)
    assert read_all(FileSource(piece_bytes=1), path, frozenset({"id"})) == []


def test_columns_are_found_without_reading_the_file(tmp_path: Path) -> None:
    """A launcher learns the columns of each format; an empty CSV lacks its header."""
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "a.jsonl").write_text('\n{"c": 1}\n{oops\n{"d": 2, "c": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.csv").write_text("")
    make_parquet(tmp_path / "a.parquet")
    source = FileSource()
    assert source.columns_of(str(tmp_path / "a.csv")).names == ("a", "b")
    assert source.columns_of(str(tmp_path / "a.jsonl")).names == ("c", "d")
    assert source.columns_of(str(tmp_path / "empty.jsonl")).names == ()
    assert source.columns_of(str(tmp_path / "a.parquet")).names == ("id", "x", "gap", "unused")
    with pytest.raises(CorruptFileError, match="is empty"):
        source.columns_of(str(tmp_path / "empty.csv"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "xml"}, "'xml' is none of csv"),
        ({"delimiter": ";;"}, "one character"),
        ({"delimiter": '"'}, "one character"),
        ({"columns": ("a", "a")}, "twice"),
        ({"piece_bytes": -1}, "-1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    """Each message holds the value."""
    with pytest.raises(ConfigurationError, match=message):
        FileSource(**options)  # type: ignore[arg-type]


def test_a_suffix_that_tells_nothing_needs_a_format() -> None:
    """The message lists the suffixes that do."""
    with pytest.raises(ConfigurationError, match=r"data\.txt: the suffix does not tell"):
        FileSource().format_of("data.txt")
    assert FileSource(format="csv").format_of("data.txt") == "csv"
    assert FileSource().format_of("gs://bucket/a.b/part-0.NDJSON.gz") == "jsonl"
