"""Files of every format: rows, their numbers, blocks, compression and damage."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError
from beam_triton.score import row_reading
from beam_triton.score.row_reading import Failure, FileSource, Piece, RowBlock

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    # Small blocks: half of one block is nothing.
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstandard.ZstdCompressor().compress,
}


Row = tuple[int, dict[str, Any]]


def read_all(source: FileSource, path: Path, wanted: frozenset[str] | None = None) -> list[Row | Failure]:
    """Rows, each with its number, and failures, in the order of their rows."""
    found = []
    for piece in source.pieces(str(path), path.stat().st_size):
        found += read_piece(source, piece, wanted)
    return sorted(found, key=lambda row: (row.row or 0) if isinstance(row, Failure) else row[0])


def read_piece(source: FileSource, piece: Piece, wanted: frozenset[str] | None = None) -> list[Row | Failure]:
    found: list[Row | Failure] = []
    for item in source.read(piece, lambda names: names if wanted is None else wanted):
        if isinstance(item, RowBlock):
            assert item.file == piece.file
            found += [(int(number), item.row(index)) for index, number in enumerate(item.numbers)]
        else:
            found.append(item)
    return found


def rows_of(found: list[Row | Failure]) -> list[Row]:
    return [row for row in found if not isinstance(row, Failure)]


def test_csv_rows_know_file_number_and_columns(tmp_path: Path) -> None:
    """Rows are numbered from 1 below the header; blank lines are no rows."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf\n\nid, x\n1,2\n\n3,4")
    found = read_all(FileSource(), path)
    assert rows_of(found) == [(1, {"id": "1", "x": "2"}), (2, {"id": "3", "x": "4"})]


def test_tabs_and_named_columns(tmp_path: Path) -> None:
    """A .tsv is split at tabs, and columns may be named for files without a header."""
    path = tmp_path / "a.tsv"
    path.write_text("1\t2\n3\t4\n")
    found = read_all(FileSource(columns=("a", "b")), path)
    assert rows_of(found) == [(1, {"a": "1", "b": "2"}), (2, {"a": "3", "b": "4"})]


def test_rows_of_a_wrong_length_are_failures(tmp_path: Path) -> None:
    """Too few and too many fields are shown with the line; the other rows are read."""
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1\n1,2\n\n1,2,3,"4"\n')
    short, good, long = read_all(FileSource(), path)
    assert good == (2, {"a": "1", "b": "2"})
    assert isinstance(short, Failure)
    assert isinstance(long, Failure)
    assert (short.row, short.data) == (1, "1")
    assert (long.row, long.data) == (3, '1,2,3,"4"')
    assert "4 fields, its header 2" in long.message


def test_json_lines_say_what_is_broken(tmp_path: Path) -> None:
    """Broken JSON, other values than objects and bytes that are no UTF-8 fail, line by line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{oops\n[1]\n\n"x"\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    found = read_all(FileSource(), path)
    assert rows_of(found) == [(1, {"a": 1}), (8, {"a": 2})]
    failures = {row.row: row.message for row in found if isinstance(row, Failure)}
    assert sorted(failures) == [2, 3, 5, 6, 7]  # type: ignore[type-var]
    assert "not JSON" in failures[2]
    assert "JSON Lines" in failures[3]
    assert failures[6] == "not valid UTF-8"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_line_that_breaks_off_is_located_by_its_column(tmp_path: Path, end: str) -> None:
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
    assert len(rows_of(found)) == len(found) - 1
    assert found[-1].row == len(found)
    assert len(found) > 10_000


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_blocks_hold_every_row_once_with_its_number(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of many blocks gives the same rows as one block, newlines in quotes included."""
    path = tmp_path / name
    text = ["id,text\n"] if name == "a.csv" else []
    for number in range(1, 4_001):
        value = "two\nlines" if number % 7 == 0 else "x" * (number % 50)
        line = f'{number},"{value}"' if name == "a.csv" else json.dumps({"id": number, "text": value})
        text.append(line + "\n")
    path.write_bytes(b"\xef\xbb\xbf" + "".join(text).encode())
    whole = read_all(FileSource(), path)
    for block_bytes in (100, 1_000, 30_000):
        monkeypatch.setattr(row_reading, "_BLOCK_BYTES", block_bytes)
        assert read_all(FileSource(), path) == whole
    assert [int(str(data["id"])) for _, data in rows_of(whole)] == [number for number, _ in rows_of(whole)]
    assert len(whole) == 4_000


def test_a_quoted_field_keeps_its_newlines(tmp_path: Path) -> None:
    """A record may span lines and line end styles; blank lines in it are not blank rows."""
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'id,text\n1,"two\nlines"\n2,"a ""quoted"" word"\r\n3,"across\r\nthree\n\nlines"\n\n5,"plain"'
    )
    assert rows_of(read_all(FileSource(), path)) == [
        (1, {"id": "1", "text": "two\nlines"}),
        (2, {"id": "2", "text": 'a "quoted" word'}),
        (3, {"id": "3", "text": "across\r\nthree\n\nlines"}),
        (4, {"id": "5", "text": "plain"}),
    ]


