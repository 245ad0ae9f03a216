"""CSV records from blocks of lines: quotes, newlines inside them, and what is broken."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.score.csv_records import Broken, boundaries, records


def blocks_of(text: bytes, size: int) -> list[bytes]:
    """Cut into blocks of whole lines, of about ``size`` bytes."""
    lines = text.splitlines(keepends=True) if b"\r" not in text.replace(b"\r\n", b"") else [text]
    found: list[bytes] = []
    for line in lines:
        if found and len(found[-1]) < size:
            found[-1] += line
        else:
            found.append(line)
    return found


def read(text: str, size: int = 1 << 20, width: int | None = None) -> list[list[str] | Broken]:
    return list(records(blocks_of(text.encode(), size), width=width))


@pytest.mark.parametrize("size", [1, 12, 1 << 20])
def test_a_quoted_field_keeps_its_newlines(size: int) -> None:
    """A record may span lines, blocks and line end styles."""
    text = 'id,text\n1,"two\nlines"\n2,"a ""quoted"" word"\r\n3,"across\r\nthree\n\nlines"\n4,plain\n'
    assert read(text, size) == [
        ["id", "text"],
        ["1", "two\nlines"],
        ["2", 'a "quoted" word'],
        ["3", "across\r\nthree\n\nlines"],
        ["4", "plain"],
    ]


def test_the_last_line_needs_no_end() -> None:
    """Many programs leave the last newline out."""
    assert read("a,b\n1,2") == [["a", "b"], ["1", "2"]]
    assert read('a,b\n1,"2"') == [["a", "b"], ["1", "2"]]


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_quote_that_is_never_closed_costs_its_own_line(size: int) -> None:
    """The rows after it are read, though a CSV parser would take them for one field."""
    found = read('a,b\n1,"open\n2,x\n3,y\n', size)
    assert found[0] == ["a", "b"]
    assert isinstance(found[1], Broken)
    assert found[1].text == '1,"open'
    assert "not closed" in found[1].message
    assert found[2:] == [["2", "x"], ["3", "y"]]


def test_a_quote_closed_by_a_later_rows_quote_costs_its_own_line() -> None:
    """A good quoted row behind a stray quote is not lost with it."""
    found = read('a,b\n1,"open\n2,"x,y"\n3,z\n')
    assert isinstance(found[1], Broken)
    assert found[2:] == [["2", "x,y"], ["3", "z"]]


def test_bytes_that_are_not_utf8_break_their_own_row_only() -> None:
    """The rows around it are read, and the broken one is shown escaped."""
    found = list(records([b"a,b\n1,ok\n", b"2,\xff\n3,ok\n", '4,"\u00e9"\n'.encode()]))
    assert found[:2] == [["a", "b"], ["1", "ok"]]
    assert found[2] == Broken("2,\\xff", "not valid UTF-8")
    assert found[3:] == [["3", "ok"], ["4", "\u00e9"]]


def test_a_broken_block_reached_from_within_a_record_is_checked_too() -> None:
    """A record that begins in valid text may end in bytes that are not."""
    found = list(records([b'a,b\n1,"two\n', b'lines \xfe"\n2,x\n']))
    assert found[1] == Broken("1,two\nlines \\xfe", "not valid UTF-8")
    assert found[2] == ["2", "x"]


def test_a_field_longer_than_csvs_own_limit_is_read() -> None:
    """An image in base64 is longer than 131,072 characters."""
    long = "x" * 200_000
    assert read(f"a,b\n1,{long}\n") == [["a", "b"], ["1", long]]


def test_another_delimiter() -> None:
    """Tabs separate as commas do."""
    assert list(records([b"a\tb\n1,5\t2\n"], "\t")) == [["a", "b"], ["1,5", "2"]]


def test_blank_lines_are_empty_records() -> None:
    """They count as rows, so that a row's number leads to its line."""
    assert read("a\n\n1\n") == [["a"], [], ["1"]]


FIELD = st.text(alphabet='ab," \n\u00e9', max_size=6)


@given(st.lists(st.lists(FIELD, min_size=3, max_size=3), min_size=1, max_size=12), st.integers(1, 40))
def test_what_csv_writes_comes_back_whatever_the_blocks(rows: list[list[str]], size: int) -> None:
    """Any table written by the csv module is read back, block borders wherever they fall."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["h1", "h2", "h3"], *rows])
    text = stream.getvalue().encode()
    assert list(records(blocks_of(text, size), width=3)) == [["h1", "h2", "h3"], *rows]


@given(
    st.lists(
        st.sampled_from(["1,2\n", '"a\nb",3\n', '"open,1\n', "\n", '5,"x""y"\n', "short\n"]), max_size=15
    ),
    st.integers(1, 30),
)
def test_boundaries_count_the_records_that_reading_finds(lines: list[str], size: int) -> None:
    """From each boundary on, reading finds exactly the records that are left: row numbers hold in pieces."""
    text = "".join(["a,b\n", *lines]).encode()
    whole = list(records(blocks_of(text, 1 << 20), width=2))
    for offset, count in boundaries(blocks_of(text, size), width=2):
        before = list(records(blocks_of(text[:offset], 1 << 20), width=2))
        rest = list(records(blocks_of(text[offset:], 1 << 20), width=2))
        assert before == whole[:count]
        assert rest == whole[count:]
