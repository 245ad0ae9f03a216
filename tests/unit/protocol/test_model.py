"""Model metadata and configuration to a description."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError, RemoteProtocolError
from beam_triton.protocol import ModelSpec, TensorSpec

METADATA: dict[str, Any] = {
    "name": "digits",
    "versions": ["9", "10"],
    "platform": "python",
    "inputs": [
        {"name": "image", "datatype": "FP32", "shape": [-1, 8, 8]},
        {"name": "factor", "datatype": "FP32", "shape": [-1, 1]},
    ],
    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
}
CONFIG: dict[str, Any] = {
    "name": "digits",
    "max_batch_size": 64,
    "input": [
        {"name": "image", "data_type": "TYPE_FP32", "dims": [8, 8], "optional": False},
        {"name": "factor", "data_type": "TYPE_FP32", "dims": [1], "optional": True},
    ],
}


def test_metadata_and_configuration_make_the_whole_spec() -> None:
    """Shapes lose the batch dimension; limit and optional inputs come from the configuration."""
    spec = ModelSpec.from_server(METADATA, CONFIG)
    assert spec == ModelSpec(
        "digits",
        "10",
        (TensorSpec("image", "FP32", (8, 8)), TensorSpec("factor", "FP32", (1,), optional=True)),
        (TensorSpec("scores", "FP32", (10,)),),
        64,
        ("9", "10"),
        "python",
    )
    assert spec.model_id == "digits:10"
    assert spec.describe() == (
        "inputs: image FP32 [8, 8], factor FP32 [1] (optional); outputs: scores FP32 [10]; "
        "at most 64 elements a request"
    )


def test_a_spec_pickles_and_hashes() -> None:
    """It is pickled into pipelines and is part of keys of shared state."""
    spec = ModelSpec.from_server(METADATA, CONFIG)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(ModelSpec.from_server(METADATA, CONFIG))


def test_without_a_batch_dimension_a_leading_minus_one_stays() -> None:
    """max_batch_size 0: a leading -1 is a dimension like any other."""
    spec = ModelSpec.from_server(METADATA, {**CONFIG, "max_batch_size": 0})
    assert spec.inputs[0].shape == (-1, 8, 8) and not spec.has_batch_dimension
    assert "one element a request" in spec.describe()


def test_without_a_configuration_the_argument_sets_the_batch_limit() -> None:
    """A server that is not Triton: a leading -1 is the batch dimension if the user gives a limit."""
    assert ModelSpec.from_server(METADATA).max_batch_size == 0
    spec = ModelSpec.from_server(METADATA, None, 16)
    assert (spec.max_batch_size, spec.inputs[0].shape) == (16, (8, 8))
    fixed = {**METADATA, "inputs": [{"name": "x", "datatype": "FP32", "shape": [3]}]}
    assert ModelSpec.from_server(fixed, None, 16).inputs[0].shape == (3,)
    with pytest.raises(ConfigurationError, match="max_batch_size"):
        ModelSpec.from_server(METADATA, None, -1)


@pytest.mark.parametrize("missing", [{}, {"inputs": None, "outputs": None}, {"inputs": [], "outputs": []}])
def test_metadata_without_tensors_is_accepted(missing: dict[str, Any]) -> None:
    """MLServer's metadata: inputs stay unknown, and the description says so."""
    spec = ModelSpec.from_server({"name": "m", "versions": [], "platform": "", **missing})
    assert spec.inputs == () and spec.outputs == () and spec.version == ""
    assert "inputs: not named by the server" in spec.describe()
    assert spec.model_id == "m"


def test_decoupled_and_sequence_models_are_recognised() -> None:
    """Decoupled and sequence models, for errors that explain themselves."""
    decoupled = ModelSpec.from_server(METADATA, {**CONFIG, "model_transaction_policy": {"decoupled": True}})
    assert decoupled.decoupled and not decoupled.sequence_batching
    assert ModelSpec.from_server(METADATA, {**CONFIG, "sequence_batching": {}}).sequence_batching


def with_input(**fields: Any) -> dict[str, Any]:
    return {**METADATA, "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1], **fields}]}


@pytest.mark.parametrize(
    ("metadata", "config"),
    [
        ([], None),
        ({}, None),
        ({"name": 5}, None),
        ({"name": ""}, None),
        ({**METADATA, "inputs": {}}, None),
        ({**METADATA, "inputs": [5]}, None),
        ({**METADATA, "inputs": "abc"}, None),
        ({**METADATA, "versions": [1]}, None),
        ({**METADATA, "platform": 5}, None),
        (with_input(name=None), None),
        (with_input(datatype="FP8"), None),
        (with_input(datatype=[]), None),
        (with_input(shape=5), None),
        (with_input(shape=[-2]), None),
        (with_input(shape=["1"]), None),
        (with_input(shape=[-1, True]), None),
        (with_input(shape=[]), CONFIG),
        (with_input(shape=[4]), CONFIG),
        ({**METADATA, "inputs": METADATA["inputs"][:1] * 2}, None),
        (METADATA, []),
        (METADATA, {"max_batch_size": "64"}),
        (METADATA, {"max_batch_size": -1}),
        (METADATA, {"max_batch_size": 4, "input": 5}),
        (METADATA, {"max_batch_size": 4, "input": [{"optional": True}]}),
        (METADATA, {"max_batch_size": 4, "model_transaction_policy": 5}),
    ],
)
def test_broken_metadata_or_configuration_is_a_remote_protocol_error(metadata: Any, config: Any) -> None:
    """Never a KeyError, never a spec that fails later."""
    with pytest.raises(RemoteProtocolError):
        ModelSpec.from_server(metadata, config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(st.sampled_from(["name", "versions", "inputs", "outputs", "platform"]), JSON),
    st.none() | st.dictionaries(st.sampled_from(["max_batch_size", "input", "sequence_batching"]), JSON),
)
def test_any_json_gives_a_spec_or_a_remote_protocol_error(
    metadata: dict[str, Any], config: dict[str, Any] | None
) -> None:
    """Any JSON under the protocol's keys: a description or a RemoteProtocolError."""
    with contextlib.suppress(RemoteProtocolError):
        ModelSpec.from_server({**METADATA, **metadata}, config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorSpec("", "FP32", ()),
        lambda: TensorSpec("x", "FLOAT", ()),
        lambda: TensorSpec("x", "FP32", (-2,)),
        lambda: TensorSpec("x", "FP32", (1.0,)),  # type: ignore[arg-type]
        lambda: ModelSpec(""),
        lambda: ModelSpec("m", max_batch_size=-1),
        lambda: ModelSpec("m", max_batch_size=True),
        lambda: ModelSpec("m", inputs=(TensorSpec("x", "FP32", ()), TensorSpec("x", "FP32", ()))),
    ],
)
def test_a_spec_written_by_hand_is_checked(make: Any) -> None:
    """Mistakes are found at construction."""
    with pytest.raises(ConfigurationError):
        make()
