"""The models that tests serve on a real Triton, and a function that writes them into a model repository.

    write_models(folder)                        every model that loads
    write_models(folder, ["echo", "rejecting"]) these only

`sleeping` makes further ones.

The models' Python code is in ``tests/models`` and runs in the server's environment.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beam_triton.testing import LocalTriton

_SOURCES = Path(__file__).resolve().parent.parent / "models"

DATATYPES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "BYTES", "BF16"),
)

LABELS = ("ant", "bee", "cat", "dog")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of the model configuration; ``dims`` leave out the batch dimension."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """One model: its configuration and the file of ``tests/models`` that computes it.

    ``max_batch_size`` 0 means that the model has no batch dimension. ``settings`` are lines of the model
    configuration that have no field here. A model without ``source`` is an ensemble.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    source: str = "functions"
    max_batch_size: int = 32
    instances: int = 1
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: str = ""
    versions: tuple[int, ...] = (1,)
    loads: bool = True

    def config(self) -> str:
        """The model's ``config.pbtxt``."""
        parts = [f'name: "{self.name}"', f"max_batch_size: {self.max_batch_size}"]
        if self.source:
            parts.append('backend: "python"')
            parts.append(f"instance_group [ {{ kind: KIND_CPU count: {self.instances} }} ]")
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                parts.append(f"{kind} [ {{ {_tensor_fields(tensor)} }} ]")
        for key, value in self.parameters.items():
            parts.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
        return "\n".join([*parts, self.settings.strip()]) + "\n"

    def write(self, repository: Path) -> None:
        """Write the model's folder into the repository."""
        folder = repository / self.name
        for version in self.versions:
            (folder / str(version)).mkdir(parents=True)
            if self.source:
                shutil.copyfile(_SOURCES / f"{self.source}.py", folder / str(version) / "model.py")
        for tensor in self.outputs:
            if tensor.labels:
                (folder / f"{tensor.name}.txt").write_text("\n".join(tensor.labels) + "\n")
        (folder / "config.pbtxt").write_text(self.config())


def _tensor_fields(tensor: Tensor) -> str:
    datatype = {"BYTES": "STRING"}.get(tensor.datatype, tensor.datatype)
    fields = [f'name: "{tensor.name}"', f"data_type: TYPE_{datatype}", f"dims: {list(tensor.dims)}"]
    if tensor.optional:
        fields.append("optional: true")
    if tensor.labels:
        fields.append(f'label_filename: "{tensor.name}.txt"')
    return " ".join(fields)


def _function(
    name: str,
    function: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    max_batch_size: int = 32,
    instances: int = 1,
    settings: str = "",
) -> Model:
    return Model(
        name,
        tuple(inputs),
        tuple(outputs),
        max_batch_size=max_batch_size,
        instances=instances,
        parameters={"function": function},
        settings=settings,
    )


def _identity(
    name: str,
    tensors: Mapping[str, tuple[int, ...]],
    *,
    max_batch_size: int = 64,
    instances: int = 1,
    sleep_seconds: float = 0,
    sleep_seconds_a_row: float = 0,
    max_rows: int = 0,
    settings: str = "",
) -> Model:
    """A model with an input and an output of each datatype named: x and y if it is one, x_fp32, … if many."""
    suffixes = {datatype: f"_{datatype.lower()}" if len(tensors) > 1 else "" for datatype in tensors}
    return Model(
        name,
        tuple(Tensor("x" + suffixes[datatype], datatype, dims) for datatype, dims in tensors.items()),
        tuple(Tensor("y" + suffixes[datatype], datatype, dims) for datatype, dims in tensors.items()),
        source="identity",
        max_batch_size=max_batch_size,
        instances=instances,
        parameters={
            name: str(value)
            for name, value in (
                ("sleep_seconds", sleep_seconds),
                ("sleep_seconds_a_row", sleep_seconds_a_row),
                ("max_rows", max_rows),
            )
            if value
        },
        settings=settings,
    )


def sleeping(
    name: str,
    seconds: float,
    *,
    seconds_a_row: float = 0.0,
    instances: int = 1,
    max_batch_size: int = 20,
    max_rows: int = 0,
    settings: str = "",
) -> Model:
    """Returns x, FP32 of shape [1], as y after a pause; with ``max_rows`` larger batches get a 500.

    The pause is ``seconds`` an execution, and ``seconds_a_row`` more for each of its elements.
    """
    return _identity(
        name,
        {"FP32": (1,)},
        max_batch_size=max_batch_size,
        instances=instances,
        sleep_seconds=seconds,
        sleep_seconds_a_row=seconds_a_row,
        max_rows=max_rows,
        settings=settings,
    )


