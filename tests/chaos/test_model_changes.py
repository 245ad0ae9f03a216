"""The model is replaced while a job runs: other outputs, inputs, datatypes or batch limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import (
    ConfigurationError,
    ModelMismatchError,
    ModelSpec,
    TensorSpec,
    TritonClient,
    TritonInferenceDoFn,
    TritonModelHandler,
)
from beam_triton.cli.main import main
from beam_triton.options import InferenceOptions
from beam_triton.transforms.numpy_batches import TritonBatchInferenceDoFn
from tests.support.models import Model, ReplaceableModel, Tensor, replaceable

ELEMENTS = 5_000

# Returns x as y, in the datatype of y.
BEFORE = Model(
    "changing",
    (Tensor("x", "FP32", (4,)),),
    (Tensor("y", "FP32", (4,)),),
    source="first_input",
    max_batch_size=64,
)

FP64_OUTPUT = {"outputs": (Tensor("y", "FP64", (4,)),)}
FURTHER_INPUT = {"inputs": (Tensor("x", "FP32", (4,)), Tensor("mask", "FP32", (1,)))}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplaceableModel]:
    with replaceable(tmp_path_factory.mktemp("model_changes") / "models", BEFORE) as model:
        yield model


@pytest.fixture
def server(running: ReplaceableModel) -> ReplaceableModel:
    running.replace()
    return running


def run(
    dofn: TritonInferenceDoFn,
    in_mid_run: Callable[[], None],
    element: Callable[[int], Any] = lambda number: np.full(4, number, np.float32),
) -> tuple[dict[int, Any], dict[int, Any]]:
    """The results and dead letters of one bundle by the element's number; the model changes half-way."""
    dofn.setup()
    try:
        dofn.start_bundle()
        outputs: list[Any] = []
        for number in range(ELEMENTS):
            if number == ELEMENTS // 2 + 10:
                in_mid_run()
            value = (number, element(number))
            outputs += dofn.process(value, GlobalWindows.windowed_value(value)) or ()
        outputs += dofn.finish_bundle()
    finally:
        dofn.teardown()
    results = dict(output.value for output in outputs if isinstance(output, WindowedValue))
    letters = [output.value.value for output in outputs if not isinstance(output, WindowedValue)]
    failures = {keyed[0]: failure for keyed, failure in letters}
    assert len(results) + len(failures) == len(outputs) == ELEMENTS
    return results, failures


def dofn_of(server: ReplaceableModel, **options: Any) -> TritonInferenceDoFn:
    return TritonInferenceDoFn(server.endpoint, BEFORE.name, with_exception_handling=True, **options)


def test_other_output_datatype_comes_out(server: ReplaceableModel) -> None:
    """FP32 before, FP64 after: results are what the model gives."""
    results, failures = run(dofn_of(server), lambda: server.replace(**FP64_OUTPUT))
    assert failures == {}
    assert results[0].inference["y"].dtype == np.float32
    assert results[ELEMENTS - 1].inference["y"].dtype == np.float64
    assert all(result.inference["y"].tolist() == [number] * 4 for number, result in results.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": (Tensor("renamed", "FP32", (4,)),)},
        {"inputs": (Tensor("x", "FP64", (4,)),)},
        {"outputs": (Tensor("renamed", "FP32", (4,)),)},
        {
            "inputs": (Tensor("x", "FP32", (-1,)),),
            "max_batch_size": 0,
            "outputs": (Tensor("y", "FP32", (-1,)),),
        },
    ],
    ids=["input renamed", "input datatype", "output renamed", "no batches"],
)
def test_elements_are_encoded_anew(server: ReplaceableModel, changes: dict[str, Any]) -> None:
    """An array fits the only input whatever its name, and a wider datatype."""
    results, failures = run(dofn_of(server), lambda: server.replace(**changes))
    assert failures == {}
    for number, result in results.items():
        ((_, values),) = result.inference.items()
        assert values.tolist() == [number] * 4


def test_batches_are_formed_at_a_smaller_limit(server: ReplaceableModel) -> None:
    """64 before, 16 after: no batch is bisected, and none above the limit is sent for long."""
    with TritonClient(server.endpoint) as client:
        results, failures = run(dofn_of(server), lambda: server.replace(max_batch_size=16))
        statistics = client.statistics(BEFORE.name)
    assert (len(results), failures) == (ELEMENTS, {})
    sizes = [each["batch_size"] for each in statistics["model_stats"][0]["batch_stats"]]
    assert 16 in sizes


