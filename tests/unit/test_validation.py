"""Option classes: rules that name field and value, and plain dicts."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.validation import (
    Options,
    Rule,
    boolean,
    check,
    fraction,
    not_negative,
    not_negative_integer,
    one_of,
    positive,
    positive_integer,
)


@dataclass(frozen=True, kw_only=True)
class Tank(Options):
    volume: float
    pumps: int | None = None

    def __post_init__(self) -> None:
        check(self, positive, "volume")
        check(self, positive_integer, "pumps", allow_none=True)


def test_options_are_read_from_a_dict() -> None:
    """A dict gives the same options as the constructor."""
    assert Tank.from_options({"volume": 2, "pumps": 3}) == Tank(volume=2, pumps=3)


def test_an_instance_of_options_is_returned_itself() -> None:
    """It is not copied."""
    tank = Tank(volume=1.0)
    assert Tank.from_options(tank) is tank


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    """The message suggests the option that was probably meant, and lists all."""
    with pytest.raises(
        ConfigurationError, match=r"Tank has no option 'pump' \(did you mean 'pumps'\?\)"
    ) as e:
        Tank.from_options({"volume": 1, "pump": 1})
    assert "its options: volume, pumps" in str(e.value)


def test_an_option_key_that_is_not_a_string_is_refused() -> None:
    """A dict from elsewhere may have keys that are not strings."""
    with pytest.raises(ConfigurationError, match="Tank has no option 3; its options"):
        Tank.from_options({3: 1})  # type: ignore[dict-item]  # what YAML may hand over


@pytest.mark.parametrize("value", [None, {}])
def test_a_missing_option_is_named(value: dict[str, object] | None) -> None:
    """An option without a default has to be given."""
    with pytest.raises(ConfigurationError, match="Tank needs the option 'volume'"):
        Tank.from_options(value)


def test_another_type_is_refused_without_its_value() -> None:
    """Only the type is named: the value may be a misplaced secret."""
    with pytest.raises(ConfigurationError, match="expected a Tank or a dict of its options, got str") as e:
        Tank.from_options("hunter2")  # type: ignore[arg-type]  # the mistake under test
    assert "hunter2" not in str(e.value)


def test_a_rule_names_class_field_and_value() -> None:
    """The message names the field and shows its value."""
    with pytest.raises(ConfigurationError, match=r"^Tank\.volume must be a number above 0, got -1$"):
        Tank(volume=-1)


def test_options_hash_and_pickle() -> None:
    """Options are pickled to the workers and are dictionary keys there."""
    tank = Tank(volume=1.5, pumps=2)
    assert {pickle.loads(pickle.dumps(tank)): 1}[tank] == 1


NAN, INF, HUGE = math.nan, math.inf, 10**400


@pytest.mark.parametrize(
    ("rule", "accepted", "refused"),
    [
        (positive, [1, 0.5, np.float32(2), Fraction(1, 3)], [0, -1, NAN, INF, HUGE, "1", True, None, 1j]),
        (not_negative, [0, 0.0, 3], [-0.1, NAN, INF, -HUGE, "0", False, None]),
        (fraction, [1, 1.0, 0.001], [0, 1.1, NAN, True, "0.5", None]),
        (positive_integer, [1, 7, np.int64(3)], [0, -1, 1.0, 1.5, True, "1", None]),
        (not_negative_integer, [0, 7, np.int64(3)], [-1, 0.0, False, "0", None]),
        (boolean, [True, False], [0, 1, None, "true"]),
        (one_of((None, "gzip")), [None, "gzip"], ["GZIP", "", 0]),
        (one_of((0, 1)), [0, 1], [False, True, 1.0]),
    ],
)
def test_rules_accept_and_refuse_values(rule: Rule, accepted: list[object], refused: list[object]) -> None:
    """Each rule accepts its numbers and refuses bools, strings, NaN and whatever is out of range."""
    for value in accepted:
        rule("field", value)
    for value in refused:
        with pytest.raises(ConfigurationError, match=r"^field must be "):
            rule("field", value)


def test_a_long_value_is_shortened_in_the_message() -> None:
    """A value of any length gives a message of one line."""
    with pytest.raises(ConfigurationError) as e:
        positive("field", "x" * 10_000)
    assert len(str(e.value)) < 200