def _on_negative(name: str, fault: str) -> Model:
    return Model(
        name,
        (Tensor("x", "FP32", (1,)),),
        (Tensor("y", "FP32", (1,)),),
        source="on_negative",
        max_batch_size=256,
        parameters={"on_negative": fault},
    )


_X = Tensor("x", "FP32", (4,))
_Y = Tensor("y", "FP32", (4,))
_ONE_X = Tensor("x", "FP32", (1,))
_ONE_Y = Tensor("y", "FP32", (1,))

_ENSEMBLE = """
platform: "ensemble"
ensemble_scheduling {
  step [
    { model_name: "double" model_version: -1 input_map { key: "x" value: "x" }
      output_map { key: "y" value: "half_way" } },
    { model_name: "double" model_version: -1 input_map { key: "x" value: "half_way" }
      output_map { key: "y" value: "y" } }
  ]
}
"""


def _sequence_batching(strategy: str, idle_seconds: float = 30.0) -> str:
    return f"""
sequence_batching {{
  {strategy}
  max_sequence_idle_microseconds: {round(idle_seconds * 1e6)}
  control_input [
    {{ name: "START" control [ {{ kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "END" control [ {{ kind: CONTROL_SEQUENCE_END fp32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "READY" control [ {{ kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }} ] }}
  ]
}}
"""


def _running_sum(name: str, strategy: str, *, max_batch_size: int = 8, idle_seconds: float = 30.0) -> Model:
    return Model(
        name,
        (Tensor("x", "INT32", (1,)),),
        (Tensor("y", "INT32", (1,)),),
        source="running_sum",
        max_batch_size=max_batch_size,
        settings=_sequence_batching(strategy, idle_seconds),
    )


_SHORT_QUEUE = """
dynamic_batching {
  default_queue_policy {
    max_queue_size: 2
    default_timeout_microseconds: 20000000
    allow_timeout_override: true
  }
}
"""

