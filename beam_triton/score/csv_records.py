"""Records of a CSV file from blocks of whole lines; quoted fields may hold newlines.

A block without a quote is parsed by `csv` in one go, which is most of what there is in files of numbers. In
a block with quotes the lines of the record at hand are kept. A quote that is opened by mistake takes what
follows for its field, up to the next quote, which may be a good row's. Such a record spans lines and has not
as many fields as the others: it counts as its first line alone, and reading goes on at its second.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from beam_triton.score.streams import Texts, is_utf8, readable, text_lines

# What one record may span. A quote that is never closed would otherwise take the rest of the file for one
# field; base64 images of this size still pass.
MAX_RECORD_CHARACTERS = 16 << 20


class Broken(NamedTuple):
    """A record that is no CSV, and why."""

    text: str
    message: str


def records(
    blocks: Iterable[bytes], delimiter: str = ",", width: int | None = None
) -> Iterator[list[str] | Broken]:
    """Every record, blank lines as empty lists.

    ``blocks`` end at line ends. ``width`` is the number of fields that a record should have, None as many as
    the first one; a record of one line comes out whatever it has. Raises what reading a block raises.
    """
    shape = _Shape(width)
    # The limit of csv is the process's, and 131,072 by default: a field of JSON may well be longer.
    csv.field_size_limit(MAX_RECORD_CHARACTERS)
    texts = Texts(blocks)
    for block in texts:
        if '"' in block:
            found = _records_with_quotes(block, texts, delimiter, shape)
        elif shape.width is None:
            found = shape.learn_from(_records_without_quotes(block, delimiter))
        else:
            found = _records_without_quotes(block, delimiter)
        if texts.is_utf8 and '"' not in block:
            yield from found
        else:
            # A record may reach into further blocks, so that the answer may change on the way.
            for record in found:
                yield record if texts.is_utf8 else _checked(record, delimiter)
        texts.is_utf8 = True


def boundaries(
    blocks: Iterable[bytes], delimiter: str = ",", width: int | None = None
) -> Iterator[tuple[int, int]]:
    """Byte offsets at which a record begins, each with the number of records before it.

    ``width`` as in `records`, whose records these are. There is a boundary after each block, or after the few
    that a record with newlines reaches into. Lines without a quote are counted, not parsed.
    """
    csv.field_size_limit(MAX_RECORD_CHARACTERS)
    source = _Measured(blocks)
    texts = Texts(source)
    shape = _Shape(width)
    count = 0
    for block in source:
        if b'"' in block:
            found = _records_with_quotes(texts.decode(block), texts, delimiter, shape)
            count += sum(1 for _ in found)
        elif shape.width is None:
            found = shape.learn_from(_records_without_quotes(texts.decode(block), delimiter))
            count += sum(1 for _ in found)
        else:
            count += block.count(b"\n") + (not block.endswith(b"\n"))
        yield source.offset, count


class _Shape:
    """How many fields the records have, as soon as it is known."""

    def __init__(self, width: int | None) -> None:
        self.width = width

    def learn_from(self, found: Iterator[list[str] | Broken]) -> Iterator[list[str] | Broken]:
        for record in found:
            if self.width is None and isinstance(record, list) and record:
                self.width = len(record)
            yield record


class _Measured:
    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self.offset = 0

    def __iter__(self) -> _Measured:
        return self

    def __next__(self) -> bytes:
        block = next(self._blocks)
        self.offset += len(block)
        return block


def _records_without_quotes(block: str, delimiter: str) -> Iterator[list[str] | Broken]:
    reader = csv.reader(text_lines(block), delimiter=delimiter)
    while True:
        try:
            yield from reader
            return
        except csv.Error as error:
            line = block.split("\n")[reader.line_num - 1]
            yield Broken(readable(line), str(error))


def _records_with_quotes(
    block: str, more: Iterator[str], delimiter: str, shape: _Shape
) -> Iterator[list[str] | Broken]:
    lines = _RecordLines(block, more)
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        lines.begin_record()
        message = ""
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = str(error)
        if lines.was_cut:
            message = "a quote is opened and not closed"
        elif not message and lines.in_record > 1 and shape.width not in (None, len(record)):
            message = f"a quote is opened and not closed, or closed too late for {shape.width} fields"
        if message:
            yield Broken(readable(lines.give_up_record().rstrip("\r\n")), message)
            reader = csv.reader(lines, delimiter=delimiter)
        else:
            if shape.width is None and record:
                shape.width = len(record)
            yield record


class _RecordLines:
    """Lines for `csv.reader`, which takes as many as a record needs.

    Beyond the block's end further blocks are taken only in the midst of a record.
    """

    def __init__(self, block: str, more: Iterator[str]) -> None:
        self._lines = text_lines(block)
        self._more = more
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self._characters = 0
        self.was_cut = False

    def begin_record(self) -> None:
        self._record.clear()
        self._characters = 0
        self.was_cut = False

    @property
    def in_record(self) -> int:
        """The number of lines that the record has taken."""
        return len(self._record)

    def give_up_record(self) -> str:
        """The record's first line; the others will be handed out again."""
        self._again.extendleft(reversed(self._record[1:]))
        return self._record[0]

    def __iter__(self) -> _RecordLines:
        return self

    def __next__(self) -> str:
        if self._characters > MAX_RECORD_CHARACTERS:
            self.was_cut = True
            raise StopIteration
        if self._again:
            line = self._again.popleft()
        else:
            found = next(self._lines, None)
            while found is None:
                if not self._record:
                    raise StopIteration
                block = next(self._more, None)
                if block is None:
                    self.was_cut = True
                    raise StopIteration
                self._lines = text_lines(block)
                found = next(self._lines, None)
            line = found
        self._record.append(line)
        self._characters += len(line)
        return line


def _checked(record: list[str] | Broken, delimiter: str) -> list[str] | Broken:
    if isinstance(record, Broken) or all(map(is_utf8, record)):
        return record
    return Broken(readable(delimiter.join(record)), "not valid UTF-8")