@pytest.mark.parametrize("rows", [1, 5, 50, 200])
def test_row_numbers_hold_where_rows_of_a_wrong_length_and_blocks_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Whole blocks of them, one after the other, and some at the end of the file."""
    path = tmp_path / "a.csv"
    lines = [f"{number},x" if number // rows % 2 else f"{number}" for number in range(1, 1_001)]
    path.write_text("a,b\n" + "\n".join(lines))
    monkeypatch.setattr(row_reading, "_BLOCK_BYTES", 100)
    found = read_all(FileSource(), path)
    assert len(found) == 1_000
    for number, (line, item) in enumerate(zip(lines, found, strict=True), start=1):
        if isinstance(item, Failure):
            assert (item.row, item.data) == (number, line)
        else:
            assert item == (number, {"a": str(number), "b": "x"})


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_truncated_csv_gives_rows_as_they_were_and_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The record where the data end is not among them: no half of a number becomes a row."""
    path = tmp_path / f"a.csv.{suffix}"
    numbers = [number * 2654435761 % 2**32 for number in range(40_000)]
    whole = COMPRESSORS[suffix](b"a\n" + b"".join(b"%d\n" % number for number in numbers))
    path.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(row_reading, "_BLOCK_BYTES", 10_000)
    *rows, failure = read_all(FileSource(), path)
    assert isinstance(failure, Failure)
    assert (failure.error, failure.row) == ("CorruptFileError", len(rows) + 1)
    assert rows == [(place + 1, {"a": str(number)}) for place, number in enumerate(numbers[: len(rows)])]
    assert len(rows) > 5_000


def test_quote_that_is_not_closed_is_a_failure_with_all_that_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows before it are read; beyond a block the file ends there."""
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,x\n2,"open\n' + "".join(f"{number},y\n" for number in range(3, 100)))
    good, taken = read_all(FileSource(), path)
    assert good == (1, {"a": "1", "b": "x"})
    assert isinstance(taken, Failure)
    assert (taken.row, taken.error) == (2, "RowError")
    assert taken.data["b"].startswith("open\n3,y\n")
    monkeypatch.setattr(row_reading, "_BLOCK_BYTES", 100)
    good, failure = read_all(FileSource(), path)
    assert good == (1, {"a": "1", "b": "x"})
    assert isinstance(failure, Failure)
    assert (failure.row, failure.error) == (2, "CorruptFileError")


def test_a_quote_within_a_field_is_text(tmp_path: Path) -> None:
    """As an inch sign is."""
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "".join(f'{number},{number}" pipe\n' for number in range(1, 200)))
    expected = [(number, {"a": str(number), "b": f'{number}" pipe'}) for number in range(1, 200)]
    assert read_all(FileSource(), path) == expected


def test_a_long_record_is_read(tmp_path: Path) -> None:
    """An image in base64 may take many lines and most of a block, quoted or not."""
    path = tmp_path / "a.csv"
    long = "x" * 1_500_000
    path.write_text(f'a,b\n1,{long}\n2,"{long}\n{long}"\n3,short\n')
    rows = rows_of(read_all(FileSource(), path))
    assert [(number, len(data["b"])) for number, data in rows] == [(1, 1_500_000), (2, 3_000_001), (3, 5)]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_bytes_that_are_not_utf8_fail_their_own_row_of_a_csv(tmp_path: Path, end: bytes) -> None:
    """The rows around it are read, within quotes as well, and the broken one is shown escaped."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,ok\n2,\xff\n3,"two\n\xfelines"\n4,' + "\u00e9".encode() + end)
    found = read_all(FileSource(), path)
    assert rows_of(found) == [(1, {"a": "1", "b": "ok"}), (4, {"a": "4", "b": "\u00e9"})]
    failures = [(row.row, row.message, row.data) for row in found if isinstance(row, Failure)]
    assert failures == [
        (2, "not valid UTF-8", {"a": "2", "b": "\\xff"}),
        (3, "not valid UTF-8", {"a": "3", "b": "two\n\\xfelines"}),
    ]


FIELD = st.text(alphabet='ab," \n\u00e9', max_size=6)


@given(st.lists(st.lists(FIELD, min_size=3, max_size=3), min_size=1, max_size=12), st.integers(60, 120))
def test_what_the_csv_module_writes_is_read_back_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], block_bytes: int
) -> None:
    """Any table, block borders wherever they fall."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["h1", "h2", "h3"], *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_reading, "_BLOCK_BYTES", block_bytes)
        found = read_all(FileSource(), path)
    assert found == [
        (number, {"h1": row[0], "h2": row[1], "h3": row[2]}) for number, row in enumerate(rows, start=1)
    ]


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
    found = [row for piece in pieces for row in read_piece(source, piece, frozenset({"id"}))]
    assert rows_of(found) == [(number + 1, {"id": number}) for number in range(10)]


def test_a_file_that_is_no_parquet_is_a_failure(tmp_path: Path) -> None:
    """What the name promises and the bytes do not keep fails the file, not the job."""
    path = tmp_path / "a.parquet"
    path.write_bytes(b"this is no Parquet file at all")
    (failure,) = read_all(FileSource(), path)
    assert isinstance(failure, Failure)
    assert (failure.row, failure.error) == (None, "CorruptFileError")
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


def test_an_empty_file_is_a_failure_where_it_lacks_its_header(tmp_path: Path) -> None:
    """JSON Lines need none, and a CSV without rows has one."""
    for name, text in (("a.csv", "a,b\n"), ("b.jsonl", ""), ("c.csv", "")):
        (tmp_path / name).write_text(text)
    assert read_all(FileSource(), tmp_path / "a.csv") == read_all(FileSource(), tmp_path / "b.jsonl") == []
    (failure,) = read_all(FileSource(), tmp_path / "c.csv")
    assert isinstance(failure, Failure)
    assert (failure.row, failure.error) == (None, "CorruptFileError")
    assert "is empty" in failure.message


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


def test_a_suffix_that_names_no_format_needs_the_option() -> None:
    """The message lists the suffixes that do."""
    with pytest.raises(ConfigurationError, match=r"data\.txt: the suffix does not tell"):
        FileSource().format_of("data.txt")
    assert FileSource(format="csv").format_of("data.txt") == "csv"
    assert FileSource().format_of("gs://bucket/a.b/part-0.NDJSON.gz") == "jsonl"
