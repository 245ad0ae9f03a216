"""Request parameters: what goes to the server, and what Triton would answer with a 500."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import checked_parameters


@pytest.mark.parametrize(
    "parameters",
    [
        {"priority": 0},
        {"priority": 1, "timeout": 500_000},
        {"sequence_id": 2**64 - 1, "sequence_start": True, "sequence_end": False},
        {"sequence_id": "user-7"},
        {"tag": "a", "count": -5, "ratio": 0.5, "flag": True},
        {"count": -(2**63)},
        {},
    ],
)
def test_valid_request_parameters_are_copied(parameters: dict[str, Any]) -> None:
    """The protocol's own parameters and custom ones of every type, as an equal copy."""
    checked = checked_parameters(parameters)
    assert checked == parameters and checked is not parameters


def test_no_parameters_are_an_empty_mapping() -> None:
    """None means no parameters."""
    assert checked_parameters(None) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("priority", "1"),
        ("priority", -1),
        ("priority", 1.0),
        ("priority", True),
        ("timeout", -1),
        ("timeout", 0.5),
        ("sequence_id", 1.5),
        ("sequence_id", -1),
        ("sequence_id", 2**64),
        ("sequence_id", True),
        ("sequence_start", 1),
        ("sequence_end", "true"),
        ("triton_enable_empty_final_response", True),
        ("binary_data_output", False),
        ("tag", None),
        ("tag", [1]),
        ("tag", {"a": 1}),
        ("tag", b"a"),
        ("tag", 2**64),
        ("tag", float("nan")),
        ("tag", float("inf")),
        ("tag", np.int64(1)),
        ("", 1),
        (3, 1),
    ],
)
def test_invalid_request_parameters_are_refused(key: Any, value: Any) -> None:
    """The message names the parameter."""
    with pytest.raises(ConfigurationError, match="parameter"):
        checked_parameters({key: value})


def test_parameters_must_be_a_mapping() -> None:
    """A list of pairs is not one."""
    with pytest.raises(ConfigurationError, match="mapping"):
        checked_parameters([("priority", 1)])  # type: ignore[arg-type]
