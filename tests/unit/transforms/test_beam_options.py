"""Nothing is lost under Beam's debugging and type options, in any transform; servers are test doubles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.ml.inference.base import PredictionResult, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsSingleton
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import SlidingWindows, TimestampedValue
from apache_beam.typehints import Tuple
from apache_beam.typehints.batch import NumpyArray
from apache_beam.utils import shared

from beam_triton import (
    ConfigurationError,
    LocalProtocolError,
    TritonBatchInference,
    TritonInference,
    TritonInferenceDoFn,
    TritonModelHandler,
)
from beam_triton.testing import FakeModel, FakeTriton
from beam_triton.transport.session import SESSIONS
from tests.support.sockets import settles

COUNT = 200
BAD = {0, 77, 150}
KEYED = Tuple[str, np.ndarray]

DOUBLE = FakeModel(
    lambda inputs: {"y": 2 * inputs["x"]},
    inputs={"x": ("FP32", [1])},
    outputs={"y": ("FP32", [1])},
    max_batch_size=16,
)

_counted: dict[str, int] = {}


class _Nothing:
    pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server; in the end no session is left, with whatever options a pipeline ran."""
    with FakeTriton({"double": DOUBLE}) as triton:
        yield triton.endpoint
    # Beam keeps the last model of RunInference alive until another one is loaded.
    shared.Shared().acquire(_Nothing, tag="nothing")
    gc.collect()
    assert settles(lambda: len(SESSIONS), 0) == 0


@pytest.mark.parametrize("kind", [np.float32, np.int64, float])
def test_batches_of_single_values(endpoint: str, kind: Any) -> None:
    """Elements of a scalar type travel as one array, and feed an input of shape [1]."""
    values = [kind(n) for n in range(COUNT)]
    with TestPipeline() as pipeline:
        elements = pipeline | beam.Create(values, reshuffle=False).with_output_types(kind)
        results = elements | TritonBatchInference(endpoint, "double")
        assert_that(results | beam.Map(lambda y: float(y[0])), equal_to([2.0 * n for n in range(COUNT)]))


def numbers(pipeline: beam.Pipeline, *, bad: bool = False, keyed: bool = False) -> Any:
    """``COUNT`` elements, those of ``BAD`` with a shape that the model does not take."""
    arrays = [np.full(2 if bad and n in BAD else 1, n, np.float32) for n in range(COUNT)]
    elements: list[Any] = [(str(n), array) for n, array in enumerate(arrays)] if keyed else arrays
    return pipeline | beam.Create(elements, reshuffle=False).with_output_types(KEYED if keyed else np.ndarray)


def plain(pipeline: beam.Pipeline, endpoint: str) -> Any:
    return numbers(pipeline) | TritonInference(endpoint, "double")


def keyed(pipeline: beam.Pipeline, endpoint: str) -> Any:
    return numbers(pipeline, keyed=True) | TritonInference(endpoint, "double")


def with_default(pipeline: beam.Pipeline, endpoint: str) -> Any:
    return numbers(pipeline, bad=True) | TritonInference(endpoint, "double", default_value=0)


def typed_neighbours(pipeline: beam.Pipeline, endpoint: str) -> Any:
    value_of: Any = beam.Map(lambda result: float(result.inference["y"][0]))
    return plain(pipeline, endpoint) | value_of.with_input_types(PredictionResult).with_output_types(float)


def sliding_windows(pipeline: beam.Pipeline, endpoint: str) -> Any:
    stamp: Any = beam.Map(lambda array: TimestampedValue(array, float(array[0])))
    windowed = numbers(pipeline) | stamp | beam.WindowInto(SlidingWindows(10, 5))
    return windowed | TritonInference(endpoint, "double")


def switched_version(pipeline: beam.Pipeline, endpoint: str) -> Any:
    versions = AsSingleton(pipeline | "Versions" >> beam.Create([1], reshuffle=False))
    return numbers(pipeline) | TritonInference(endpoint, "double", model_version=versions)


def switched_dead_letters(pipeline: beam.Pipeline, endpoint: str) -> Any:
    models = AsSingleton(pipeline | "Models" >> beam.Create([("double", 1)], reshuffle=False))
    return numbers(pipeline, bad=True) | TritonInference(endpoint, models).with_exception_handling()


def numpy_batches(pipeline: beam.Pipeline, endpoint: str) -> Any:
    array = NumpyArray[np.float32, (1,)]
    elements = [np.full(1, n, np.float32) for n in range(COUNT)]
    created = pipeline | beam.Create(elements, reshuffle=False).with_output_types(array)
    return created | TritonBatchInference(endpoint, "double")


def arrow_tables(pipeline: beam.Pipeline, endpoint: str) -> Any:
    tables = [pa.table({"x": pa.array([n], pa.float32())}) for n in range(COUNT)]
    return pipeline | beam.Create(tables, reshuffle=False) | TritonBatchInference(endpoint, "double")


def run_inference(pipeline: beam.Pipeline, endpoint: str) -> Any:
    return numbers(pipeline) | RunInference(TritonModelHandler(endpoint, "double"))


def bare_dofn(pipeline: beam.Pipeline, endpoint: str) -> Any:
    return numbers(pipeline) | beam.ParDo(TritonInferenceDoFn(endpoint, "double"))


def dead_letters(pipeline: beam.Pipeline, endpoint: str) -> Any:
    return numbers(pipeline, bad=True) | TritonInference(endpoint, "double").with_exception_handling()


