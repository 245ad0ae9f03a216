"""A model's inputs and outputs: tensor names, datatypes, shapes and the batch limit.

They are read from the server's model metadata (Open Inference Protocol) and, if the server has one, from
Triton's model configuration. Shapes in Triton's metadata include the batch dimension, ``dims`` in the
configuration do not; here, shapes never do.

Servers without a configuration do not say whether a model takes batches. Their metadata mostly show it: a
first dimension of -1 that all inputs and outputs have is the batch, a first dimension of 1 is a batch of one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from beam_triton.errors import ConfigurationError, RemoteProtocolError
from beam_triton.protocol.datatypes import DATATYPES
from beam_triton.protocol.lock_file import contract_of, lock_text
from beam_triton.protocol.text import shorten
from beam_triton.validation import from_mapping

DEFAULT_MAX_BATCH_SIZE = 32
"""Elements a request where the metadata show a batch dimension, and nothing says how long it may be.

Enough that the fixed cost of a request (a millisecond or two in a Python server) is small beside its
elements'; few enough for a model that was tried with single requests only. A size that turns out too large is
learned.
"""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: ``shape`` is one element's, without the batch dimension; -1 is any size.

    ``optional`` inputs may be left out of an element. Raises ConfigurationError for an unknown datatype, an
    empty name or a dimension below -1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigurationError(f"a tensor needs a name, not {self.name!r}")
        if self.datatype not in DATATYPES:
            raise ConfigurationError(
                f"tensor {self.name!r}: datatype {self.datatype!r} is not one of {', '.join(DATATYPES)}"
            )
        shape = tuple(self.shape)
        if any(type(dim) is not int or dim < -1 for dim in shape):
            raise ConfigurationError(
                f"tensor {self.name!r}: shape {list(shape)!r} must hold whole numbers, -1 for any size"
            )
        object.__setattr__(self, "shape", shape)

    def plain(self) -> dict[str, Any]:
        """As a dict of JSON values, ``optional`` only where it is so."""
        plain: dict[str, Any] = {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}
        return {**plain, "optional": True} if self.optional else plain

    def describe(self) -> str:
        """For messages: ``image FP32 [64]``."""
        return f"{self.name} {self.datatype} {list(self.shape)}{' (optional)' if self.optional else ''}"


@dataclass(frozen=True)
class ModelSpec:
    """A model as its server describes it; may be written by hand if no server is available.

    ``max_batch_size`` is the number of elements that a request may hold; 0 means that the model has no
    batch dimension and a request is one element. ``inputs == ()`` means that the server did not name them
    (MLServer may not): names and datatypes then come from the elements. ``versions`` are those that the
    server has ready, ``version`` the one that it serves to requests that name none, as far as the metadata
    shows. ``decoupled`` models answer a request with any number of responses, which ``/infer`` refuses;
    ``sequence_batching`` models need ``sequence_id`` with every request, of one element each, and get it as
    ``correlation_id_datatype``, where the configuration says so.
    ``whole_outputs`` names outputs without a batch dimension of a model that has one otherwise: such an
    output belongs to the request as a whole, and cannot be divided among its elements. ``lock_file`` is the
    file that `load` read it from: workers compare the served model with it. ``instances`` execute requests
    at a time, and ``priority_levels`` is the lowest priority that a request may have: both are 0 where that
    is not known, or not so. With ``shares_executions`` the server may execute a request together with others,
    which all fail if the model raises: it has dynamic batching, or is an ensemble, whose models may.
    """

    name: str
    version: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int = 0
    versions: tuple[str, ...] = ()
    platform: str = ""
    decoupled: bool = False
    sequence_batching: bool = False
    correlation_id_datatype: str = ""
    whole_outputs: tuple[str, ...] = ()
    lock_file: str = field(default="", compare=False)
    instances: int = field(default=0, compare=False)
    priority_levels: int = field(default=0, compare=False)
    shares_executions: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigurationError(f"a model needs a name, not {self.name!r}")
        _check_max_batch_size(self.name, self.max_batch_size)
        for side in ("inputs", "outputs"):
            specs = tuple(getattr(self, side))
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ConfigurationError(f"model {self.name!r}: {side} {names} name a tensor twice")
            object.__setattr__(self, side, specs)
        object.__setattr__(self, "versions", tuple(self.versions))
        object.__setattr__(self, "whole_outputs", tuple(self.whole_outputs))

    @property
    def has_batch_dimension(self) -> bool:
        """Whether requests hold several elements along a first dimension."""
        return self.max_batch_size > 0

    @property
    def model_id(self) -> str:
        """``name:version``, or the name alone if the version is not known."""
        return f"{self.name}:{self.version}" if self.version else self.name

    def takes_and_gives_as(self, other: ModelSpec) -> bool:
        """Whether requests and answers of the two models are alike, whatever their versions."""
        return replace(self, version="", versions=(), platform="") == replace(
            other, version="", versions=(), platform=""
        )

    def describe(self) -> str:
        """One line for messages: inputs, outputs and the number of elements that a request may hold."""
        inputs = ", ".join(spec.describe() for spec in self.inputs) or "not named by the server"
        outputs = ", ".join(spec.describe() for spec in self.outputs) or "not named by the server"
        return f"inputs: {inputs}; outputs: {outputs}; {self.describe_limit()}"

    def describe_limit(self) -> str:
        """The number of elements that a request may hold, for messages."""
        if not self.has_batch_dimension:
            return "no batch dimension: one element a request"
        return f"at most {self.max_batch_size} element{'s' if self.max_batch_size > 1 else ''} a request"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelSpec:
        """The model of a lock file, which `save` or ``python -m beam_triton lock`` wrote.

        Raises ConfigurationError, which names the file, where it cannot be read, is no lock file, or has been
        edited.
        """
        name = os.fspath(path)
        how = "python -m beam_triton lock ENDPOINT MODEL writes one"
        try:
            return replace(cls.from_mapping(contract_of(Path(name).read_text("utf-8"))), lock_file=name)
        except FileNotFoundError:
            raise ConfigurationError(f"there is no lock file {name!r}: {how}") from None
        except OSError as error:
            raise ConfigurationError(f"lock file {name!r} cannot be read: {error.strerror}") from None
        except ValueError as error:
            # ConfigurationError, too: a later version may write fields that this one does not know.
            raise ConfigurationError(f"lock file {name!r} {error}; {how}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a lock file: JSON for `load`, people and version control.

        It holds no ``versions``, which change with every deployment; ``version`` where there is one.
        """
        contract: dict[str, Any] = {"name": self.name}
        for key in (
            "version",
            "platform",
            "decoupled",
            "sequence_batching",
            "correlation_id_datatype",
            "whole_outputs",
            "shares_executions",
        ):
            if getattr(self, key):
                contract[key] = getattr(self, key)
        contract["max_batch_size"] = self.max_batch_size
        for side in ("inputs", "outputs"):
            contract[side] = [spec.plain() for spec in getattr(self, side)]
        Path(path).write_text(lock_text(contract), "utf-8", newline="\n")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> ModelSpec:
        """The model from a plain dict, as YAML and other SDKs supply it; its tensors may be dicts, too.

        Raises ConfigurationError for a field that is unknown or missing.
        """
        tensors: dict[str, Any] = {}
        for side in ("inputs", "outputs"):
            if isinstance(given.get(side), Sequence):
                tensors[side] = tuple(
                    from_mapping(TensorSpec, each) if isinstance(each, Mapping) else each
                    for each in given[side]
                )
        return from_mapping(cls, {**given, **tensors})

    @classmethod
    def from_server(
        cls,
        metadata: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        max_batch_size: int | None = None,
    ) -> ModelSpec:
        """Build the description from ``GET /v2/models/{m}`` and, if there is one, ``…/config``.

        A configuration with a ``max_batch_size`` above 0 decides. One of 0 means that the model has no batch
        dimension of Triton's: the argument, where it is given, makes one of a first dimension of -1 that all
        inputs have. Without a configuration (a server that is not Triton) the argument decides, too; where it
        is None, a first dimension of -1 of all inputs and outputs is the batch, of at most
        `DEFAULT_MAX_BATCH_SIZE` elements. The batch dimension is dropped from the shapes.

        An output of a datatype that the protocol does not have is left out.

        Raises RemoteProtocolError if either document is not what the protocol specifies, ConfigurationError
        for an argument that the shapes exclude.
        """
        metadata = _mapping(metadata, "model metadata")
        name = _field(metadata, "name", str, "model metadata")
        what = f"metadata of model {name!r}"
        what_config = f"configuration of model {name!r}"
        has_config = config is not None
        config = {} if config is None else _mapping(config, what_config)
        limit = config.get("max_batch_size", 0)
        if type(limit) is not int or limit < 0:
            raise RemoteProtocolError(f"{what_config}: max_batch_size {shorten(limit)} is not a size")
        if max_batch_size is not None:
            _check_max_batch_size(name, max_batch_size)
        inputs = _tensors(metadata, "inputs", what)
        outputs = _tensors(metadata, "outputs", what)
        if limit:
            _check_first_dimensions((*inputs, *outputs), what)
        else:
            limit = _found_batch_size(name, inputs, outputs, max_batch_size, has_config)
        whole_outputs = _whole_outputs(inputs, outputs) if limit else ()
        entries = [_mapping(entry, what_config) for entry in _field(config, "input", list, what_config, [])]
        optional = {
            _field(entry, "name", str, what_config) for entry in entries if entry.get("optional") is True
        }
        groups = [
            _mapping(each, what_config) for each in _field(config, "instance_group", list, what_config, [])
        ]
        batching = _mapping(config.get("dynamic_batching") or {}, what_config)
        transactions = _mapping(config.get("model_transaction_policy") or {}, what_config)
        versions = _field(metadata, "versions", list, what, [])
        if not all(isinstance(version, str) for version in versions):
            raise RemoteProtocolError(f"{what}: versions {shorten(versions)} are not all strings")
        try:
            return cls(
                name=name,
                version=max(versions, key=_version_order) if versions else "",
                inputs=tuple(tensor.spec(limit, optional=tensor.name in optional) for tensor in inputs),
                outputs=tuple(
                    tensor.spec(0 if tensor.name in whole_outputs else limit)
                    for tensor in outputs
                    if tensor.datatype in DATATYPES
                ),
                whole_outputs=whole_outputs,
                max_batch_size=limit,
                versions=tuple(versions),
                platform=_field(metadata, "platform", str, what, ""),
                decoupled=transactions.get("decoupled") is True,
                sequence_batching="sequence_batching" in config,
                correlation_id_datatype=_correlation_id_datatype(config, what_config),
                instances=sum(map(_instances, groups)),
                priority_levels=_count(batching.get("priority_levels")),
                shares_executions=any(
                    config.get(key) is not None for key in ("dynamic_batching", "ensemble_scheduling")
                ),
            )
        except ConfigurationError as error:
            raise RemoteProtocolError(f"{what}: {error.message}") from None


