"""Every kind of difference between a locked and a served model: what is said of it, and whether it harms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.protocol.contract import agreed, differences

X = TensorSpec("x", "FP32", (3, -1))
SCALE = TensorSpec("scale", "FP32", (1,), optional=True)
Y = TensorSpec("y", "FP32", (10,))
LABEL = TensorSpec("label", "BYTES", (-1,))
LOCKED = ModelSpec("m", "3", (X, SCALE), (Y, LABEL), 64, platform="python", lock_file="m.lock.json")


def other(**changes: Any) -> ModelSpec:
    return replace(LOCKED, **{"lock_file": "", **changes})


def inputs(*changed: TensorSpec) -> ModelSpec:
    return other(inputs=changed)


def outputs(*changed: TensorSpec, **changes: Any) -> ModelSpec:
    return other(outputs=changed, **changes)


HARMFUL = {
    "input removed": (inputs(SCALE), ["input 'x' is gone"]),
    "input renamed": (
        inputs(replace(X, name="image"), SCALE),
        ["input 'x' is gone", "input image FP32 [3, -1] is new, and required"],
    ),
    "input added": (inputs(X, SCALE, TensorSpec("z", "BOOL", ())), ["input z BOOL [] is new, and required"]),
    "optional input removed": (inputs(X), ["input 'scale' is gone"]),
    "optional input required": (inputs(X, replace(SCALE, optional=False)), ["input 'scale' is required now"]),
    "input datatype": (inputs(replace(X, datatype="FP16"), SCALE), ["input 'x' is FP16, not FP32"]),
    "input rank": (
        inputs(replace(X, shape=(3, -1, -1)), SCALE),
        ["input 'x' has shape [3, -1, -1], not [3, -1]"],
    ),
    "input dimension": (
        inputs(replace(X, shape=(4, -1)), SCALE),
        ["input 'x' has shape [4, -1], not [3, -1]"],
    ),
    "input dimension fixed": (
        inputs(replace(X, shape=(3, 5)), SCALE),
        ["input 'x' has shape [3, 5], not [3, -1]"],
    ),
    "output removed": (outputs(LABEL), ["output 'y' is gone"]),
    "output datatype": (outputs(replace(Y, datatype="FP64"), LABEL), ["output 'y' is FP64, not FP32"]),
    "output dimension": (outputs(replace(Y, shape=(11,)), LABEL), ["output 'y' has shape [11], not [10]"]),
    "output dimension open": (
        outputs(replace(Y, shape=(-1,)), LABEL),
        ["output 'y' has shape [-1], not [10]"],
    ),
    "output of the whole request": (
        outputs(Y, LABEL, whole_outputs=("y",)),
        ["output 'y' has no batch dimension now"],
    ),
    "decoupled": (other(decoupled=True), ["it is decoupled now"]),
    "sequences": (other(sequence_batching=True), ["it batches sequences now"]),
    "no batch dimension": (
        other(max_batch_size=0, inputs=(replace(X, shape=(-1, 3, -1)), SCALE)),
        ["input 'x' has shape [-1, 3, -1], not [3, -1]", "max_batch_size is 0, not 64"],
    ),
    "several": (
        other(inputs=(replace(X, datatype="INT8", shape=(3,)), SCALE), outputs=(Y,), version="4"),
        [
            "input 'x' is INT8, not FP32",
            "input 'x' has shape [3], not [3, -1]",
            "output 'label' is gone",
            "its version is 4, not 3",
        ],
    ),
}

HARMLESS = {
    "none": (other(), []),
    "order of the tensors": (other(inputs=(SCALE, X), outputs=(LABEL, Y)), []),
    "optional input added": (
        inputs(X, SCALE, TensorSpec("z", "BOOL", (), optional=True)),
        ["input z BOOL [] (optional) is new"],
    ),
    "input optional": (inputs(replace(X, optional=True), SCALE), ["input 'x' is optional now"]),
    "input dimension open": (
        inputs(replace(X, shape=(-1, -1)), SCALE),
        ["input 'x' has shape [-1, -1], not [3, -1]"],
    ),
    "output dimension fixed": (
        outputs(Y, replace(LABEL, shape=(1,))),
        ["output 'label' has shape [1], not [-1]"],
    ),
    "output added": (outputs(Y, LABEL, TensorSpec("z", "FP32", (1,))), ["output z FP32 [1] is new"]),
    "smaller batches": (other(max_batch_size=16), ["max_batch_size is 16, not 64"]),
    "larger batches": (other(max_batch_size=128), ["max_batch_size is 128, not 64"]),
    "version": (other(version="4", versions=("3", "4")), ["its version is 4, not 3"]),
    "unknown version": (other(version=""), []),
    "platform": (other(platform="onnxruntime_onnx"), ["its platform is onnxruntime_onnx, not python"]),
    "no names given": (other(inputs=(), outputs=()), []),
}


@pytest.mark.parametrize(("served", "texts"), HARMFUL.values(), ids=HARMFUL)
def test_harmful_differences(served: ModelSpec, texts: list[str]) -> None:
    """Elements or results may not fit any more; what does harm comes first."""
    found = differences(LOCKED, served)
    assert [difference.text for difference in found] == texts
    assert found[0].is_harmful


@pytest.mark.parametrize(("served", "texts"), HARMLESS.values(), ids=HARMLESS)
def test_harmless_differences(served: ModelSpec, texts: list[str]) -> None:
    """The model is used as it was locked: its tensors, and no larger batches than either says."""
    found = differences(LOCKED, served)
    assert [difference.text for difference in found] == texts
    assert not any(difference.is_harmful for difference in found)
    used = agreed(LOCKED, served)
    assert (used.inputs, used.outputs) == (LOCKED.inputs, LOCKED.outputs)
    assert used.max_batch_size == min(64, served.max_batch_size)
    assert (used.version, used.platform) == (served.version, served.platform)


def test_an_output_that_is_not_used_may_change() -> None:
    """It is said all the same, and the model is used with what is there of it."""
    served = outputs(Y)
    (gone,) = differences(LOCKED, served, outputs=["y"])
    assert gone == ("output 'label' is gone", False)
    assert agreed(LOCKED, served, ["y"]).outputs == (Y,)
    changed = replace(LABEL, datatype="INT64")
    assert agreed(LOCKED, outputs(Y, changed), ["y"]).outputs == (Y, changed)


def test_batch_limits_beyond_what_is_asked_for_make_no_difference() -> None:
    """Of a server without a configuration, the limit is that of the option itself."""
    assert differences(LOCKED, other(max_batch_size=8), max_batch_size=8) == []
    assert differences(LOCKED, other(max_batch_size=4), max_batch_size=8) != []


@pytest.mark.parametrize(("locked", "served", "used"), [(0, 64, 1), (64, 0, 0), (0, 0, 0)])
def test_a_batch_dimension_is_the_served_models(locked: int, served: int, used: int) -> None:
    """Elements of the same shapes travel with the dimension or without it."""
    spec = agreed(replace(LOCKED, max_batch_size=locked), other(max_batch_size=served))
    assert spec.max_batch_size == used


def test_what_the_lock_does_not_name_is_the_servers() -> None:
    """MLServer may not name inputs."""
    unnamed = replace(LOCKED, inputs=(), outputs=())
    assert differences(unnamed, other()) == []
    assert agreed(unnamed, other()) == other()
