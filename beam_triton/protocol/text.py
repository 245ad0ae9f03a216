"""Values of users and servers in messages: short, printable, and never the cause of a second error."""

from __future__ import annotations

import reprlib
from typing import Any

_reprs = reprlib.Repr()
_reprs.maxstring = _reprs.maxother = 300
_reprs.maxlist = _reprs.maxtuple = _reprs.maxdict = 16


def shorten(value: Any, limit: int = 80) -> str:
    """``repr(value)`` cut to ``limit`` characters, without building the whole of it.

    A value whose ``repr`` fails is named by its type.
    """
    if isinstance(value, (bytes, bytearray)):
        value = bytes(value[: limit + 1])
    try:
        text = _reprs.repr(value)
    except Exception:
        # An integer of 5,000 digits raises ValueError, and an element's own __repr__ may raise anything.
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str, limit: int) -> str:
    """``text`` on one line, cut to ``limit``: control characters and runs of blanks become one blank.

    A cut takes the middle out: some servers put the reason of an error at the end of a traceback. Only the
    parts that can reach the message are read, whatever the size of the text.
    """
    line = _one_line(text if len(text) <= limit * 8 else f"{text[: limit * 4]} {text[-limit * 4 :]}")
    if len(line) <= limit:
        return line
    tail = (limit - 3) // 2
    return f"{line[: limit - 3 - tail]}...{line[len(line) - tail :]}"


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
