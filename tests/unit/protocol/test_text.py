"""Values of users and servers in messages."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from beam_triton.protocol.text import printable, shorten


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


LARGE = ["a" * 10**7, b"a" * 10**7, bytearray(10**7), [1] * 10**6, nested(5000)]


@pytest.mark.parametrize("value", LARGE, ids=[type(value).__name__ for value in LARGE])
def test_a_large_value_is_shortened_in_little_memory(value: Any) -> None:
    """The text is short, and so is the memory that it takes to make it."""
    tracemalloc.start()
    try:
        text = shorten(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(text) <= 80 and peak < 10**5


def test_values_whose_repr_fails_are_named_by_type() -> None:
    """Every text can be encoded, too."""
    for value in (Unprintable(), [Unprintable()], 10**5000, np.zeros(10**6), "\ud800"):
        text = shorten(value)
        assert 0 < len(text) <= 80
        text.encode()


def test_small_values_are_shown_whole() -> None:
    """As Python writes them."""
    values = ("a", b"b", 1.5, [1, 2], None)
    assert [shorten(value) for value in values] == [repr(value) for value in values]


def test_control_characters_are_removed_from_messages() -> None:
    """Line breaks, escapes and bells of a server's text do not reach a terminal or a log."""
    assert printable("a\r\n\tb\x1b[31mc\x07", 100) == "a b [31mc"


def test_the_ends_of_a_long_text_are_kept() -> None:
    """A traceback ends with its reason."""
    assert printable("a" * 10**6 + "z", 10) == "aaaa...aaz"
    long = "Traceback\n" + "  frame\n" * 10**5 + "ValueError: I do not like this one"
    text = printable(long, 100)
    assert len(text) == 100 and text.startswith("Traceback") and text.endswith("I do not like this one")
