"""`TritonModelHandler` without Beam around it: its options, batching, byte counts and memory."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import apache_beam as beam
import numpy as np
import pytest

from beam_triton import ConfigurationError, LocalProtocolError, ModelSpec, TensorSpec, TritonModelHandler
from beam_triton.testing import FakeModel, FakeTriton
from beam_triton.transforms.run_inference import name_and_version

ENDPOINT = "http://user:secret@triton:8000"
SPEC = ModelSpec("m", "1", (TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),), 16)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"min_batch_size": 2_048, "max_batch_size": 2_048}),
        ({"batching": {"max_batch_size": 8}}, {"min_batch_size": 256, "max_batch_size": 256}),
        (
            {"batching": {"max_batch_size": 8}, "max_concurrent_requests": 3},
            {"min_batch_size": 24, "max_batch_size": 24},
        ),
        ({"model_spec": SPEC}, {"min_batch_size": 512, "max_batch_size": 512}),
        (
            {"model_spec": SPEC, "batching": {"max_batch_size": 1000}, "max_concurrent_requests": 1},
            {"min_batch_size": 16, "max_batch_size": 16},
        ),
        (
            {"model_spec": ModelSpec("m"), "max_concurrent_requests": 5},
            {"min_batch_size": 5, "max_batch_size": 5},
        ),
        (
            {"batching": {"linger_seconds": 2}},
            {"min_batch_size": 2_048, "max_batch_size": 2_048, "max_batch_duration_secs": 2},
        ),
    ],
)
def test_batch_size_for_beam_fills_all_requests_in_flight(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Beam's batches hold the elements of as many requests as may be in flight."""
    handler = TritonModelHandler(ENDPOINT, "m", **options)
    arguments = dict(handler.batch_elements_kwargs())
    del arguments["element_size_fn"]
    assert arguments == expected
    assert beam.BatchElements(**handler.batch_elements_kwargs()) is not None


@pytest.mark.parametrize(
    ("element", "weight"),
    [
        (np.zeros(1), 1),
        (np.zeros(16 * 1024, np.float32), 1),
        (np.zeros(150_000, np.float32), 9),
        (("key", np.zeros(150_000, np.float32)), 9),
        ({"a": np.zeros(150_000, np.float32), "b": b"x" * 65_536}, 10),
        (beam.Row(a=np.zeros(150_000, np.float32)), 9),
        ([[1.0] * 300] * 250, 9),
        ("x" * 650_000, 9),
        (3.5, 1),
        ([], 1),
        # Beam would send an empty batch first.
        (np.zeros(10**9, np.uint8), 2_048),
    ],
)
def test_large_elements_count_for_several(element: Any, weight: int) -> None:
    """Beam's batches hold ``max_concurrent_requests`` times ``max_batch_bytes`` at most."""
    handler = TritonModelHandler(ENDPOINT, "m", batching={"max_batch_size": 64})
    assert handler.batch_elements_kwargs()["element_size_fn"](element) == weight


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([], 0),
        ([np.zeros((3, 4), np.float32), np.zeros(2, np.int64)], 64),
        (["abc", b"de"], 5),
        ([{"a": np.zeros(2, np.float64), "b": "xyz"}], 19),
        ([beam.Row(a=np.zeros(2, np.uint8), b=b"1")], 3),
        ([[1.0, 2.0], 3.0], 24),
        ([[[1], [2, 3]]], 0),
    ],
)
def test_get_num_bytes_counts_the_values(batch: list[Any], expected: int) -> None:
    """The bytes of the elements' values; nothing is pickled for it."""
    assert TritonModelHandler(ENDPOINT, "m").get_num_bytes(batch) == expected


def test_text_and_metrics_namespace_show_no_secret() -> None:
    """RunInference shows the text of a handler."""
    handler = TritonModelHandler(ENDPOINT, "m", auth_token="hunter2")
    assert str(handler) == "TritonModelHandler(http://triton:8000, 'm')"
    assert handler.get_metrics_namespace() == "beam_triton"


