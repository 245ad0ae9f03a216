"""A pipeline with the settings found, in Python and in Beam YAML, that runs as it is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from beam_triton.cli.sample import Sample
from beam_triton.protocol import DATATYPES, ModelSpec

# Larger tensors are made by NumPy instead of being written out.
_MOST_WRITTEN_ITEMS = 16
_MOST_WRITTEN_TEXT = 200


@dataclass(frozen=True)
class PipelineCode:
    """``options`` are keyword arguments of `TritonInference`, with ``auth`` as the commands spell it."""

    endpoint: str
    model_name: str
    options: Mapping[str, Any]
    example: Mapping[str, Any]

    def python(self) -> str:
        """A pipeline in Python; without ``auth`` or NumPy nothing of them is imported."""
        values = {name: _python(value) for name, value in self.example.items()}
        element = ", ".join(f"{_literal(name)}: {text}" for name, text in values.items())
        arguments = [_literal(self.endpoint), _literal(self.model_name)]
        for name, value in self.options.items():
            text = f"auth_from_text({_literal(value)})" if name == "auth" else _literal(value)
            arguments.append(f"{name}={text}")
        lines = ["import apache_beam as beam"]
        if any(text.startswith("np.") for text in values.values()):
            lines.append("import numpy as np")
        lines += ["", "from beam_triton import TritonInference"]
        if "auth" in self.options:
            lines.append("from beam_triton.auth import auth_from_text")
        lines += [
            "",
            "with beam.Pipeline() as pipeline:",
            "    scored = (",
            "        pipeline",
            f"        | beam.Create([{{{element}}}])  # your elements",
            "        | TritonInference(",
            *(f"            {argument}," for argument in arguments),
            "        )",
            "    )",
            "    scored | beam.Map(print)",
        ]
        return "\n".join(lines) + "\n"

    def yaml(self) -> str:
        """A pipeline in Beam YAML."""
        settings = {"endpoint": self.endpoint, "model_name": self.model_name, **self.options}
        is_written = not any(isinstance(value, _Made) for value in self.example.values())
        element = _flow(self.example) if is_written else "{number: 1}"
        lines = [
            "pipeline:",
            "  type: chain",
            "  transforms:",
            "    - type: Create  # your elements",
            "      config:",
            f"        elements: [{element}]",
        ]
        if not is_written:
            lines += [
                "    - type: MapToFields",
                "      config:",
                "        language: python",
                "        fields:",
            ]
            for name, value in self.example.items():
                made = value.numpy("numpy") if isinstance(value, _Made) else repr(value)
                lines += [
                    f"          {_flow(name)}:",
                    "            callable: |",
                    "              import numpy",
                    "              def value(row):",
                    f"                return {made}",
                ]
        lines += ["    - type: TritonInference", "      config:"]
        lines += [f"        {name}: {_flow(value)}" for name, value in settings.items()]
        lines += [
            "    - type: LogForTesting",
            "providers:",
            "  - type: python",
            "    config: {}",
            "    transforms: {TritonInference: beam_triton.rows.TritonInference}",
        ]
        return "\n".join(lines) + "\n"


def example_of(sample: Sample, spec: ModelSpec) -> dict[str, Any]:
    """By input, the value of one element: that of the sample, or zeros where it is large."""
    shapes = {tensor.name: shape for tensor, shape in sample.zero_shapes(spec)} if not sample.elements else {}
    datatypes = {tensor.name: tensor.datatype for tensor in spec.inputs}
    if shapes:
        return {name: _zeros(shape, datatypes[name]) for name, shape in shapes.items()}
    first = sample.elements[0]
    if not isinstance(first, Mapping):
        first = {spec.inputs[0].name if spec.inputs else "x": first}
    return {
        name: _written(value, datatypes.get(name))
        for name, value in first.items()
        if not datatypes or name in datatypes
    }


@dataclass(frozen=True)
class _Made:
    """An array that NumPy makes: zeros, or empty strings."""

    shape: tuple[int, ...]
    dtype: str

    def numpy(self, module: str) -> str:
        if self.dtype == "object":
            return f'{module}.full({list(self.shape)}, b"", object)'
        return f'{module}.zeros({list(self.shape)}, "{self.dtype}")'


def _zeros(shape: tuple[int, ...], datatype: str) -> Any:
    kind = DATATYPES[datatype]
    dtype = np.dtype(object) if kind.is_bytes else np.dtype(kind.array_dtype)
    if np.prod(shape, initial=1) > _MOST_WRITTEN_ITEMS:
        return _Made(tuple(shape), dtype.name)
    return np.full(shape, "" if kind.is_bytes else 0, dtype).tolist()


def _written(value: Any, datatype: str | None) -> Any:
    array = np.asarray(value)
    items = array.ravel()[:_MOST_WRITTEN_ITEMS].tolist()
    if array.size <= _MOST_WRITTEN_ITEMS and not any(map(_has_no_literal, items)):
        plain = array.tolist()
        if len(repr(plain)) <= _MOST_WRITTEN_TEXT:
            return plain
    is_text = array.dtype.kind in "OSU"
    return (
        _zeros(array.shape, datatype or "BYTES")
        if is_text or datatype
        else _Made(array.shape, array.dtype.name)
    )


def _has_no_literal(item: Any) -> bool:
    return isinstance(item, bytes) or (isinstance(item, float) and not math.isfinite(item))


def _python(value: Any) -> str:
    return value.numpy("np") if isinstance(value, _Made) else _literal(value)


def _literal(value: Any) -> str:
    """Plain data as formatters write it in Python."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(each)}' for name, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def _flow(value: Any) -> str:
    """YAML of one line: JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)
