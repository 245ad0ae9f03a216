"""What a request contains besides its tensors: the outputs it asks for, and request parameters.

Triton reads a request-wide ``binary_data_output`` only for outputs that the request does not list, against
the extension's own text, so every listed output carries its own ``binary_data``. It answers a parameter of
a wrong type with a 500 that looks like its own fault, so types are checked before anything is sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from beam_triton.errors import ConfigurationError
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.text import shorten

_MAX_UINT64 = 2**64 - 1
_MIN_INT64 = -(2**63)
# The encoder sets these.
_RESERVED = frozenset({"binary_data_output", "binary_data", "binary_data_size"})
_FLAGS = frozenset({"sequence_start", "sequence_end"})
# `timeout` is in microseconds; of `priority`, 1 is the highest and 0 the model's default.
_COUNTS = frozenset({"priority", "timeout"})


class OutputRequest:
    """The part of a request's JSON that names outputs.

    ``entries`` are names and parameters of the outputs, ``json_text`` is ``,"outputs":[…]`` of them or empty,
    ``parameters`` the request parameters needed with it, and
    ``expected`` the outputs that the answer should hold, as far as the model's outputs are known.
    ``required`` are those that it must hold: the same, unless the request names none. Servers without the
    binary extension give what they give then (MLServer's scikit-learn runtime ``predict``, and
    ``predict_proba`` if that is asked for), and refuse names that were only written into the metadata. Raises
    ConfigurationError for names that the model does not have, and for a classification that is not a
    positive number of classes of a requested output.
    """

    def __init__(
        self,
        model: ModelSpec,
        outputs: Sequence[str] | None,
        classification: Mapping[str, int] | None,
        binary: bool,
    ) -> None:
        known = {spec.name: spec for spec in model.outputs}
        names = list(known) if outputs is None else _checked_names(model, known, outputs)
        classes = _checked_classes(known if outputs is None else names, classification)
        if outputs is None and not known:
            names = list(classes)
        entries: list[dict[str, Any]] = []
        for name in names:
            parameters: dict[str, Any] = {}
            if name in classes:
                parameters["classification"] = classes[name]
            if binary:
                parameters["binary_data"] = True
            entries.append({"name": name, "parameters": parameters} if parameters else {"name": name})
        # Without the binary extension the answer is JSON anyway, and the outputs are the server's choice.
        if outputs is None and not binary and not classes:
            entries = []
        self.json_text = (
            b',"outputs":' + json.dumps(entries, separators=(",", ":")).encode("ascii") if entries else b""
        )
        self.entries = [(entry["name"], entry.get("parameters", {})) for entry in entries]
        self.parameters: dict[str, Any] = {"binary_data_output": True} if binary and not entries else {}
        self.expected = tuple(
            TensorSpec(name, "BYTES", (classes[name],)) if name in classes else known[name]
            for name in names
            if name in known
        )
        self.required = self.expected if entries else ()


def check_request_options(
    outputs: Sequence[str] | None,
    classification: Mapping[str, int] | None,
    input_parameters: Mapping[str, Mapping[str, Any]] | None,
) -> None:
    """Raise ConfigurationError for options that fit no model."""
    OutputRequest(_ANY_MODEL, outputs, classification, binary=True)
    checked_input_parameters(_ANY_MODEL, input_parameters)


_ANY_MODEL = ModelSpec(name="any")


def _checked_names(model: ModelSpec, known: Mapping[str, TensorSpec], outputs: Sequence[str]) -> list[str]:
    is_list = isinstance(outputs, Sequence) and not isinstance(outputs, str)
    if not is_list or not outputs or not all(isinstance(name, str) and name for name in outputs):
        raise ConfigurationError(f"outputs must be a list of output names, not {shorten(outputs)}")
    names = list(outputs)
    if len(set(names)) != len(names):
        raise ConfigurationError(f"outputs {names} name an output twice")
    for name in names:
        if known and name not in known:
            raise ConfigurationError(
                f"model {model.name!r} has no output {shorten(name)}; it has {', '.join(known) or 'none'}"
            )
    return names


def _checked_classes(
    asked: Mapping[str, Any] | Sequence[str], classification: Mapping[str, int] | None
) -> dict[str, int]:
    if classification is None:
        return {}
    if not isinstance(classification, Mapping):
        raise ConfigurationError(
            f"classification must map output names to a number of classes, and is {shorten(classification)}"
        )
    for name, count in classification.items():
        if not isinstance(name, str) or (asked and name not in asked):
            raise ConfigurationError(
                f"classification: {shorten(name)} is not among the requested outputs: {', '.join(asked)}"
            )
        if type(count) is not int or not 0 < count < 2**31:
            raise ConfigurationError(
                f"classification: the number of classes of {name!r} must be a whole number from 1, "
                f"not {shorten(count)}"
            )
    return dict(classification)


def checked_input_parameters(
    model: ModelSpec, parameters: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, dict[str, str | int | float | bool]]:
    """A copy of the parameters of inputs, by the input's name, checked as `checked_parameters` does.

    Raises ConfigurationError, also for an input that the model does not have.
    """
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise ConfigurationError(
            f"input_parameters must map input names to parameters, not be {shorten(parameters)}"
        )
    known = [spec.name for spec in model.inputs]
    for name in parameters:
        if not isinstance(name, str) or (known and name not in known):
            raise ConfigurationError(
                f"input_parameters: model {model.name!r} has no input {shorten(name)}; it has "
                f"{', '.join(known)}"
            )
    return {name: checked_parameters(given) for name, given in parameters.items()}


def checked_parameters(parameters: Mapping[str, Any] | None) -> dict[str, str | int | float | bool]:
    """A copy of request parameters, checked to be of types that Triton reads.

    ``priority`` and ``timeout`` (microseconds) are whole numbers from 0, ``sequence_start`` and
    ``sequence_end`` booleans, ``sequence_id`` a whole number below 2**64 or a string. Any other key holds a
    string, whole number (64 bits), finite float or boolean, and is passed to the model. Raises
    ConfigurationError, also for keys that begin with ``triton_``, which Triton reserves.
    """
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise ConfigurationError(f"request parameters must be a mapping, not {shorten(parameters)}")
    return {key: _checked_parameter(key, value) for key, value in parameters.items()}


def _checked_parameter(key: Any, value: Any) -> str | int | float | bool:
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"a request parameter needs a name, not {shorten(key)}")
    if key.startswith("triton_"):
        raise ConfigurationError(f"request parameter {key!r}: Triton reserves names beginning with 'triton_'")
    if key in _RESERVED:
        raise ConfigurationError(f"request parameter {key!r} is set by the library: leave it out")
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
