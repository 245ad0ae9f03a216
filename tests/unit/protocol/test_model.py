"""Model metadata and configuration to a description."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError, RemoteProtocolError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.protocol.model import DEFAULT_MAX_BATCH_SIZE

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
    spec = ModelSpec.from_server(METADATA, None, 16)
    assert (spec.max_batch_size, spec.inputs[0].shape) == (16, (8, 8))
    fixed = {**METADATA, "inputs": [{"name": "x", "datatype": "FP32", "shape": [3]}]}
    assert ModelSpec.from_server(fixed, None, 16).inputs[0].shape == (3,)
    with pytest.raises(ConfigurationError, match="max_batch_size"):
        ModelSpec.from_server(METADATA, None, -1)


def tensor(name: str, *shape: int, datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def metadata(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": "m", "inputs": inputs, "outputs": outputs}


@pytest.mark.parametrize(
    ("groups", "instances"),
    [
        ([], 0),
        ([{"count": 16, "kind": "KIND_CPU", "gpus": []}], 16),
        ([{"count": 2, "kind": "KIND_GPU", "gpus": [0, 1, 3]}, {"count": 1}], 7),
        ([{"count": "4"}], 4),
        ([{"name": "no count"}, {"count": -1}], 0),
    ],
)
def test_instances_are_those_of_all_groups_on_all_their_gpus(
    groups: list[dict[str, Any]], instances: int
) -> None:
    assert ModelSpec.from_server(METADATA, {**CONFIG, "instance_group": groups}).instances == instances


def test_lowest_priority_is_that_of_dynamic_batching() -> None:
    """As a number or, as JSON of protocol buffers has it, as text; a model may have none."""
    for batching, levels in (({"priority_levels": 3}, 3), ({"priority_levels": "2"}, 2), ({}, 0), (None, 0)):
        spec = ModelSpec.from_server(METADATA, {**CONFIG, "dynamic_batching": batching})
        assert spec.priority_levels == levels


@pytest.mark.parametrize(
    ("extra", "shares"),
    [
        ({"dynamic_batching": {}}, True),
        ({"ensemble_scheduling": {"step": []}}, True),
        ({"dynamic_batching": None}, False),
        ({}, False),
    ],
)
def test_dynamic_batching_and_ensembles_share_executions(
    extra: dict[str, Any], shares: bool, tmp_path: Path
) -> None:
    """A lock file keeps it: it decides how elements that fail are isolated."""
    spec = ModelSpec.from_server(METADATA, {**CONFIG, **extra})
    assert spec.shares_executions == shares
    spec.save(tmp_path / "model.json")
    assert ModelSpec.load(tmp_path / "model.json").shares_executions == shares


def test_how_a_model_is_executed_is_no_part_of_what_it_takes_and_gives() -> None:
    """A server with more instances is no other model."""
    spec = ModelSpec.from_server(METADATA, CONFIG)
    more = ModelSpec.from_server(METADATA, {**CONFIG, "instance_group": [{"count": 4}]})
    assert spec == more and hash(spec) == hash(more) and spec.takes_and_gives_as(more)


def test_a_first_dimension_of_minus_one_of_all_tensors_is_the_batch() -> None:
    """Of a server that does not report batch limits: MLServer, KServe and others write it into the
    metadata."""
    spec = ModelSpec.from_server(metadata([tensor("x", -1, 4), tensor("t", -1)], [tensor("y", -1, 1)]))
    assert spec.max_batch_size == DEFAULT_MAX_BATCH_SIZE
    assert [each.shape for each in (*spec.inputs, *spec.outputs)] == [(4,), (), (1,)]


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([tensor("x", 4)], [tensor("y", -1, 1)]),
        ([tensor("x", -1, 4), tensor("scale", 1)], [tensor("y", -1, 1)]),
        ([tensor("x", -1, 4)], [tensor("y", -1, 1), tensor("boxes", 100, 6)]),
        ([tensor("x", 1, 3, 8, 8)], [tensor("y", 1, 10)]),
        ([], [tensor("y", -1, 1)]),
    ],
)
def test_metadata_that_show_no_batch_dimension_leave_one_element_a_request(inputs: Any, outputs: Any) -> None:
    """Shapes stay as they are."""
    spec = ModelSpec.from_server(metadata(inputs, outputs))
    assert not spec.has_batch_dimension
    assert [list(each.shape) for each in spec.inputs] == [each["shape"] for each in inputs]


def test_an_output_without_a_batch_dimension_is_known() -> None:
    """It keeps its shape, and belongs to the request as a whole."""
    boxes = metadata([tensor("x", -1, 4)], [tensor("y", -1, 1), tensor("boxes", 100, 6)])
    spec = ModelSpec.from_server(boxes, None, 8)
    assert spec.whole_outputs == ("boxes",)
    assert [each.shape for each in spec.outputs] == [(1,), (100, 6)]


def test_max_batch_size_zero_of_triton_is_batched_where_the_user_says_so() -> None:
    """A first dimension of -1 is the batch then; a model with other shapes has none."""
    zero = {"max_batch_size": 0}
    spec = ModelSpec.from_server(METADATA, zero, 16)
    assert (spec.max_batch_size, spec.inputs[0].shape) == (16, (8, 8))
    fixed = metadata([tensor("x", 4)], [tensor("y", 4)])
    assert not ModelSpec.from_server(fixed, zero, 16).has_batch_dimension


@pytest.mark.parametrize("config", [None, {"max_batch_size": 0}])
def test_a_fixed_first_dimension_of_one_excludes_batches(config: Any) -> None:
    """OpenVINO's fixed shapes: one element a request, with or without its dimension of 1."""
    fixed = metadata([tensor("x", 1, 3, 8, 8)], [tensor("y", 1, 10)])
    assert ModelSpec.from_server(fixed, config).inputs[0].shape == (1, 3, 8, 8)
    spec = ModelSpec.from_server(fixed, config, 1)
    assert (spec.max_batch_size, spec.inputs[0].shape, spec.outputs[0].shape) == (1, (3, 8, 8), (10,))
    with pytest.raises(ConfigurationError, match=r"fixed 1.*excludes batching\.max_batch_size=8"):
        ModelSpec.from_server(fixed, config, 8)


def test_an_output_of_an_unknown_datatype_does_not_bar_the_model() -> None:
    """It is left out; an input that cannot be made is refused."""
    lax = metadata([tensor("x", -1, 4)], [tensor("label", -1, datatype="STRING"), tensor("y", -1, 1)])
    assert [each.name for each in ModelSpec.from_server(lax).outputs] == ["y"]


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
    sequences = ModelSpec.from_server(METADATA, {**CONFIG, "sequence_batching": {}})
    assert sequences.sequence_batching and sequences.correlation_id_datatype == ""
    control = {"kind": "CONTROL_SEQUENCE_CORRID", "data_type": "TYPE_UINT64"}
    batching = {"control_input": [{"name": "START"}, {"name": "ID", "control": [control]}]}
    known = ModelSpec.from_server(METADATA, {**CONFIG, "sequence_batching": batching})
    assert known.correlation_id_datatype == "UINT64"


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
