"""What counts as a key, and what as a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pytest

from beam_triton.transforms.elements import model_inputs, split_key


class Pair(NamedTuple):
    a: int
    b: int


X = np.zeros(2)


@pytest.mark.parametrize(
    ("element", "key", "rest"),
    [((1, X), 1, X), ((None, 2), None, 2), (("k", (1, 2)), "k", (1, 2)), ((X, "v"), X, "v")],
)
def test_a_plain_tuple_of_two_is_keyed(element: Any, key: Any, rest: Any) -> None:
    """Its first half is the key, whatever it is; only the outermost tuple is taken apart."""
    assert split_key(element) == (True, key, rest)


@pytest.mark.parametrize(
    "element", [X, [1, 2], (1,), (1, 2, 3), (), "ab", b"ab", {"a": 1, "b": 2}, Pair(1, 2)]
)
def test_everything_else_is_not(element: Any) -> None:
    """Lists, NamedTuples and strings of two are elements."""
    assert split_key(element) == (False, None, element)


@pytest.mark.parametrize("row", [Pair(1, 2), beam.Row(a=1, b=2)])
def test_rows_are_mappings(row: Any) -> None:
    """A row is what it names."""
    assert model_inputs(row) == {"a": 1, "b": 2}


@pytest.mark.parametrize("element", [X, [1], (1, 2), "text", {"a": 1}, None, 3.5])
def test_other_elements_go_as_they_are(element: Any) -> None:
    """Nothing is copied or converted here."""
    assert model_inputs(element) is element
