"""Arrow tables, record batches and rows through `TritonBatchInference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.transforms import window
from apache_beam.typehints.batch import NumpyArray
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_triton import (
    ConfigurationError,
    InvalidRequestError,
    LocalProtocolError,
    TritonBatchInference,
)
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.pipelines import run, score


def scored(inputs: dict[str, Any]) -> dict[str, Any]:
    x, words = inputs["x"], inputs["word"]
    if (x < 0).any():
        raise ValueError("x is negative")
    return {
        "total": x.sum(axis=1, keepdims=True),
        "grid": np.repeat(x[:, np.newaxis], 2, axis=1).astype(np.uint8),
        "loud": np.array([[word[0].upper()] for word in words], dtype=object),
    }


MODEL = FakeModel(
    scored,
    inputs={"x": ("FP32", [2]), "word": ("BYTES", [1])},
    outputs={"total": ("FP32", [1]), "grid": ("UINT8", [2, 2]), "loud": ("BYTES", [1])},
    max_batch_size=4,
)
TWICE = FakeModel(
    lambda inputs: {"y": 2 * inputs["x"]},
    inputs={"x": ("FP32", [-1])},
    outputs={"y": ("FP32", [-1])},
)
CLASSES = FakeModel(
    lambda inputs: {"probabilities": inputs["x"]},
    inputs={"x": ("FP32", [2])},
    outputs={"probabilities": ("FP32", [2])},
    labels={"probabilities": ["ant", "bee"]},
)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with FakeTriton({"m": MODEL, "twice": TWICE, "classes": CLASSES}) as triton:
        yield triton.endpoint


def table_of(count: int, first: int = 0) -> pa.Table:
    """Rows that hold their own number."""
    numbers = range(first, first + count)
    return pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            "pixels": pa.array([[n, 0.5] for n in numbers], pa.list_(pa.float32(), 2)),
            "word": [f"w{n}" for n in numbers],
        }
    )


def inference(endpoint: str, **options: Any) -> TritonBatchInference:
    return TritonBatchInference(endpoint, "m", inputs={"x": "pixels"}, **options)


def test_tables_come_back_with_kept_columns_and_outputs(endpoint: str) -> None:
    """Several inputs and outputs; the schema is known beforehand, and rows keep their order."""
    transform = inference(endpoint, text_outputs=True)
    tables = [table_of(10), table_of(1, 10)]
    results = score(tables, transform).results
    schema = transform.output_schema(tables[0].schema)
    assert schema.names == ["id", "total", "grid", "loud"]
    assert schema.types == [pa.int64(), pa.float32(), pa.fixed_shape_tensor(pa.uint8(), (2, 2)), pa.string()]
    for given, result in zip(tables, sorted(results, key=lambda table: -len(table)), strict=True):
        assert isinstance(result, pa.Table)
        assert result.schema == schema
        assert result["id"].equals(given["id"])
        ids = result["id"].to_pylist()
        assert result["total"].to_pylist() == [n + 0.5 for n in ids]
        assert result["loud"].to_pylist() == [f"W{n}" for n in ids]
        grids = result["grid"].combine_chunks().to_numpy_ndarray()
        assert grids.tolist() == [[[n, 0]] * 2 for n in ids]


def test_record_batches_come_back_as_such(endpoint: str) -> None:
    """The kind that came in goes out; BYTES are binary unless they are said to be text."""
    (batch,) = table_of(6).to_batches()
    (result,) = score([batch.slice(2)], inference(endpoint, outputs=["loud"], keep="all")).results
    assert isinstance(result, pa.RecordBatch)
    assert result.schema.names == ["id", "pixels", "word", "loud"]
    assert result["loud"].to_pylist() == [b"W2", b"W3", b"W4", b"W5"]
    assert result["pixels"].equals(batch["pixels"].slice(2))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"keep": ["id"]}, ["id", "total"]),
        ({"keep": []}, ["total"]),
        ({"keep": ["word", "id"]}, ["word", "id", "total"]),
        ({"keep": ["id"], "prefix": "m_"}, ["id", "m_total"]),
        ({"keep": ["id"], "outputs": {"total": "sum"}}, ["id", "sum"]),
    ],
)
def test_columns_are_chosen_and_named(endpoint: str, options: dict[str, Any], names: list[str]) -> None:
    """As for rows."""
    (result,) = score([table_of(3)], inference(endpoint, **{"outputs": ["total"], **options})).results
    assert result.schema.names == names
    assert result[names[-1]].to_pylist() == [0.5, 1.5, 2.5]


def test_a_null_fails_its_row_alone(endpoint: str) -> None:
    """The others have results."""
    table = table_of(6).set_column(2, "word", pa.array(["w", "w", None, "w", "w", "w"]))
    pixels = [[0, 0.5], [1, 0.5], [2, 0.5], [3, None], None, [5, 0.5]]
    table = table.set_column(1, "pixels", pa.array(pixels, pa.list_(pa.float64())))
    transform = inference(endpoint, outputs=["total"]).with_exception_handling()
    outcome = score([table], transform)
    (result,) = outcome.results
    assert result.to_pydict() == {"id": [0, 1, 5], "total": [0.5, 1.5, 5.5]}
    failures = {failure.element["id"]: failure for failure in outcome.failures}
    assert sorted(failures) == [2, 3, 4]
    assert failures[2].error_type == "LocalProtocolError"
    assert failures[2].error_message == "null where input word BYTES [1] takes a value"
    assert failures[3].element == {"id": 3, "pixels": [3.0, None], "word": "w"}
    assert outcome.counters["elements"] == 6
    assert outcome.counters["failures"] == 3


def test_rows_that_the_server_refuses_fail_alone(endpoint: str) -> None:
    """The failure tells which server said what."""
    table = table_of(10, first=-2)
    outcome = score([table], inference(endpoint, outputs=["total"]).with_exception_handling())
    assert outcome.results[0]["id"].to_pylist() == list(range(8))
    first, second = sorted(outcome.failures, key=lambda failure: failure.element["id"])
    assert (first.element["id"], second.element["id"]) == (-2, -1)
    assert "x is negative" in first.error_message
    assert first.error_endpoint == endpoint
    assert first.error_status >= 400


def test_without_exception_handling_the_first_failed_row_is_named(endpoint: str) -> None:
    """By its number in the table, whether it was sent or not; also where its error makes no dead letter."""
    with pytest.raises(Exception, match=r"row 1 of its batch: .*x is negative"):
        score([table_of(3, first=-1).take([1, 0, 2])], inference(endpoint))
    table = table_of(3).set_column(2, "word", pa.array(["a", None, "b"]))
    with pytest.raises(LocalProtocolError, match="row 1 of its batch: null"):
        score([table], inference(endpoint))
    with pytest.raises(LocalProtocolError, match="row 1 of its batch: null"):
        score([table], inference(endpoint).with_exception_handling(exc_class=InvalidRequestError))


def test_failed_rows_yield_the_default(endpoint: str) -> None:
    """Those that could not be sent, and those that were refused, in their places."""
    table = table_of(4, first=-1).set_column(2, "word", pa.array(["a", "b", None, "c"]))
    outcome = score([table], inference(endpoint, outputs=["total"], default_value=-7.0))
    assert outcome.results[0].to_pydict() == {"id": [-1, 0, 1, 2], "total": [-7.0, 0.5, -7.0, 2.5]}
    assert outcome.counters["default_values"] == 2


def test_threshold_counts_rows(endpoint: str) -> None:
    """Not tables."""
    for share, fails in ((0.25, True), (0.35, False)):
        transform = inference(endpoint).with_exception_handling(threshold=share)
        tables = [table_of(7), table_of(3, first=-3)]
        if fails:
            with pytest.raises(Exception, match="3 of 10 elements failed"):
                score(tables, transform)
        else:
            assert len(score(tables, transform).failures) == 3
    with pytest.raises(ConfigurationError, match="leave out threshold"):
        transform = inference(endpoint, outputs=["total"], default_value=0.0)
        score([table_of(1)], transform.with_exception_handling(threshold=0.5))


def test_lists_of_several_lengths(endpoint: str) -> None:
    """Rows of one length share requests; results come in the table's order."""
    values = [[1.0], [1.0, 2.0], [3.0], [], [4.0, 5.0]]
    table = pa.table({"id": range(5), "x": pa.array(values, pa.list_(pa.float64()))})
    outcome = score([table], TritonBatchInference(endpoint, "twice"))
    (result,) = outcome.results
    assert result.schema.field("y").type == pa.list_(pa.float32())
    assert result.to_pydict() == {"id": [0, 1, 2, 3, 4], "y": [[2 * x for x in row] for row in values]}
    assert outcome.counters["requests"] == 3


