"""Request parameters: what Triton defines, what it reserves, and what a model may be given besides.

Triton answers a wrong type here with a 500 that looks like its own fault, so that types are checked before
anything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from beam_triton.errors import ConfigurationError
from beam_triton.protocol.text import shorten

_MAX_UINT64 = 2**64 - 1
_MIN_INT64 = -(2**63)
# They belong to whoever encodes the tensors.
_OURS = frozenset({"binary_data_output", "binary_data", "binary_data_size"})
_FLAGS = frozenset({"sequence_start", "sequence_end"})
# `timeout` is in microseconds; of `priority`, 1 is the highest and 0 the model's default.
_COUNTS = frozenset({"priority", "timeout"})


def checked_parameters(parameters: Mapping[str, Any] | None) -> dict[str, str | int | float | bool]:
    """A copy of request parameters, each known to be something that Triton can read.

    ``priority`` and ``timeout`` (microseconds) are whole numbers from 0, ``sequence_start`` and
    ``sequence_end`` booleans, ``sequence_id`` a whole number below 2**64 or a string; any other key holds a
    string, whole number (64 bits), finite float or boolean, and goes to the model. Raises
    ConfigurationError, also for keys that begin with ``triton_``, which Triton reserves.
    """
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise ConfigurationError(f"request parameters must be a mapping, not {shorten(parameters)}")
    return {key: _checked(key, value) for key, value in parameters.items()}


def _checked(key: Any, value: Any) -> str | int | float | bool:
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"a request parameter needs a name, not {shorten(key)}")
    if key.startswith("triton_"):
        raise ConfigurationError(f"request parameter {key!r}: Triton reserves names beginning with 'triton_'")
    if key in _OURS:
        raise ConfigurationError(f"request parameter {key!r} is set by the library itself")
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if key in _FLAGS and not isinstance(value, bool):
        raise ConfigurationError(f"request parameter {key!r} must be True or False, not {shorten(value)}")
    if key in _COUNTS and not (is_whole and 0 <= value <= _MAX_UINT64):
        raise ConfigurationError(
            f"request parameter {key!r} must be a whole number from 0, not {shorten(value)}"
        )
    if key == "sequence_id" and not (isinstance(value, str) or (is_whole and 0 <= value <= _MAX_UINT64)):
        raise ConfigurationError(
            f"request parameter 'sequence_id' must be a whole number from 0 or a string, not {shorten(value)}"
        )
    if isinstance(value, (str, bool)):
        return value
    if is_whole and _MIN_INT64 <= value <= _MAX_UINT64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ConfigurationError(
        f"request parameter {key!r} must be a string, a whole number of 64 bits, a finite float "
        f"or a boolean, not {shorten(value)}"
    )