@pytest.mark.parametrize(
    ("endpoint", "model_name", "options", "message"),
    [
        ("triton:8000", "m", {}, "http://triton:8000"),
        (ENDPOINT, "", {}, "model_name"),
        (ENDPOINT, 3, {}, "model_name"),
        (ENDPOINT, "m", {"max_batch_size": 3}, r'no max_batch_size.*batching=\{"max_batch_size"'),
        (ENDPOINT, "m", {"model_copies": 3}, "no model_copies. The model is on the server"),
        (ENDPOINT, "m", {"max_batch_weight": 0}, "max_batch_weight"),
        (ENDPOINT, "m", {"inputs": "x"}, "inputs must map"),
        (
            ENDPOINT,
            "m",
            {"input": {}},
            r"TritonModelHandler has no option 'input' \(did you mean 'inputs'\?\)",
        ),
        (ENDPOINT, "m", {"element_size_fn": 3}, "element_size_fn"),
        (ENDPOINT, "m", {"rate_limiter": 3}, "rate_limiter"),
        (ENDPOINT, "m", {"batching": {"max_batch_size": 0}}, "max_batch_size"),
    ],
)
def test_invalid_arguments_are_rejected_at_construction(
    endpoint: str, model_name: Any, options: dict[str, Any], message: str
) -> None:
    """The message names the argument."""
    with pytest.raises(ConfigurationError, match=message):
        TritonModelHandler(endpoint, model_name, **options)


def test_columns_of_other_names_feed_inputs() -> None:
    """As `TritonInference` takes them, and as the error for a missing column says."""
    model = FakeModel(
        lambda inputs: {"y": inputs["x"]}, inputs={"x": ("FP32", [2])}, outputs={"y": ("FP32", [2])}
    )
    rows = [beam.Row(a=1.0, b=2.0)]
    with FakeTriton({"m": model}) as triton:
        handler = TritonModelHandler(triton.endpoint, "m", inputs={"x": ["a", "b"]})
        (result,) = handler.run_inference(rows, handler.load_model())
        outputs: Any = result.inference
        assert outputs["y"].tolist() == [1.0, 2.0]
        handler = TritonModelHandler(triton.endpoint, "m")
        with pytest.raises(LocalProtocolError, match="name that by inputs="):
            handler.run_inference(rows, handler.load_model())


def test_handler_is_picklable() -> None:
    """RunInference sends the handler to the workers."""
    handler = pickle.loads(pickle.dumps(TritonModelHandler(ENDPOINT, "m", batching={"max_batch_size": 2})))
    assert handler.batch_elements_kwargs()["max_batch_size"] == 64


def test_model_is_not_shared_across_processes() -> None:
    """A connection is small, unlike weights: every process has its own."""
    handler = TritonModelHandler(ENDPOINT, "m")
    assert not handler.share_model_across_processes()
    assert not handler.should_garbage_collect_on_timeout()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("b", ("b", None)),
        ("b/versions/3", ("b", "3")),
        ("a/b/versions/v0.1", ("a/b", "v0.1")),
        ("gs://bucket/models/b/3/model.onnx", ("b", "3")),
        ("/models/b/12/model.pt", ("b", "12")),
        ("b/3/model.plan", ("b", "3")),
    ],
)
def test_path_of_an_update_names_model_and_version(path: str, expected: tuple[str, str | None]) -> None:
    """As the protocol has it, or as a model repository does."""
    assert name_and_version(path) == expected


@pytest.mark.parametrize(
    "path",
    [
        "http://triton:8000",
        "gs://bucket/b/versions/3",
        "/models/b",
        "b/versions/3/infer",
        "b/versions/ 3",
        "/",
    ],
)
def test_path_that_names_no_model_is_refused(path: str) -> None:
    """The error has the path, and what it may be."""
    with pytest.raises(ConfigurationError, match="version"):
        name_and_version(path)


class Weakly(np.ndarray):
    """An array that may be referred to weakly."""


def test_elements_are_free_once_beam_has_their_results() -> None:
    """No cycle keeps a batch in memory until the garbage collector comes."""
    identity = FakeModel(
        lambda inputs: {"y": inputs["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])}
    )
    with FakeTriton({"m": identity}) as server:
        handler = TritonModelHandler(server.endpoint, "m")
        model = handler.load_model()
        batch = [np.zeros(4, np.float32).view(Weakly) for _ in range(3)]
        elements = [weakref.ref(element) for element in batch]
        gc.disable()
        try:
            assert len(list(handler.run_inference(batch, model))) == 3
            del batch
            assert [element() for element in elements] == [None] * 3
        finally:
            gc.enable()
        model.close()