def test_tables_without_rows_have_the_schema(endpoint: str) -> None:
    """Also where every row failed."""
    transform = inference(endpoint).with_exception_handling()
    empty, negative = table_of(0), table_of(1, first=-1)
    outcome = score([empty, negative], transform)
    assert [result.num_rows for result in outcome.results] == [0, 0]
    assert {result.schema for result in outcome.results} == {transform.output_schema(empty.schema)}
    assert len(outcome.failures) == 1


def test_classes_come_taken_apart(endpoint: str) -> None:
    """A label, a score and an index for each of the best classes."""
    table = pa.table({"x": pa.array([[0.25, 0.75], [1.0, 0.0]], pa.list_(pa.float32()))})
    for count, first in ((1, ("bee", 0.75, 1)), (2, (["bee", "ant"], [0.75, 0.25], [1, 0]))):
        transform = TritonBatchInference(endpoint, "classes", classification={"probabilities": count})
        (result,) = score([table], transform).results
        assert result.schema == transform.output_schema(table.schema)
        assert tuple(result.to_pylist()[0].values()) == first
        assert result.schema.names == [f"probabilities_{part}" for part in ("label", "score", "index")]


def test_columns_that_a_table_lacks_fail_its_rows(endpoint: str) -> None:
    """Another file of the same input may have them."""
    tables = [table_of(2), table_of(2).drop(["word"]), table_of(2).drop(["id"])]
    outcome = score(tables, inference(endpoint, keep=["id"]).with_exception_handling())
    assert [result.num_rows for result in outcome.results] == [2]
    messages = sorted({failure.error_message for failure in outcome.failures})
    assert len(outcome.failures) == 4
    assert "input 'word' of model 'm': the table has no column 'word'" in messages[0]
    assert "keep: there is no column 'id'" in messages[1]


