"""`FakeModel`: a Python function that `FakeTriton` serves as a model."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beam_triton.errors import ConfigurationError, InferenceError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.protocol.datatypes import Array
from beam_triton.testing.server_codec import InferRequest, RefusedError, wire_array

ModelFunction = Callable[[dict[str, Array]], Mapping[str, Any]]
"""Input name to array in, output name to array-like out."""

Tensors = Mapping[str, tuple[str, Sequence[int]]]
"""Tensor name to its datatype and shape: ``{"image": ("FP32", [64])}``."""


@dataclass(frozen=True)
class FakeModel:
    """A model of `FakeTriton`: a function, and what its metadata says of inputs and outputs.

    ::

        FakeModel(
            lambda inputs: {"y": 2 * inputs["x"]},
            inputs={"x": ("FP32", [4])},
            outputs={"y": ("FP32", [4])},
        )

    Args:
      function: takes a dict of input name to array, gives a dict of output name to array-like. Arrays have
        the batch dimension first where ``max_batch_size`` is above 0: ``inputs["x"]`` of the example has
        shape ``(rows, 4)``. BYTES are object arrays of ``bytes`` (``str`` is accepted as output), BF16 is
        float32. Calls for one model come one at a time. An exception is answered with status 500, as a
        raising Python model's is; an `InferenceError` with its own ``status`` and message.
      inputs: input name to datatype and shape; the shape is one element's, -1 is any size.
      outputs: the same for outputs. The function's arrays may have other shapes: they are sent as they are.
      max_batch_size: the most rows that a request may have; 0 makes a model without a batch dimension.
      optional_inputs: names of inputs that a request may leave out; the function does not get them then.
      labels: output name to the labels of its classes, for requests with ``classification``.
      versions: the versions that are served; requests without a version get the last one.

    Raises:
      ConfigurationError: a datatype, shape, name or size cannot be a model's.
    """

    function: ModelFunction
    inputs: Tensors = field(kw_only=True)
    outputs: Tensors = field(kw_only=True)
    max_batch_size: int = field(default=64, kw_only=True)
    optional_inputs: Collection[str] = field(default=(), kw_only=True)
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict, kw_only=True)
    versions: Sequence[str] = field(default=("1",), kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigurationError(f"a FakeModel needs a function, not {self.function!r}")
        if not self.versions or not all(isinstance(each, str) and each.isdigit() for each in self.versions):
            raise ConfigurationError(f"versions must be numbers as text such as '1', not {self.versions!r}")
        for name in self.optional_inputs:
            if name not in self.inputs:
                raise ConfigurationError(
                    f"optional_inputs name {name!r}, which is none of {list(self.inputs)}"
                )
        self.spec("any", self.versions[-1])

    def spec(self, name: str, version: str) -> ModelSpec:
        """The model as a client sees it under a name."""
        return ModelSpec(
            name=name,
            version=version,
            inputs=_tensor_specs(self.inputs, self.optional_inputs),
            outputs=_tensor_specs(self.outputs, ()),
            max_batch_size=self.max_batch_size,
            versions=tuple(self.versions),
            platform="python",
        )


def _tensor_specs(tensors: Tensors, optional: Collection[str]) -> tuple[TensorSpec, ...]:
    specs = []
    for name, given in tensors.items():
        try:
            datatype, shape = given
            specs.append(TensorSpec(name, datatype, tuple(shape), optional=name in optional))
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"tensor {name!r} needs a datatype and a shape such as ('FP32', [4]), not {given!r}"
            ) from None
    return tuple(specs)


class ServedModel:
    """A `FakeModel` under its name, loaded or not, with the counts that statistics show."""

    def __init__(self, name: str, model: FakeModel) -> None:
        self.specs = {version: model.spec(name, version) for version in model.versions}
        self.labels = model.labels
        self.is_loaded = True
        self._name = name
        self._function = model.function
        self._lock = threading.Lock()
        self._statistics = {version: _Statistics() for version in model.versions}

    @property
    def spec(self) -> ModelSpec:
        """The model in the version that requests without one get."""
        return list(self.specs.values())[-1]

    def run(self, spec: ModelSpec, request: InferRequest) -> dict[str, Array]:
        """Every output of the model. Raises RefusedError where the function raises."""
        # The function may change its arguments; those of the request are views of its bytes.
        inputs = {name: array.copy() for name, array in request.inputs.items()}
        with self._lock:
            statistics = self._statistics[spec.version]
            started = time.perf_counter_ns()
            try:
                outputs = _outputs(spec, self._function(inputs))
            except Exception as error:
                statistics.add_failure(time.perf_counter_ns() - started)
                if isinstance(error, InferenceError) and error.status:
                    raise RefusedError(error.status, error.message) from None
                raise self._raised(error) from error
            statistics.add_success(request.batch_size, time.perf_counter_ns() - started)
        return outputs

    def _raised(self, error: Exception) -> RefusedError:
        frames = reversed(traceback.extract_tb(error.__traceback__)[1:])
        at = "".join(f"  {frame.filename}({frame.lineno}): {frame.name}\n" for frame in frames)
        return RefusedError(
            500,
            f"Failed to process the request(s) for model '{self._name}_0_0', message: "
            f"{type(error).__name__}: {error}\n\nAt:\n{at}",
        )

    def statistics(self, version: str) -> dict[str, Any]:
        return {"name": self._name, "version": version, **self._statistics[version].document()}


def model_metadata(spec: ModelSpec, versions: Sequence[str]) -> dict[str, Any]:
    """What ``GET /v2/models/{m}`` answers with; shapes have the batch dimension."""
    batch = [-1] if spec.has_batch_dimension else []
    sides = {
        side: [
            {"name": each.name, "datatype": each.datatype, "shape": [*batch, *each.shape]} for each in tensors
        ]
        for side, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs))
    }
    return {"name": spec.name, "versions": list(versions), "platform": spec.platform, **sides}


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """The model configuration, as far as clients read it; dims have no batch dimension."""
    return {
        "name": spec.name,
        "platform": "",
        "backend": "python",
        "version_policy": {"all": {}},
        "max_batch_size": spec.max_batch_size,
        "input": [{**_config_of(each), "optional": each.optional} for each in spec.inputs],
        "output": [{**_config_of(each), "label_filename": ""} for each in spec.outputs],
        "instance_group": [{"name": f"{spec.name}_0", "kind": "KIND_CPU", "count": 1, "gpus": []}],
        "parameters": {},
    }


def _config_of(spec: TensorSpec) -> dict[str, Any]:
    datatype = {"BYTES": "STRING"}.get(spec.datatype, spec.datatype)
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(spec.shape)}


def _outputs(spec: ModelSpec, given: Mapping[str, Any]) -> dict[str, Array]:
    names = [each.name for each in spec.outputs]
    if not isinstance(given, Mapping) or set(given) != set(names):
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise TypeError(f"the function of FakeModel {spec.name!r} must give a dict of {names}, not {got}")
    return {each.name: wire_array(given[each.name], each) for each in spec.outputs}


class _Statistics:
    """Counts and durations of one version, as ``GET /v2/models/{m}/stats`` gives them."""

    def __init__(self) -> None:
        self._succeeded = _Duration()
        self._failed = _Duration()
        self._rows = 0
        self._last_inference_ms = 0
        self._by_batch_size: dict[int, _Duration] = {}

    def add_failure(self, duration_ns: int) -> None:
        self._last_inference_ms = time.time_ns() // 1_000_000
        self._failed.add(duration_ns)

    def add_success(self, batch_size: int, duration_ns: int) -> None:
        self._last_inference_ms = time.time_ns() // 1_000_000
        self._succeeded.add(duration_ns)
        self._rows += batch_size
        self._by_batch_size.setdefault(batch_size, _Duration()).add(duration_ns)

    def document(self) -> dict[str, Any]:
        nothing, ran = _Duration().document(), self._succeeded.document()
        moved = {**nothing, "count": ran["count"]}
        return {
            "last_inference": self._last_inference_ms,
            "inference_count": self._rows,
            "execution_count": ran["count"],
            "inference_stats": {
                "success": ran,
                "fail": self._failed.document(),
                "queue": moved,
                "compute_input": moved,
                "compute_infer": ran,
                "compute_output": moved,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": {**nothing, "count": duration.count},
                    "compute_infer": duration.document(),
                    "compute_output": {**nothing, "count": duration.count},
                }
                for size, duration in sorted(self._by_batch_size.items())
            ],
            "memory_usage": [],
        }


class _Duration:
    def __init__(self) -> None:
        self.count = 0
        self._ns = 0

    def add(self, duration_ns: int) -> None:
        self.count += 1
        self._ns += duration_ns

    def document(self) -> dict[str, int]:
        return {"count": self.count, "ns": self._ns}
