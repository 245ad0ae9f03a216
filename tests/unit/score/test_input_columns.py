"""Input mappings: how they are written and what they are refused for."""

from __future__ import annotations

import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.score.input_columns import InputColumns, list_columns, tensors_to_feed

MODEL = ModelSpec(
    "m",
    "1",
    (
        TensorSpec("a", "FP32", (2,)),
        TensorSpec("b", "BYTES", (1,)),
        TensorSpec("c", "INT64", (1,), optional=True),
    ),
    (TensorSpec("y", "FP32", (1,)),),
    8,
)
COLUMNS = ("id", "p0", "p1", "p2", "x:y", "last")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a=p0", ("p0",)),
        ("a=p0:p2", ("p0", "p1", "p2")),
        ("a= p2 , id:p0", ("p2", "id", "p0")),
        ("a=x08:x11", ("x08", "x09", "x10", "x11")),
        ("a=x:y", ("x:y",)),
        ("a=p2:last", ("p2", "x:y", "last")),
    ],
)
def test_columns_are_written_out(text: str, names: tuple[str, ...]) -> None:
    """Counted ranges, ranges in the file's order, and a column whose name looks like a range."""
    assert InputColumns.parse(text).expand(COLUMNS) == names


@pytest.mark.parametrize("text", ["a", "=p0", "a=", "a=p0,,p1", " =p"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    """The message shows how one is written."""
    with pytest.raises(ConfigurationError, match="NAME=COLUMNS"):
        InputColumns.parse(text)


@pytest.mark.parametrize("text", ["a=p2:p0", "a=p0:p9999999999"])
def test_ranges_that_go_down_or_never_end_are_refused(text: str) -> None:
    """A typing error does not ask for gigabytes of names."""
    with pytest.raises(ConfigurationError, match="must go up"):
        InputColumns.parse(text).expand(COLUMNS)


def test_a_range_of_the_files_order_needs_such_an_order() -> None:
    """JSON Lines have none; a CSV's header must hold both ends."""
    with pytest.raises(ConfigurationError, match="JSON Lines"):
        InputColumns.parse("a=first:last").expand(None)
    with pytest.raises(ConfigurationError, match="id, p0, p1"):
        InputColumns.parse("a=first:last").expand(COLUMNS)


def test_an_input_may_be_declared() -> None:
    """Datatype and shape after a colon; a name that merely holds a colon stays a name."""
    declared = InputColumns.parse("a:FP32[2,-1]=p0").declared
    assert declared == TensorSpec("a", "FP32", (2, -1))
    assert InputColumns.parse("a:INT8=p0").declared == TensorSpec("a", "INT8", (-1,))
    assert InputColumns.parse("input:0=p0") == InputColumns("input:0", ("p0",))


def test_inputs_that_are_not_mapped_take_their_own_column() -> None:
    """All but the optional ones, in the model's order."""
    feeds = tensors_to_feed(MODEL, [InputColumns.parse("b=text")])
    assert [(spec.name, entry.columns) for spec, entry in feeds] == [("a", ("a",)), ("b", ("text",))]


def test_a_mapping_of_no_input_lists_the_models_inputs() -> None:
    """Names, datatypes and shapes are in the message."""
    with pytest.raises(ConfigurationError, match=r"no input 'image'; inputs: a FP32 \[2\], b BYTES \[1\]"):
        tensors_to_feed(MODEL, [InputColumns.parse("image=p0")])


def test_an_input_mapped_twice_or_declared_otherwise_is_refused() -> None:
    """Neither is guessed at."""
    with pytest.raises(ConfigurationError, match="'a' is mapped twice"):
        tensors_to_feed(MODEL, [InputColumns.parse("a=p0"), InputColumns.parse("a=p1")])
    with pytest.raises(ConfigurationError, match="'a' is FP32, not INT8"):
        tensors_to_feed(MODEL, [InputColumns.parse("a:INT8=p0")])


def test_a_server_that_names_no_inputs_needs_declared_ones() -> None:
    """The message shows what to write."""
    nameless = ModelSpec("m", "1", (), (), 8)
    with pytest.raises(ConfigurationError, match=r"x:FP32\[64\]=p0"):
        tensors_to_feed(nameless, [InputColumns.parse("x=p0")])
    ((spec, _),) = tensors_to_feed(nameless, [InputColumns.parse("x:FP64[1]=p0")])
    assert spec == TensorSpec("x", "FP64", (1,))


def test_many_columns_are_listed_shortly() -> None:
    """A header of a thousand columns does not fill the screen."""
    text = list_columns([f"p{number}" for number in range(1000)])
    assert text.startswith("p0, p1")
    assert text.endswith("(990 more), p998, p999")
