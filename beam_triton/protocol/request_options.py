"""Which outputs a request asks for, and in what form.

Triton reads a request-wide ``binary_data_output`` only for outputs that the request does not list, against
the extension's own text: every listed output carries its own ``binary_data``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from beam_triton.errors import ConfigurationError
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.text import shorten


class OutputRequest:
    """The part of a request's JSON that names outputs.

    ``json_text`` is ``,"outputs":[…]`` or empty, ``parameters`` what the request's own parameters must hold
    besides, ``expected`` the outputs that the answer should bring, as far as the model's are known.
    Raises ConfigurationError for names that the model does not have, and for a classification that is not a
    positive number of classes of an output that is asked for.
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
        # Without the binary extension an answer is JSON anyway, and all outputs are the default.
        if outputs is None and not binary and not classes:
            entries = []
        self.json_text = (
            b',"outputs":' + json.dumps(entries, separators=(",", ":")).encode("ascii") if entries else b""
        )
        self.parameters: dict[str, Any] = {"binary_data_output": True} if binary and not entries else {}
        self.expected = tuple(
            TensorSpec(name, "BYTES", (classes[name],)) if name in classes else known[name]
            for name in names
            if name in known
        )


def check_output_options(outputs: Sequence[str] | None, classification: Mapping[str, int] | None) -> None:
    """Refuse, with ConfigurationError, what fits no model."""
    OutputRequest(_ANY_MODEL, outputs, classification, binary=True)


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
            f"classification must map output names to a number of classes, not be {shorten(classification)}"
        )
    for name, count in classification.items():
        if not isinstance(name, str) or (asked and name not in asked):
            raise ConfigurationError(
                f"classification: {shorten(name)} is not among the outputs that are asked for: "
                f"{', '.join(asked)}"
            )
        if type(count) is not int or not 0 < count < 2**31:
            raise ConfigurationError(
                f"classification: the number of classes of {name!r} must be a whole number from 1, "
                f"not {shorten(count)}"
            )
    return dict(classification)
