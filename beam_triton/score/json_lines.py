"""Objects of a JSON Lines file from blocks of whole lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from beam_triton.protocol.text import shorten
from beam_triton.score.csv_records import Broken
from beam_triton.score.streams import Texts, is_utf8, readable, text_lines


def objects(blocks: Iterable[bytes]) -> Iterator[dict[str, Any] | Broken | None]:
    """One item a line: the object, None for a blank line, or what is broken about it."""
    texts = Texts(blocks)
    for block in texts:
        is_valid = texts.is_utf8
        for line in text_lines(block):
            if is_valid or is_utf8(line):
                yield _object(line)
            else:
                yield Broken(readable(line.rstrip("\r\n")), "not valid UTF-8")
        texts.is_utf8 = True


def boundaries(blocks: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """Byte offsets at which a line begins, one after each block, with the number of lines before it."""
    offset = count = 0
    for block in blocks:
        offset += len(block)
        count += block.count(b"\n") + (not block.endswith(b"\n"))
        yield offset, count


def _object(line: str) -> dict[str, Any] | Broken | None:
    # With its end, a line that breaks off would be said to be broken in a second one.
    line = line.rstrip("\r\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.strip():
            return None
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at column {error.colno}"
        return Broken(line, f"not JSON: {reason}")
    if type(value) is dict:
        return value
    hint = "; a file that is one JSON array must become JSON Lines first" if line.lstrip()[:1] == "[" else ""
    return Broken(line, f"a JSON object was expected, not {shorten(value)}{hint}")
