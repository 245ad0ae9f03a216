"""The transform and its DoFn while a pipeline is built, without a server."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms.display import DisplayData
from apache_beam.transforms.window import GlobalWindow
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Tuple, Union
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import (
    BatchingPolicy,
    ConfigurationError,
    ConnectionPoolConfig,
    ModelSpec,
    TensorSpec,
    TritonInference,
    TritonInferenceDoFn,
)
from beam_triton.transport.session import SESSIONS
from tests.support import faults

ENDPOINT = "http://user:pa55word@triton:8000"
SPEC = ModelSpec("m", "1", (TensorSpec("x", "FP32", (1,)),), (TensorSpec("y", "FP32", (1,)),), 16)


def shown(part: Any) -> dict[str, str]:
    return {item.key: str(item.value) for item in DisplayData.create_from(part).items}


def test_display_data_shows_given_options_and_no_secret() -> None:
    """Job pages show the endpoint and the given options, without password, token or header value."""
    transform = TritonInference(
        ENDPOINT,
        "m",
        auth_token="t0ken",
        headers={"X-Key": "k3y"},
        max_concurrent_requests=7,
        batching={"max_batch_size": 3},
    )
    found = shown(transform)
    assert found["model_name"] == "m"
    assert found["max_concurrent_requests"] == "7"
    assert "max_batch_size=3" in found["batching"]
    assert "triton:8000" in found["endpoint"]
    assert "timeout_seconds" not in found
    text = json.dumps(found)
    for secret in ("pa55word", "t0ken", "k3y"):
        assert secret not in text
    dofn = TritonInferenceDoFn(ENDPOINT, "m", max_concurrent_requests=7)
    assert shown(dofn)["max_concurrent_requests"] == "7"


def test_array_default_value_is_part_of_the_job() -> None:
    """It is display data like any other option, and the pipeline can be translated for a runner."""
    transform = TritonInference(ENDPOINT, "m", model_spec=SPEC, default_value=np.array([0.5, 0.5]))
    assert shown(transform)["default_value"] == "[0.5 0.5]"
    pipeline = beam.Pipeline()
    _ = pipeline | beam.Create([np.zeros(1, np.float32)], reshuffle=False) | transform
    assert "default_value" in str(pipeline.to_runner_api())


def test_options_may_be_objects_or_dicts() -> None:
    """A policy object and the dict of its fields are equal."""
    objects = TritonInference(
        ENDPOINT, "m", pool=ConnectionPoolConfig(max_idle=3), batching=BatchingPolicy(max_batch_size=4)
    )
    dicts = TritonInference(ENDPOINT, "m", pool={"max_idle": 3}, batching={"max_batch_size": 4})
    assert shown(objects) == shown(dicts)


@pytest.mark.parametrize(
    ("endpoint", "model_name", "options", "message"),
    [
        ("triton:8000", "m", {}, "did you mean http://triton:8000"),
        ([], "m", {}, "endpoint"),
        (ENDPOINT, "", {}, "model_name"),
        (ENDPOINT, None, {}, "model_name"),
        (ENDPOINT, "m", {"timeout": 3}, "timeout_seconds"),
        (ENDPOINT, "m", {"batching": {"batch_size": 3}}, "max_batch_size"),
        (
            ENDPOINT,
            "m",
            {"max_concurrent_requests": 200, "pool": {"max_total": 100}},
            "max_total=100.*max_concurrent_requests=200",
        ),
        (ENDPOINT, "m", {"model_spec": "m"}, "no lock file .m.*beam_triton lock ENDPOINT MODEL"),
        (ENDPOINT, "m", {"with_exception_handling": True}, "with_exception_handling"),
    ],
)
def test_invalid_arguments_are_rejected_at_construction(
    endpoint: Any, model_name: Any, options: dict[str, Any], message: str
) -> None:
    """The message says what to do."""
    with pytest.raises(ConfigurationError, match=message):
        TritonInference(endpoint, model_name, **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Tuple[str, int], Tuple[str, AnyType]),
        (int, AnyType),
        (Tuple[int, int, int], AnyType),
        (Tuple[int, ...], AnyType),
        (Union[int, Tuple[str, int]], AnyType),
        (Union[Tuple[str, int], Tuple[str, float]], Tuple[str, AnyType]),
        (Union[Tuple[str, int], Tuple[int, float]], Tuple[Union[str, int], AnyType]),
    ],
)
def test_output_type_is_keyed_where_the_input_is(given: Any, expected: Any) -> None:
    """Keyed elements give keyed results, as far as the type is known; no schema is claimed of them."""
    pipeline = beam.Pipeline("FnApiRunner")
    elements = pipeline | beam.Create([1]) | beam.Map(lambda n: n).with_output_types(given)
    assert (elements | TritonInference(ENDPOINT, "m")).element_type == expected
    results, failures = elements | "both" >> TritonInference(ENDPOINT, "m").with_exception_handling()
    assert results.element_type == expected
    assert failures is not None


def test_transforms_of_two_models_need_no_labels() -> None:
    """Two models in one pipeline need no labels of their own."""
    pipeline = beam.Pipeline("FnApiRunner")
    elements = pipeline | beam.Create([1])
    for name in ("a", "b"):
        scored = elements | TritonInference(ENDPOINT, name)
        assert scored.producer.full_label == f"TritonInference({name})/Score"


def test_transform_and_dofn_keep_their_options_when_pickled() -> None:
    """A token by reference stays a reference."""
    transform = TritonInference(ENDPOINT, "m", auth_token="env:TRITON_TOKEN", model_spec=SPEC)
    assert shown(pickle.loads(pickle.dumps(transform))) == shown(transform)
    dofn = TritonInferenceDoFn(ENDPOINT, "m", auth_token="env:TRITON_TOKEN")
    assert shown(pickle.loads(pickle.dumps(dofn))) == shown(dofn)


@pytest.fixture
def unreachable() -> Iterator[str]:
    with faults.refusing_port() as port:
        yield f"http://127.0.0.1:{port}"


def test_model_spec_makes_setup_work_without_a_server(unreachable: str) -> None:
    """A DoFn sets up, starts and finishes empty bundles, and is torn down, without a server."""
    dofn = pickle.loads(pickle.dumps(TritonInferenceDoFn(unreachable, "m", model_spec=SPEC)))
    dofn.setup()
    dofn.start_bundle()
    assert list(dofn.finish_bundle()) == []
    assert len(SESSIONS) == 1
    dofn.teardown()
    dofn.teardown()
    assert len(SESSIONS) == 0


def test_invalid_element_fails_without_a_request(unreachable: str) -> None:
    """An element is checked before anything is sent; the failure says what the model takes."""
    dofn = TritonInferenceDoFn(unreachable, "m", model_spec=SPEC, with_exception_handling=True)
    dofn.setup()
    dofn.start_bundle()
    element = WindowedValue(np.zeros(3, np.float32), 0, (GlobalWindow(),))
    emitted = [*(dofn.process(element.value, element) or ()), *dofn.finish_bundle()]
    dofn.teardown()
    (tagged,) = emitted
    assert tagged.tag == "failures"
    assert "'x' takes FP32 of shape [1]" in tagged.value.value[1][1]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (ModelSpec("m", decoupled=True), {}, "decoupled"),
        (ModelSpec("m", sequence_batching=True), {}, "sequence"),
        (SPEC, {"outputs": ["z"]}, "z"),
        (SPEC, {"default_value": {"z": 0}}, "default_value"),
        (SPEC, {"default_value": [1.0, 2.0]}, "default_value"),
    ],
)
def test_failed_setup_releases_the_session(
    unreachable: str, spec: ModelSpec, options: dict[str, Any], message: str
) -> None:
    """Options that do not match the model fail in setup, which releases everything."""
    dofn = TritonInferenceDoFn(unreachable, "m", model_spec=spec, **options)
    with pytest.raises(ConfigurationError, match=message):
        dofn.setup()
    assert len(SESSIONS) == 0
    dofn.teardown()
