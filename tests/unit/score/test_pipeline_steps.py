"""The steps that read files and limit failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow
import pyarrow.parquet
import pytest
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from beam_triton.errors import ConfigurationError, TooManyFailuresError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.score.column_arrays import ColumnArrays
from beam_triton.score.input_columns import InputColumns
from beam_triton.score.pipeline_steps import (
    BLOCKS,
    FAILURES,
    LimitFailures,
    ReadRows,
    RowSelection,
    ServedModel,
)
from beam_triton.score.row_reading import Failure, FileSource, RowBlock, match_files


def model_of(shape: tuple[int, ...]) -> ServedModel:
    """A model with one input ``x``; nobody serves it."""
    spec = ModelSpec("m", "1", (TensorSpec("x", "INT64", shape),), (), 8)
    return ServedModel(name="m", options=InferenceOptions(endpoint="http://nowhere.invalid:8000"), spec=spec)


def rows_of(block: RowBlock, model: ServedModel, selection: RowSelection) -> Any:
    """File, row and tensor, or file and row where there is none."""
    assert model.spec is not None
    groups, errors = ColumnArrays(model.spec, selection.inputs).arrays(block)
    name = Path(block.file).name
    for group in groups:
        for index, array in zip(group.indices, group.arrays["x"], strict=True):
            value = array.tolist() if array.size > 1 else array.item()
            yield name, int(block.numbers[index]), value
    for index in errors:
        yield name, int(block.numbers[index])


def read(
    patterns: list[str],
    selection: RowSelection,
    rows: Any,
    failures: Any,
    shape: tuple[int, ...] = (1,),
) -> Any:
    model = model_of(shape)
    pipeline = TestPipeline("FnApiRunner")
    found = pipeline | ReadRows(patterns, FileSource(piece_bytes=50), selection, model)
    made = found[BLOCKS] | beam.FlatMap(rows_of, model, selection)
    places = found[FAILURES] | beam.Map(lambda failure: (Path(failure.file).name, failure.row))
    assert_that(made, equal_to(rows), label="rows")
    assert_that(places, equal_to(failures), label="failures")
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(MetricsFilter().with_namespace("beam_triton_files"))["counters"]
    return {counter.key.metric.name: counter.committed for counter in counters if counter.committed}


def test_every_row_is_read_once_and_counted(tmp_path: Path) -> None:
    """Files of all kinds, matched twice over, cut into pieces: each row once, and counted."""
    (tmp_path / "a.csv").write_text("x\n" + "".join(f"{number}\n" for number in range(1, 200)) + "no\n")
    (tmp_path / "b.jsonl").write_text('{"x": 5}\n{"y": 5}\n')
    counters = read(
        [str(tmp_path / "*"), str(tmp_path / "a.csv")],
        RowSelection(),
        [
            *(("a.csv", number, number) for number in range(1, 200)),
            ("b.jsonl", 1, 5),
            ("a.csv", 200),
            ("b.jsonl", 2),
        ],
        [],
    )
    assert counters == {"rows_read": 202}


def test_rows_may_be_passed_over(tmp_path: Path) -> None:
    """``where`` takes the rows that hold a text; the others are neither elements nor failures."""
    (tmp_path / "a.csv").write_text("x,split\n1,train\n2,test\nno,train\n")
    (tmp_path / "b.jsonl").write_text('{"x": 5, "split": "test"}\n{"x": 6}\n')
    counters = read(
        [str(tmp_path / "*")],
        RowSelection(where=(("split", "test"),)),
        [("a.csv", 2, 2), ("b.jsonl", 1, 5)],
        [],
    )
    assert counters["rows_read"] == 2


def test_a_file_without_a_kept_column_fails_row_by_row(tmp_path: Path) -> None:
    """Another file of the job may have other columns: that ends nothing."""
    (tmp_path / "a.csv").write_text("id,x\n1,2\n")
    (tmp_path / "b.csv").write_text("x\n2\n3\n")
    read(
        [str(tmp_path / "*.csv")],
        RowSelection(keep=("id",)),
        [("a.csv", 1, 2)],
        [("b.csv", 1), ("b.csv", 2)],
    )


def test_damaged_files_and_files_that_do_not_fit_stop_nothing(tmp_path: Path) -> None:
    """A damaged file is one failure, one that lacks a range of columns a failure a row; others are read."""
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    (tmp_path / "b.parquet").write_bytes(b"no Parquet either, and larger than what is read in one piece")
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe" * 100)
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"from": [3], "to": [4]}), tmp_path / "e.parquet")
    counters = read(
        [str(tmp_path / "*")],
        RowSelection(inputs=(InputColumns.parse("x=from:to"),)),
        [("e.parquet", 1, [3, 4]), ("d.parquet", 1), ("d.parquet", 2)],
        [("a.parquet", None), ("b.parquet", None), ("c.csv", None)],
        (2,),
    )
    assert counters == {"rows_read": 6, "rows_failed": 3}


def test_a_pattern_without_a_file_is_an_error(tmp_path: Path) -> None:
    """A typing error must not look like an empty job."""
    with pytest.raises(ConfigurationError, match=r"there is no file .*missing\.csv"):
        match_files([str(tmp_path / "missing.csv")])


@pytest.mark.parametrize("name", ["a [1].csv", "a?.csv", "a*.csv"])
def test_a_name_may_hold_glob_characters(tmp_path: Path, name: str) -> None:
    """Its file is found where the pattern matches nothing, and read."""
    folder = tmp_path / "folder [x]"
    folder.mkdir()
    path = folder / name
    path.write_text("x\n1\n")
    assert match_files([str(path)]) == [(str(path), 4)]
    read([str(path)], RowSelection(), [(name, 1, 1)], [])


def test_the_message_for_a_missing_file_names_glob_characters(tmp_path: Path) -> None:
    """The user sees why a name was not taken for one."""
    with pytest.raises(
        ConfigurationError, match=r"a\[1\]\.csv \(the characters \[ \* \? make it a pattern\)"
    ):
        match_files([str(tmp_path / "a[1].csv")])


def test_failures_are_limited() -> None:
    """The error names the limit and the failure that passed it."""
    limit = LimitFailures(2)
    failures = [Failure("f.csv", number, "RowError", "no number", None) for number in range(1, 4)]
    assert [list(limit.process(failure)) for failure in failures[:2]] == [[failures[0]], [failures[1]]]
    with pytest.raises(TooManyFailuresError, match=r"more than 2 .* f\.csv, row 3: RowError: no number"):
        list(limit.process(failures[2]))
