"""A model's inputs and outputs: tensor names, datatypes, shapes and the batch limit.

They are read from the server's model metadata (Open Inference Protocol) and, if the server has one, from
Triton's model configuration. Shapes in Triton's metadata include the batch dimension, ``dims`` in the
configuration do not; here, shapes never do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beam_triton.errors import ConfigurationError, RemoteProtocolError
from beam_triton.protocol.datatypes import DATATYPES
from beam_triton.protocol.text import shorten
from beam_triton.validation import from_mapping


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
    ``sequence_batching`` models need ``sequence_id`` with every request, of one element each.
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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigurationError(f"a model needs a name, not {self.name!r}")
        _check_max_batch_size(self.name, self.max_batch_size)
        for field in ("inputs", "outputs"):
            specs = tuple(getattr(self, field))
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ConfigurationError(f"model {self.name!r}: {field} {names} name a tensor twice")
            object.__setattr__(self, field, specs)
        object.__setattr__(self, "versions", tuple(self.versions))

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
        limit = (
            f"at most {self.max_batch_size} element{'s' if self.max_batch_size > 1 else ''} a request"
            if self.max_batch_size
            else "no batch dimension: one element a request"
        )
        return f"inputs: {inputs}; outputs: {outputs}; {limit}"

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

        With a configuration, its ``max_batch_size`` applies and the argument is ignored. Without one (a
        server that is not Triton) the argument applies; None means 0. If the model has a batch dimension,
        a leading -1 of a metadata shape stands for it and is dropped.

        Raises RemoteProtocolError if either document is not what the protocol specifies.
        """
        metadata = _mapping(metadata, "model metadata")
        name = _field(metadata, "name", str, "model metadata")
        what = f"metadata of model {name!r}"
        what_config = f"configuration of model {name!r}"
        strict = config is not None
        config = {} if config is None else _mapping(config, what_config)
        if strict:
            limit = config.get("max_batch_size", 0)
            if type(limit) is not int or limit < 0:
                raise RemoteProtocolError(f"{what_config}: max_batch_size {shorten(limit)} is not a size")
        else:
            limit = 0 if max_batch_size is None else max_batch_size
            _check_max_batch_size(name, limit)
        entries = [_mapping(entry, what_config) for entry in _field(config, "input", list, what_config, [])]
        optional = {
            _field(entry, "name", str, what_config) for entry in entries if entry.get("optional") is True
        }
        transactions = _mapping(config.get("model_transaction_policy") or {}, what_config)
        versions = _field(metadata, "versions", list, what, [])
        if not all(isinstance(version, str) for version in versions):
            raise RemoteProtocolError(f"{what}: versions {shorten(versions)} are not all strings")
        try:
            return cls(
                name=name,
                version=max(versions, key=_version_order) if versions else "",
                inputs=_tensors(metadata, "inputs", what, limit > 0, strict, optional),
                outputs=_tensors(metadata, "outputs", what, limit > 0, strict, set()),
                max_batch_size=limit,
                versions=tuple(versions),
                platform=_field(metadata, "platform", str, what, ""),
                decoupled=transactions.get("decoupled") is True,
                sequence_batching="sequence_batching" in config,
            )
        except ConfigurationError as error:
            raise RemoteProtocolError(f"{what}: {error.message}") from None


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


def _tensors(
    metadata: Mapping[str, Any], key: str, what: str, batched: bool, strict: bool, optional: set[str]
) -> tuple[TensorSpec, ...]:
    specs = []
    for entry in _field(metadata, key, list, what, []):
        entry = _mapping(entry, f"{what}, {key}")
        name = _field(entry, "name", str, f"{what}, {key}")
        shape = _field(entry, "shape", list, f"{what}, {name!r}")
        if batched:
            if shape and shape[0] == -1:
                shape = shape[1:]
            elif strict:
                raise RemoteProtocolError(
                    f"{what}: shape {shorten(shape)} of {name!r} does not begin with the batch dimension -1, "
                    f"though the model's configuration allows batches"
                )
        datatype = _field(entry, "datatype", str, f"{what}, {name!r}")
        specs.append(TensorSpec(name, datatype, tuple(shape), optional=name in optional))
    return tuple(specs)


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