def _correlation_id_datatype(config: Mapping[str, Any], what: str) -> str:
    sequences = _mapping(config.get("sequence_batching") or {}, what)
    for each in _field(sequences, "control_input", list, what, []):
        for control in _field(_mapping(each, what), "control", list, what, []):
            control = _mapping(control, what)
            if control.get("kind") == "CONTROL_SEQUENCE_CORRID":
                return str(_field(control, "data_type", str, what, "")).removeprefix("TYPE_")
    return ""


def _instances(group: Mapping[str, Any]) -> int:
    """So many on each of the group's GPUs, where it names any."""
    gpus = group.get("gpus")
    return _count(group.get("count")) * max(1, len(gpus) if isinstance(gpus, list) else 0)


def _count(value: Any) -> int:
    """A number of 64 bits, which JSON of protocol buffers has as text; 0 for anything else."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _version_order(version: str) -> tuple[int, int, str]:
    # Triton's versions are numbers, and by default it serves the greatest: "10" is above "9".
    if version.isascii() and version.isdigit() and len(version) < 20:
        return (1, int(version), "")
    return (0, 0, version)


def _check_max_batch_size(model_name: str, size: Any) -> None:
    if type(size) is not int or size < 0:
        raise ConfigurationError(
            f"model {model_name!r}: max_batch_size must be 0 (no batch dimension) or more, not {size!r}"
        )


class _Tensor(NamedTuple):
    """A tensor as the metadata have it: a batch dimension is part of the shape."""

    name: str
    datatype: str
    shape: tuple[Any, ...]

    def begins_with(self, size: int) -> bool:
        return len(self.shape) > 0 and type(self.shape[0]) is int and self.shape[0] == size

    def spec(self, max_batch_size: int, *, optional: bool = False) -> TensorSpec:
        has_batch = max_batch_size > 0 and self.begins_with(-1)
        is_batch_of_one = max_batch_size == 1 and self.begins_with(1) and len(self.shape) > 1
        shape = self.shape[1:] if has_batch or is_batch_of_one else self.shape
        return TensorSpec(self.name, self.datatype, shape, optional=optional)


def _tensors(metadata: Mapping[str, Any], key: str, what: str) -> list[_Tensor]:
    tensors = []
    for entry in _field(metadata, key, list, what, []):
        entry = _mapping(entry, f"{what}, {key}")
        name = _field(entry, "name", str, f"{what}, {key}")
        shape = _field(entry, "shape", list, f"{what}, {name!r}")
        tensors.append(_Tensor(name, _field(entry, "datatype", str, f"{what}, {name!r}"), tuple(shape)))
    return tensors


def _check_first_dimensions(tensors: Sequence[_Tensor], what: str) -> None:
    for tensor in tensors:
        if not tensor.begins_with(-1):
            raise RemoteProtocolError(
                f"{what}: shape {shorten(list(tensor.shape))} of {tensor.name!r} does not begin with the "
                f"batch dimension -1, though the model's configuration allows batches"
            )


def _found_batch_size(
    model_name: str, inputs: list[_Tensor], outputs: list[_Tensor], wanted: int | None, has_config: bool
) -> int:
    """The batch limit of a model for which no configuration names one above 0; 0 for no batch dimension."""
    is_open = _are_open(inputs)
    if wanted is None:
        is_shown = not has_config and is_open and all(tensor.begins_with(-1) for tensor in outputs)
        return DEFAULT_MAX_BATCH_SIZE if is_shown else 0
    is_one = all(tensor.begins_with(1) for tensor in inputs) and any(len(each.shape) > 1 for each in inputs)
    if is_one and wanted > 1:
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in inputs)
        raise ConfigurationError(
            f"model {model_name!r} takes one element a request: its shapes begin with a fixed 1 ({shapes}), "
            f"which excludes batching.max_batch_size={wanted}. Leave it out; or describe the model by "
            f"model_spec if its metadata leave the batch dimension out"
        )
    # Triton's own metadata are to be believed: a model with other shapes has no batch dimension.
    return wanted if is_open or is_one or not has_config else 0


def _whole_outputs(inputs: list[_Tensor], outputs: list[_Tensor]) -> tuple[str, ...]:
    """The outputs without a batch dimension, if the metadata show one for all inputs."""
    if not _are_open(inputs):
        return ()
    return tuple(tensor.name for tensor in outputs if not tensor.begins_with(-1))


def _are_open(inputs: list[_Tensor]) -> bool:
    return bool(inputs) and all(tensor.begins_with(-1) for tensor in inputs)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RemoteProtocolError(f"{what}: a JSON object was expected, not {shorten(value)}")
    return value


_MISSING = object()


def _field(mapping: Mapping[str, Any], key: str, kind: type, what: str, default: Any = _MISSING) -> Any:
    value = mapping.get(key, default)
    # Servers leave empty fields out or write null for them.
    if value is None and default is not _MISSING:
        value = default
    if value is _MISSING:
        raise RemoteProtocolError(f"{what}: {key!r} is missing")
    if kind is list and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    if not isinstance(value, kind):
        raise RemoteProtocolError(f"{what}: {key!r} is {shorten(value)}")
    return value