def test_further_required_input_is_a_clear_dead_letter(server: ReplaceableModel) -> None:
    """Nobody knows its value; the elements before it came are scored."""
    results, failures = run(
        dofn_of(server),
        lambda: server.replace(**FURTHER_INPUT),
        lambda number: {"x": np.full(4, number, np.float32)},
    )
    assert len(results) >= 64
    assert len(failures) >= ELEMENTS // 4
    for _, message, _ in failures.values():
        assert "input 'mask' of model 'changing' is missing" in message, message


def test_a_new_default_value_is_needed_for_other_outputs(server: ReplaceableModel) -> None:
    """A default value that does not fit any more fails the bundle."""
    dofn = dofn_of(server, default_value={"y": np.zeros(4, np.float32)})
    with pytest.raises(ConfigurationError, match="default_value does not fit the outputs"):
        run(dofn, lambda: server.replace(outputs=(Tensor("renamed", "FP32", (4,)),)))


def test_given_model_spec_is_not_asked_for_again(server: ReplaceableModel) -> None:
    """The dead letters say that it does not fit."""
    spec = ModelSpec("changing", "", (TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),), 64)
    results, failures = run(dofn_of(server, model_spec=spec), lambda: server.replace(**FP64_OUTPUT))
    assert len(results) >= 64
    _, message, _ = failures[ELEMENTS - 1]
    assert "output 'y' of model 'changing' is FP64, not FP32" in message
    assert "the given model_spec says inputs: x FP32 [4]" in message


def test_lock_file_holds_in_mid_job(server: ReplaceableModel, tmp_path: Path) -> None:
    """Smaller batches are followed; another datatype fails the bundle, though dead letters are taken."""
    lock = tmp_path / "changing.lock.json"
    assert main(["lock", server.endpoint, BEFORE.name, "--output", str(lock)]) == 0
    locked = dofn_of(server, model_spec=lock)
    results, failures = run(locked, lambda: server.replace(max_batch_size=16))
    assert (len(results), failures) == (ELEMENTS, {})
    message = r"the model has changed: .*changing\.lock\.json.*output 'y' is FP64, not FP32"
    with pytest.raises(ModelMismatchError, match=message):
        run(locked, lambda: server.replace(**FP64_OUTPUT))


def test_run_inference_follows_the_change(server: ReplaceableModel) -> None:
    """A handler's model is the same for all batches of a process."""
    handler = TritonModelHandler(server.endpoint, BEFORE.name)
    model = handler.load_model()
    batch = [np.full(4, number, np.float32) for number in range(200)]
    before: list[PredictionResult] = list(handler.run_inference(batch, model))
    server.replace(max_batch_size=16, **FP64_OUTPUT)
    after: list[PredictionResult] = list(handler.run_inference(batch, model))
    model.close()
    for results, dtype in ((before, np.float32), (after, np.float64)):
        values: list[Any] = [result.inference["y"] for result in results]  # type: ignore[index]
        assert [int(value[0]) for value in values] == list(range(200))
        assert {value.dtype for value in values} == {np.dtype(dtype)}


ROWS = np.arange(800, dtype=np.float32).reshape(200, 4)
OTHER_TYPE = r"gives output y FP64 \[4\] now.*built for y FP32 \[4\]"


@contextmanager
def numpy_dofn(server: ReplaceableModel) -> Iterator[TritonBatchInferenceDoFn]:
    """In a bundle."""
    options = InferenceOptions(endpoint=server.endpoint, outputs=("y",))
    output = TensorSpec("y", "FP32", (4,))
    dofn = TritonBatchInferenceDoFn(options, BEFORE.name, output, overlaps_batches=False)
    dofn.setup()
    try:
        dofn.start_bundle()
        yield dofn
    finally:
        dofn.teardown()


def test_numpy_batches_follow_another_limit(server: ReplaceableModel) -> None:
    """Rows are sent in slices of the new limit."""
    with numpy_dofn(server) as dofn:
        server.replace(max_batch_size=16)
        (scored,) = dofn.process_batch(ROWS, 0, None)
        assert np.array_equal(scored, ROWS)


def test_numpy_batches_refuse_another_type(server: ReplaceableModel) -> None:
    """Beam's types were fixed when the pipeline was built; also where a worker starts after the change."""
    with numpy_dofn(server) as dofn:
        server.replace(**FP64_OUTPUT)
        with pytest.raises(ConfigurationError, match=OTHER_TYPE):
            list(dofn.process_batch(ROWS, 0, None))
    with pytest.raises(ConfigurationError, match=OTHER_TYPE), numpy_dofn(server):
        pass