def test_windows_and_timestamps(endpoint: str) -> None:
    """A table's results and failures come out at its own time, in all of its windows."""

    def build(pipeline: beam.Pipeline) -> Any:
        tables = (
            pipeline
            | beam.Create([0, 7, 12], reshuffle=False)
            | beam.Map(lambda n: window.TimestampedValue(table_of(5, first=n - 1), n))
            | beam.WindowInto(window.SlidingWindows(10, 5))
        )
        return tables | inference(endpoint, outputs=["total"]).with_exception_handling()

    outcome = run(build)
    windows = window.SlidingWindows(10, 5)
    outputs = {output.value["id"][0].as_py(): output for output in outcome.outputs["results"]}
    assert sorted(outputs) == [0, 6, 11]
    for first, stamp in ((0, 0), (6, 7), (11, 12)):
        assert outputs[first].timestamp == stamp
        assert sorted(outputs[first].windows) == sorted(windows.assign(window.WindowFn.AssignContext(stamp)))
    (failure,) = outcome.outputs["failures"]
    assert (failure.timestamp, len(failure.windows)) == (0, 2)


# Rows of Beam, in Arrow batches.


class Word(NamedTuple):
    id: int
    pixels: Sequence[float]
    word: str


def words(pipeline: beam.Pipeline, first: int = 0) -> Any:
    made = [Word(n, [n, 0.5], f"w{n}") for n in range(first, first + 10)]
    return pipeline | beam.Create(made, reshuffle=False).with_output_types(Word)


@pytest.mark.parametrize("options", [(), ("--runtime_type_check",), ("--runner=BundleBasedDirectRunner",)])
def test_rows_come_back_as_rows(endpoint: str, options: tuple[str, ...]) -> None:
    """With the schema of ``TritonInference(output="row")``, whether the runner carries batches or not."""
    transform = inference(endpoint, text_outputs=True)
    pipeline = beam.Pipeline("FnApiRunner")
    assert (words(pipeline) | transform).element_type == RowTypeConstraint.from_fields(
        [("id", int), ("total", np.float32), ("grid", Sequence[Sequence[np.int16]]), ("loud", str)]
    )
    outcome = run(lambda pipeline: words(pipeline) | transform, *options)
    rows = sorted(outcome.results, key=lambda row: row.id)
    assert [(row.id, row.total, row.loud) for row in rows] == [(n, n + 0.5, f"W{n}") for n in range(10)]
    assert [list(map(list, row.grid)) for row in rows] == [[[n, 0]] * 2 for n in range(10)]


def test_failed_rows_of_a_schema_are_rows(endpoint: str) -> None:
    """Their own columns, and why they failed."""
    outcome = run(lambda pipeline: words(pipeline, -2) | inference(endpoint).with_exception_handling())
    assert sorted(row.id for row in outcome.results) == list(range(8))
    failures = sorted(outcome.failures, key=lambda row: row.id)
    assert [(row.id, row.word) for row in failures] == [(-2, "w-2"), (-1, "w-1")]
    assert "x is negative" in failures[0].error_message