_MODELS = (
    # Every datatype in both directions, alone and all in one request.
    *(_identity(f"identity_{datatype.lower()}", {datatype: (-1,)}) for datatype in DATATYPES),
    _identity("every_datatype", dict.fromkeys(DATATYPES, (-1,)), max_batch_size=8),
    # Load: a fast server, and one as slow as a busy GPU far away.
    _identity("echo", {"FP32": (128,)}, max_batch_size=1024, instances=2),
    _identity("echo_variable", {"FP32": (-1,)}, max_batch_size=1024, instances=2),
    _identity("remote_like", {"FP32": (128,)}, instances=16, sleep_seconds=0.02),
    # A configuration that promises more rows than there is memory for.
    _identity("short_of_memory", {"FP32": (1,)}, sleep_seconds=0.02, max_rows=32),
    # Shapes and numbers of tensors.
    _function(
        "sum_and_difference",
        "sum_and_difference",
        [Tensor("a", "INT32", (16,)), Tensor("b", "INT32", (16,))],
        [Tensor("sum", "INT32", (16,)), Tensor("difference", "INT32", (16,))],
    ),
    _function("optional_input", "scale", [_X, Tensor("factor", "FP32", (1,), optional=True)], [_Y]),
    _function(
        "ragged",
        "ragged",
        [Tensor("values", "FP32", (-1,))],
        [Tensor("total", "FP32", (1,)), Tensor("doubled", "FP32", (-1,))],
    ),
    _function(
        "attend",
        "attend",
        [Tensor("input_ids", "INT64", (-1,)), Tensor("attention_mask", "INT64", (-1,))],
        [Tensor("mean", "FP32", (1,)), Tensor("centred", "FP32", (-1,)), Tensor("width", "INT64", (1,))],
        max_batch_size=64,
        instances=2,
    ),
    _function("transpose", "transpose", [Tensor("x", "FP32", (-1, -1))], [Tensor("y", "FP32", (-1, -1))]),
    _function(
        "unbatched",
        "add_one",
        [Tensor("x", "FP32", (-1, 4))],
        [Tensor("y", "FP32", (-1, 4))],
        max_batch_size=0,
    ),
    _function("empty_output", "empty", [Tensor("x", "FP32", (-1,))], [Tensor("y", "FP32", (-1,))]),
    _function("zeros", "zeros", [Tensor("count", "INT32", (1,))], [Tensor("y", "FP32", (-1,))]),
    _function(
        "shout",
        "shout",
        [Tensor("text", "BYTES", (1,))],
        [Tensor("loud", "BYTES", (1,)), Tensor("length_bytes", "INT64", (1,))],
    ),
    _function("classifier", "classify", [_X], [Tensor("scores", "FP32", (4,), labels=LABELS)]),
    # Kinds of models.
    _function("double", "double", [_X], [_Y]),
    Model("ensemble", (_X,), (_Y,), source="", settings=_ENSEMBLE),
    # Running sums of the elements of a sequence, by both strategies of the sequence batcher.
    _running_sum("running_sum", "direct {}"),
    _running_sum("running_sum_oldest", "oldest { max_candidate_sequences: 20000 }", idle_seconds=600),
    # Four places for sequences, which go to others after half a second of idleness.
    _running_sum("running_sum_forgetful", "oldest { max_candidate_sequences: 4 }", idle_seconds=0.5),
    Model(
        "countdown",
        (Tensor("count", "INT32", (1,)),),
        (Tensor("left", "INT32", (1,)),),
        source="countdown",
        max_batch_size=0,
        settings="model_transaction_policy { decoupled: true }",
    ),
    Model(
        "storyteller",
        (Tensor("text_input", "BYTES", (1,)), Tensor("stream", "BOOL", (1,), optional=True)),
        (Tensor("text_output", "BYTES", (1,)), Tensor("length", "INT32", (1,))),
        source="storyteller",
        max_batch_size=0,
        settings="model_transaction_policy { decoupled: true }",
    ),
    Model(
        "request_facts",
        (_ONE_X,),
        (Tensor("facts", "BYTES", (1,)),),
        source="request_facts",
        versions=(1, 3),
        settings="version_policy { all {} }",
    ),
    # Its versions are told apart by their answers; all three are served.
    Model(
        "versioned",
        (_ONE_X,),
        (_ONE_Y,),
        source="adds_version",
        versions=(1, 2, 3),
        settings="version_policy { all {} }",
    ),
    # Time, queues and faults.
    _function("slow", "sleep", [_ONE_X], [_ONE_Y], instances=4),
    _identity("full_queue", {"FP32": (1,)}, max_batch_size=4, sleep_seconds=0.05, settings=_SHORT_QUEUE),
    _identity(
        "prioritized",
        {"FP32": (1,)},
        max_batch_size=1,
        sleep_seconds=0.05,
        settings="dynamic_batching { priority_levels: 3 default_priority_level: 2 }",
    ),
    _on_negative("rejecting", "invalid_argument"),
    _on_negative("raising", "raise"),
    _on_negative("unavailable", "unavailable"),
    _on_negative("crashing", "exit"),
    _on_negative("hanging", "hang"),
    _function("one_row_less", "one_row_less", [_ONE_X], [_ONE_Y]),
    Model("broken", (_ONE_X,), (_ONE_Y,), source="broken", loads=False),
)

CATALOGUE: Mapping[str, Model] = {model.name: model for model in _MODELS}


def write_models(
    repository: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    **changes: object,
) -> Path:
    """Write models into a folder that a Triton can serve, and return it; None means all that load.

    ``changes`` are fields of `Model` to replace in each: ``write_models(folder, ["echo"], instances=1)``.
    """
    folder = Path(repository)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [model for model in _MODELS if model.loads] if names is None else [CATALOGUE[n] for n in names]
    for model in chosen:
        dataclasses.replace(model, **changes).write(folder)  # type: ignore[arg-type]
    return folder


class ReplaceableModel:
    """A model that a running Triton serves, and that can be replaced by others of its name."""

    def __init__(self, repository: Path, model: Model, triton: LocalTriton) -> None:
        self._repository = repository
        self._model = model
        self._triton = triton
        self.endpoint = triton.endpoint

    def replace(self, **changes: Any) -> None:
        """Serve the model with these changes to its fields."""
        shutil.rmtree(self._repository / self._model.name)
        dataclasses.replace(self._model, **changes).write(self._repository)
        self._triton.load_model(self._model.name)


@contextmanager
def replaceable(repository: Path, model: Model) -> Iterator[ReplaceableModel]:
    """A Triton with that model only, of a repository that is made for it."""
    model.write(repository)
    with throwaway_triton(repository, models_control="explicit", load_models=[model.name]) as triton:
        yield ReplaceableModel(repository, model, triton)


def throwaway_triton(repository: Path, **options: Any) -> LocalTriton:
    """A server for one test, killed at its end: Python models take four seconds to stop properly."""
    return LocalTriton(repository, stop_timeout_seconds=0.1, **options)
