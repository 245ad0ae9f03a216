"""`TritonBatchInference` on a real Triton: NumPy batches in and out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms import window
from apache_beam.typehints.batch import N, NumpyArray

from beam_triton import (
    ConfigurationError,
    InvalidRequestError,
    LocalProtocolError,
    ModelSpec,
    RemoteProtocolError,
    TensorSpec,
    TritonBatchInference,
)
from beam_triton.testing import LocalTriton
from tests.support import faults, sockets
from tests.support.pipelines import Run, run

ROWS = 100


class Batches(beam.DoFn):
    """NumPy batches of rows that hold their own number; those of ``negative`` hold it below zero."""

    def __init__(
        self, width: int, negative: Iterable[int] = (), batch_rows: int = 50, dtype: Any = np.float32
    ) -> None:
        self._width = width
        self._negative = set(negative)
        self._batch_rows = batch_rows
        self._dtype = dtype

    @beam.DoFn.yields_batches  # type: ignore[untyped-decorator]  # Beam's own
    def process(self, count: int) -> Iterator[Any]:
        for first in range(0, count, self._batch_rows):
            numbers = range(first, min(first + self._batch_rows, count))
            signed = [-n - 1 if n in self._negative else n for n in numbers]
            yield np.repeat(np.array(signed, self._dtype)[:, np.newaxis], self._width, axis=1)

    def get_output_batch_type(self, input_element_type: Any) -> Any:
        return NumpyArray[self._dtype, (N, self._width)]

    def infer_output_type(self, input_element_type: Any) -> Any:
        return NumpyArray[self._dtype, (self._width,)]


def scored(
    dofn: Batches,
    transform: TritonBatchInference,
    *,
    count: int = ROWS,
    then: Callable[[Any], Any] = lambda results: results,
) -> Run:
    """The rows of one bundle through the transform; ``then`` is what follows in the same stage."""
    return run(
        lambda pipeline: then(pipeline | beam.Create([count], reshuffle=False) | beam.ParDo(dofn) | transform)
    )


def numbers(outcome: Run) -> list[float]:
    return sorted(float(row[0]) for row in outcome.results)


@pytest.mark.parametrize("batch_rows", [1, 7, 32, 50, 100])
def test_every_row_comes_out_once(triton: LocalTriton, batch_rows: int) -> None:
    """Batches of any size, the model's limit of 32 a request and what is larger, give a row for each row."""
    outcome = scored(Batches(4, batch_rows=batch_rows), TritonBatchInference(triton.endpoint, "double"))
    assert numbers(outcome) == [2.0 * n for n in range(ROWS)]
    assert all(row.shape == (4,) and row.dtype == np.float32 for row in outcome.results)
    requests_a_batch = -(-batch_rows // 32)
    assert outcome.counters["requests"] >= -(-ROWS // batch_rows) * requests_a_batch - 1
    assert outcome.counters["elements"] == ROWS
    assert outcome.distributions["batch_size"].max <= 32


class FirstAndLast(beam.DoFn):
    """Gives each batch of results as its first number, its last and its length, if it is in order."""

    @beam.DoFn.yields_elements  # type: ignore[untyped-decorator]  # Beam's own
    def process_batch(self, batch: np.ndarray) -> Iterator[Any]:
        assert (np.diff(batch[:, 0]) == 2.0).all(), batch[:, 0]
        yield float(batch[0, 0]), float(batch[-1, 0]), len(batch)

    def get_input_batch_type(self, input_element_type: Any) -> Any:
        return NumpyArray[np.float32, (N, 4)]


@pytest.mark.parametrize("batch_rows", [7, 50])
def test_a_batch_of_results_has_its_rows_order(triton: LocalTriton, batch_rows: int) -> None:
    """Results come as batches of the sizes that went in, rows in order, whatever order answers came in."""
    outcome = scored(
        Batches(4, batch_rows=batch_rows),
        TritonBatchInference(triton.endpoint, "double"),
        then=lambda results: results | beam.ParDo(FirstAndLast()),  # type: ignore[no-untyped-call]  # Beam's
    )
    expected = [
        (2.0 * first, 2.0 * (min(first + batch_rows, ROWS) - 1), min(batch_rows, ROWS - first))
        for first in range(0, ROWS, batch_rows)
    ]
    assert sorted(outcome.results) == expected


def test_small_batches_are_in_flight_together(triton: LocalTriton) -> None:
    """Batches of a few rows do not wait for each other: several connections are in use at a time."""
    outcome = scored(Batches(128, batch_rows=4), TritonBatchInference(triton.endpoint, "remote_like"))
    assert numbers(outcome) == list(range(ROWS))
    assert outcome.counters["connections_opened"] > 2


def test_sizes_and_bytes_of_requests(triton: LocalTriton) -> None:
    """``max_batch_size`` and ``max_batch_bytes`` bound the rows of a request."""
    few = TritonBatchInference(triton.endpoint, "double", batching={"max_batch_size": 10})
    assert scored(Batches(4), few).distributions["batch_size"].max == 10
    small = TritonBatchInference(triton.endpoint, "double", batching={"max_batch_bytes": 5 * 16})
    assert scored(Batches(4), small).distributions["batch_size"].max == 5
    tiny = TritonBatchInference(triton.endpoint, "double", batching={"max_batch_bytes": 1})
    assert scored(Batches(4), tiny, count=10).distributions["batch_size"].max == 1


def test_batches_that_beam_makes_of_elements(triton: LocalTriton) -> None:
    """Single arrays with a declared type are batched by Beam on their way in."""

    def build(pipeline: beam.Pipeline) -> Any:
        rows = pipeline | beam.Create(range(ROWS), reshuffle=False)
        typed = rows | beam.Map(lambda n: np.full(4, n, np.float32)).with_output_types(
            NumpyArray[np.float32, (4,)]
        )
        return typed | TritonBatchInference(triton.endpoint, "double")

    assert numbers(run(build)) == [2.0 * n for n in range(ROWS)]


def test_one_model_after_another(triton: LocalTriton) -> None:
    """The output's batches are the next model's input, with one slot and one connection for both."""
    options: dict[str, Any] = {"max_concurrent_requests": 1, "pool": {"max_total": 1, "max_idle": 1}}
    outcome = scored(
        Batches(4),
        TritonBatchInference(triton.endpoint, "double", **options),
        then=lambda results: results | "again" >> TritonBatchInference(triton.endpoint, "double", **options),
    )
    assert numbers(outcome) == [4.0 * n for n in range(ROWS)]


@pytest.mark.parametrize(
    ("windows", "each"),
    [(window.FixedWindows(10), 1), (window.SlidingWindows(10, 5), 2), (window.SlidingWindows(12, 3), 4)],
)
def test_windows_and_timestamps(triton: LocalTriton, windows: Any, each: int) -> None:
    """Every row comes out at its own time and in all of its own windows, and is grouped with them."""

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        rows = (
            pipeline
            | beam.Create(range(ROWS), reshuffle=False)
            | beam.Map(lambda n: window.TimestampedValue(n, n // 4))
            | beam.WindowInto(windows)
            | beam.Map(lambda n: np.full(4, n, np.float32)).with_output_types(NumpyArray[np.float32, (4,)])
        )
        results = rows | TritonBatchInference(triton.endpoint, "double")
        counted = (
            results
            | beam.Map(lambda row: ("all", float(row[0])))
            | beam.GroupByKey()
            | beam.MapTuple(lambda key, values: (len(values), sum(values)))
        )
        return {"results": results, "counted": counted}

    outcome = run(build)
    assert len(outcome.outputs["results"]) == ROWS
    for output in outcome.outputs["results"]:
        n = output.value[0] / 2
        assert output.timestamp == n // 4
        assert sorted(output.windows) == sorted(windows.assign(window.WindowFn.AssignContext(int(n // 4))))
        assert len(output.windows) == each
    assert sum(count for count, _ in (output.value for output in outcome.outputs["counted"])) == ROWS * each


def test_rows_that_fail_yield_the_default(triton: LocalTriton) -> None:
    """Refused rows stand alone and yield ``default_value``, given by name or not; the others are scored."""
    for default_value in (-5.0, [-5.0], {"y": [-5.0]}):
        transform = TritonBatchInference(triton.endpoint, "rejecting", default_value=default_value)
        outcome = scored(Batches(1, negative=[3, 4, 77]), transform)
        expected = [-5.0] * 3 + [2.0 * n for n in range(ROWS) if n not in (3, 4, 77)]
        assert numbers(outcome) == expected
        assert outcome.counters["default_values"] == 3
        assert outcome.counters["elements"] == ROWS


def test_a_row_that_cannot_be_sent_yields_the_default(triton: LocalTriton) -> None:
    """A value that the input's dtype cannot hold is its row's fault alone."""
    transform = TritonBatchInference(triton.endpoint, "rejecting", default_value=0.5)
    outcome = scored(Batches(1, dtype=np.float64), transform, count=8)
    assert numbers(outcome) == [2.0 * n for n in range(8)]
    huge = scored(Batches(1, dtype=np.int64, batch_rows=4), transform, count=8)
    assert numbers(huge) == [2.0 * n for n in range(8)]
    infinite = scored(TooLarge(1, dtype=np.float64), transform, count=8)
    assert numbers(infinite) == sorted([0.5, *(2.0 * n for n in range(8) if n != 3)])


class TooLarge(Batches):
    """Rows of which number 3 would be infinite in FP32."""

    @beam.DoFn.yields_batches  # type: ignore[untyped-decorator]  # Beam's own
    def process(self, count: int) -> Iterator[Any]:
        for batch in super().process(count):
            yield np.where(batch == 3, 1e300, batch)


def test_rows_that_fail_become_dead_letters(triton: LocalTriton) -> None:
    """Each failed row stands beside the results with its reason; the batch goes on without it."""
    transform = TritonBatchInference(triton.endpoint, "rejecting").with_exception_handling()
    outcome = scored(Batches(1, negative=[3, 4, 77]), transform)
    assert numbers(outcome) == [2.0 * n for n in range(ROWS) if n not in (3, 4, 77)]
    assert sorted(row.tolist() for row, _ in outcome.failures) == [[-78.0], [-5.0], [-4.0]]
    assert {reason[0] for _, reason in outcome.failures} == {InvalidRequestError}
    assert "x is negative" in outcome.failures[0][1][1]
    with pytest.raises(InvalidRequestError, match="row 3 of its batch"):
        transform = TritonBatchInference(triton.endpoint, "rejecting")
        scored(Batches(1, negative=[3]), transform.with_exception_handling(exc_class=LocalProtocolError))
    with pytest.raises(Exception, match="3 of 100 elements failed"):
        transform = TritonBatchInference(triton.endpoint, "rejecting")
        scored(Batches(1, negative=[3, 4, 77]), transform.with_exception_handling(threshold=0.02))


def test_without_a_default_the_row_is_named(triton: LocalTriton) -> None:
    """The first row that fails for good fails the bundle, by its number in its batch."""
    with pytest.raises(InvalidRequestError, match=r"row 27 of its batch: .*x is negative"):
        scored(Batches(1, negative=[77]), TritonBatchInference(triton.endpoint, "rejecting"))


def test_rows_of_another_shape_or_dtype(triton: LocalTriton) -> None:
    """What the model's input cannot take is refused with what it takes."""
    with pytest.raises(LocalProtocolError, match=r"'x' takes FP32 of shape \[batch, 4\]"):
        scored(Batches(5), TritonBatchInference(triton.endpoint, "double"))


def test_an_answer_with_a_row_less(triton: LocalTriton) -> None:
    """Rows are never guessed."""
    with pytest.raises(RemoteProtocolError, match=r"has shape \[31, 1\]"):
        scored(Batches(1), TritonBatchInference(triton.endpoint, "one_row_less"))


def test_the_output_is_chosen_and_only_it_is_asked_for(triton: LocalTriton) -> None:
    """Of several outputs one is named; the others do not travel."""
    transform = TritonBatchInference(triton.endpoint, "ragged", output="total")
    outcome = scored(Batches(1000), transform, count=32)
    assert numbers(outcome) == [1000.0 * n for n in range(32)]
    assert outcome.distributions["response_bytes"].max < 1000


@pytest.mark.parametrize(
    ("model_name", "options", "message"),
    [
        ("sum_and_difference", {}, "one input"),
        ("unbatched", {}, "batch dimension"),
        ("ragged", {}, "total, doubled"),
        ("ragged", {"output": "doubled"}, "fixed NumPy shape"),
        ("identity_bytes", {}, "fixed NumPy shape"),
        ("double", {"output": "z"}, "no output 'z'; it has y"),
        ("double", {"output": "y", "outputs": ["y"]}, "say the same"),
        ("classifier", {"classification": {"scores": 1}}, "fixed NumPy shape"),
        ("double", {"default_value": [1.0]}, "default_value"),
        ("countdown", {}, "decoupled"),
    ],
)
def test_models_and_options_that_do_not_fit(
    triton: LocalTriton, model_name: str, options: dict[str, Any], message: str
) -> None:
    """What cannot work is refused while the pipeline is built."""
    with pytest.raises(ConfigurationError, match=message):
        scored(Batches(4), TritonBatchInference(triton.endpoint, model_name, **options))


def test_elements_without_a_numpy_type(triton: LocalTriton) -> None:
    """Elements that are no NumPy type are refused while the pipeline is built, with what to do."""
    with pytest.raises(ConfigurationError, match=r"with_output_types\(NumpyArray"):
        run(lambda pipeline: pipeline | beam.Create(["a"]) | TritonBatchInference(triton.endpoint, "double"))


def test_built_without_a_server() -> None:
    """With ``model_spec`` nothing is asked while the pipeline is built."""
    spec = ModelSpec("m", "1", (TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (2,)),), 8)
    with faults.refusing_port() as port:
        transform = TritonBatchInference(f"http://127.0.0.1:{port}", "m", model_spec=spec)
        pipeline = beam.Pipeline("FnApiRunner")
        rows = pipeline | beam.Create([1]) | beam.ParDo(Batches(4))
        assert (rows | transform).element_type == NumpyArray[np.float32, (2,)]


def fail(row: Any) -> None:
    raise ValueError("a sibling fails")


def test_a_failing_sibling_leaves_nothing_in_flight(triton: LocalTriton) -> None:
    """When what follows fails while a batch is under way, its requests end with it."""
    port = int(triton.endpoint.rpartition(":")[2])
    gc.collect()
    before = sockets.settles(lambda: sockets.established(port), 0)
    transform = TritonBatchInference(
        triton.endpoint, "remote_like", batching={"max_batch_size": 1}, max_concurrent_requests=4
    )
    with pytest.raises(Exception, match="a sibling fails"):
        scored(Batches(128), transform, then=lambda results: results | beam.Map(fail))
    assert sockets.settles(lambda: sockets.established(port), before) == before