class Tables(beam.DoFn):
    """Tables as batches of rows, and whether batches of results came as tables."""

    @beam.DoFn.yields_elements  # type: ignore[untyped-decorator]  # Beam's own
    def process_batch(self, batch: pa.Table) -> Iterator[Any]:
        yield batch.num_rows, [str(kind) for kind in batch.schema.types]

    def get_input_batch_type(self, input_element_type: Any) -> Any:
        return pa.Table


def test_results_of_rows_are_batches_for_who_takes_batches(endpoint: str) -> None:
    """With Beam's own Arrow types."""
    look: Any = beam.ParDo(Tables())  # type: ignore[no-untyped-call]
    outcome = run(lambda pipeline: words(pipeline) | inference(endpoint, keep=[]) | look)
    ((count, types),) = outcome.results
    assert count == 10
    assert types == ["float", "list<: list<: int16 not null> not null>", "binary"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": {"image": "pixels"}}, "no input 'image'"),
        ({"keep": "id"}, "keep"),
        ({"text_outputs": ["grids"]}, "text_outputs"),
        ({"outputs": ["nothing"]}, "no output 'nothing'"),
        ({"default_value": 1.0}, "default_value"),
        ({"batching": {"bucket_boundaries": [8], "pad": {"x": 0}}}, "pads nothing"),
    ],
)
def test_options_are_checked(endpoint: str, options: dict[str, Any], message: str) -> None:
    """When the transform is made, or applied."""
    with pytest.raises(ConfigurationError, match=message):
        words(TestPipeline()) | TritonBatchInference(endpoint, "m", **{"inputs": {"x": "pixels"}, **options})


def test_an_output_with_the_name_of_a_kept_column_is_refused(endpoint: str) -> None:
    """The message says what to do; with a schema, before a worker starts."""
    table = table_of(1).append_column("total", pa.array([1]))
    transform = inference(endpoint)
    with pytest.raises(ConfigurationError, match="name 'total': name the outputs' columns by prefix="):
        transform.output_schema(table.schema)
    with pytest.raises(ConfigurationError, match="name 'total'"):
        score([table], inference(endpoint).with_exception_handling())
    (result,) = score([table], inference(endpoint, keep=["id"])).results
    assert result["total"].to_pylist() == [0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": {"x": "pixls"}}, "no column 'pixls'"),
        ({"inputs": None}, "no column 'x'; if another column feeds it"),
        ({"keep": ["idd"]}, "keep: there is no column 'idd'"),
    ],
)
def test_columns_that_a_schema_does_not_have_are_refused(
    endpoint: str, options: dict[str, Any], message: str
) -> None:
    """Before a worker starts, where the schema of the results is asked for."""
    transform = TritonBatchInference(endpoint, "m", **{"inputs": {"x": "pixels"}, **options})
    with pytest.raises(ConfigurationError, match=message):
        transform.output_schema(table_of(1).schema)


@pytest.mark.parametrize("options", [{"keep": ["id"]}, {"inputs": {"x": "a"}}, {"prefix": "p"}])
def test_arrays_have_no_columns_to_choose(endpoint: str, options: dict[str, Any]) -> None:
    """What is said about columns is refused for NumPy batches, rather than left aside."""
    rows = TestPipeline() | beam.Create([1]).with_output_types(NumpyArray[np.float32, (2,)])
    with pytest.raises(ConfigurationError, match="NumPy batches have no columns"):
        rows | TritonBatchInference(endpoint, "m", **options)


def test_elements_that_are_no_batches(endpoint: str) -> None:
    """Refused while the pipeline is built where their type shows it, otherwise by the worker."""
    with pytest.raises(ConfigurationError, match="not elements of type <class 'str'>"):
        score(["a"], inference(endpoint))
    untyped: Any = beam.Map(lambda text: text).with_output_types(Any)
    with pytest.raises(ConfigurationError, match="not str 'a'"):
        run(lambda pipeline: pipeline | beam.Create(["a"]) | untyped | inference(endpoint))


def test_rows_that_beam_makes_no_tables_of_are_refused(endpoint: str) -> None:
    """Before a worker starts, with what to use instead."""
    element_type = RowTypeConstraint.from_fields(
        [("pixels", Sequence[np.float32]), ("word", str), ("when", beam.utils.timestamp.Timestamp)]
    )
    rows = TestPipeline() | beam.Create([1]).with_output_types(element_type)
    with pytest.raises(ConfigurationError, match=r'TritonInference\(output="row"\)'):
        rows | inference(endpoint)