def keyed_dead_letters(pipeline: beam.Pipeline, endpoint: str) -> Any:
    elements = numbers(pipeline, bad=True, keyed=True)
    results, failures = elements | TritonInference(endpoint, "double").with_exception_handling()
    message_of: Any = beam.Map(lambda failure: failure[1][1])
    return results, failures | message_of.with_output_types(str)


def limited_dead_letters(pipeline: beam.Pipeline, endpoint: str) -> Any:
    transform = TritonInference(endpoint, "double").with_exception_handling(threshold=0.5)
    return numbers(pipeline, bad=True) | transform


WITHOUT_FAILURES = (
    plain,
    keyed,
    with_default,
    typed_neighbours,
    sliding_windows,
    switched_version,
    numpy_batches,
    arrow_tables,
    run_inference,
)
WITH_FAILURES = (dead_letters, switched_dead_letters, keyed_dead_letters, limited_dead_letters)
TRANSFORMS = (*WITHOUT_FAILURES, bare_dofn, *WITH_FAILURES)

OPTIONS = (
    ("--runtime_type_check",),
    ("--performance_runtime_type_check",),
    ("--no_pipeline_type_check",),
    ("--type_check_additional=all",),
    ("--runner=BundleBasedDirectRunner",),
    ("--runner=BundleBasedDirectRunner", "--runtime_type_check"),
    ("--direct_running_mode=multi_threading", "--direct_num_workers=2"),
    ("--streaming",),
    ("--no_direct_runner_use_stacked_bundle",),
    ("--experiments=data_sampling",),
    ("--update_compatibility_version=2.70.0",),
    ("--pickle_library=cloudpickle", "--save_main_session"),
)


class Count(beam.DoFn):
    def __init__(self, name: str) -> None:
        self._name = name

    def process(self, element: Any) -> tuple[int, ...]:
        _counted[self._name] = _counted.get(self._name, 0) + 1
        return ()


def counts(build: Any, endpoint: str, options: tuple[str, ...]) -> tuple[int, ...]:
    """How many elements come out of each output."""
    _counted.clear()
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *options]))
    built = build(pipeline, endpoint)
    outputs = built if isinstance(built, tuple) else (built,)
    for index, output in enumerate(outputs):
        _ = output | f"Count{index}" >> beam.ParDo(Count(str(index))).with_output_types(int)
    pipeline.run().wait_until_finish()
    return tuple(_counted.get(str(index), 0) for index in range(len(outputs)))


def expected(build: Any) -> tuple[int, ...]:
    return (COUNT - len(BAD), len(BAD)) if build in WITH_FAILURES else (COUNT,)


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("build", TRANSFORMS)
def test_every_element_comes_out(build: Any, options: tuple[str, ...], endpoint: str) -> None:
    """Every element comes out once, as a result or a dead letter, whoever looks at the outputs first."""
    assert counts(build, endpoint, options) == expected(build)


@pytest.mark.parametrize(
    "build",
    [
        plain,
        keyed,
        with_default,
        typed_neighbours,
        numpy_batches,
        bare_dofn,
        dead_letters,
        keyed_dead_letters,
    ],
)
def test_all_outputs_are_typed(build: Any, endpoint: str) -> None:
    """Beam finds a type for every output where it demands one, as far as its own steps have them."""
    assert counts(build, endpoint, ("--type_check_strictness=ALL_REQUIRED",)) == expected(build)


def test_pardo_that_catches_failures_is_refused(endpoint: str) -> None:
    """Beam's ParDo cannot know which element of a batch failed: the error says what to use instead."""
    transform: Any = beam.ParDo(TritonInferenceDoFn(endpoint, "double"))
    with pytest.raises(ConfigurationError, match=r"TritonInference\(…\)\.with_exception_handling\(\)"):
        counts(
            lambda pipeline, _: tuple(numbers(pipeline) | transform.with_exception_handling()), endpoint, ()
        )


def test_failing_bundle_does_not_go_on(endpoint: str) -> None:
    """Whoever catches the error of an element and goes on loses no other element without an error."""
    dofn = TritonInferenceDoFn(endpoint, "double")
    dofn.setup()
    dofn.start_bundle()
    bad, good = (beam.transforms.window.GlobalWindows.windowed_value(np.zeros(n, np.float32)) for n in (2, 1))
    with pytest.raises(LocalProtocolError):
        dofn.process(bad.value, bad)
    with pytest.raises(ConfigurationError, match="element 0 of its bundle: input 'x' takes"):
        dofn.process(good.value, good)
    with pytest.raises(ConfigurationError, match="would lose the others"):
        dofn.finish_bundle()
    dofn.teardown()


def test_outputs_can_be_looked_at_twice(endpoint: str) -> None:
    """What ``process`` and ``finish_bundle`` give is the same for each who looks at it."""
    dofn = TritonInferenceDoFn(endpoint, "double", with_exception_handling=True)
    dofn.setup()
    dofn.start_bundle()
    given = [
        beam.transforms.window.GlobalWindows.windowed_value(np.zeros(n, np.float32)) for n in [1] * 40 + [2]
    ]
    outputs = [dofn.process(each.value, each) for each in given]
    outputs.append(dofn.finish_bundle())
    first, second = ([output for part in outputs for output in part] for _ in range(2))
    dofn.teardown()
    assert len(first) == len(second) == len(given)
