"""Results as JSON Lines and Parquet, and files that are written atomically, each row once."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from beam_triton.errors import ConfigurationError
from beam_triton.score.pipeline_steps import ScoredRows
from beam_triton.score.result_writing import (
    Columns,
    ColumnSink,
    ColumnWriter,
    Target,
    check_fields,
    failure_columns,
    json_lines,
    json_text,
    restored,
    result_columns,
)
from beam_triton.score.row_reading import Failure, RowBlock


def table_block(columns: dict[str, Any]) -> RowBlock:
    table = pyarrow.RecordBatch.from_pydict(columns)
    return RowBlock("f.csv", np.arange(7, 7 + table.num_rows), table)


def scored(rows: RowBlock, **outputs: Any) -> ScoredRows:
    return ScoredRows(rows, {name: np.asarray(array) for name, array in outputs.items()}, "m:1")


def lines(rows: ScoredRows, keep: dict[str, str], with_origin: bool = False) -> list[dict[str, Any]]:
    """Lines of JSON, read back by a strict reader."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    text = bytes(json_lines(result_columns(rows, keep=keep, with_origin=with_origin))).decode()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.removesuffix("\n").split("\n")]


def test_a_result_is_flat_and_in_order() -> None:
    """Kept columns, origin, outputs and model; an output without a dimension is a value, others are lists."""
    rows = table_block({"id": ['a\u00e9"b', "c\n"], "x": ["1", "2"]})
    outputs = {
        "label": np.array([3, 4]),
        "scores": np.array([[0.1, 1.0], [3e-20, 2.5]], np.float32),
        "text": np.array([b"ok", b'"'], object),
        "cube": np.arange(8).reshape(2, 2, 2),
        "empty": np.empty((2, 0), np.float32),
    }
    first, second = lines(scored(rows, **outputs), {"name": "id"}, with_origin=True)
    assert list(first) == ["name", "file", "row", "label", "scores", "text", "cube", "empty", "model"]
    assert (first["name"], first["file"], first["row"]) == ('a\u00e9"b', "f.csv", 7)
    assert (first["label"], first["text"], first["model"]) == (3, "ok", "m:1")
    assert (second["name"], second["row"], second["text"]) == ("c\n", 8, '"')
    assert np.array(second["scores"], np.float32).tolist() == outputs["scores"][1].tolist()
    assert (first["cube"], second["cube"], first["empty"]) == ([[0, 1], [2, 3]], [[4, 5], [6, 7]], [])


NUMBERS = numpy_strategies.arrays(
    st.sampled_from(["<f2", "<f4", "<f8", "<i8", "<u8", "i1", "?"]),
    st.tuples(st.integers(1, 3), st.integers(0, 5)),
)


@given(NUMBERS)
def test_every_number_comes_back_exactly(array: np.ndarray[Any, Any]) -> None:
    """Whatever the datatype, a reader that knows it gets the very same values; NaN and infinity as text."""
    rows = table_block({"id": [str(index) for index in range(len(array))]})
    for found, expected in zip(lines(scored(rows, y=array), {}), array, strict=True):
        back = [float(value) if isinstance(value, str) else value for value in found["y"]]
        np.testing.assert_array_equal(np.array(back, dtype=array.dtype), expected)


@given(st.lists(st.text(max_size=8) | st.none(), min_size=1, max_size=5))
def test_every_text_comes_back(texts: list[str | None]) -> None:
    """Quotes, line ends and control characters are escaped, and null is null."""
    rows = table_block({"id": pyarrow.array(texts, pyarrow.string())})
    found = lines(scored(rows, y=np.zeros(len(texts))), {"id": "id"})
    assert [line["id"] for line in found] == texts


def test_slices_of_a_parquet_column_are_written_as_they_are() -> None:
    """Lists, nulls and what JSON lacks, from rows in the middle of a column."""
    columns = {
        "list": [[1.5], None, [2.5, 3.5], []],
        "number": [1.5, None, float("nan"), float("-inf")],
        "date": [datetime.date(2024, 2, 29)] * 4,
        "raw": [b"a", b"b", b"\xff", None],
        "flag": [True, False, None, True],
    }
    rows = table_block(columns).take(np.array([1, 2, 3]))
    found = lines(scored(rows, y=np.zeros(3)), {name: name for name in columns})
    assert [line["list"] for line in found] == [None, [2.5, 3.5], []]
    assert [line["number"] for line in found] == [None, "NaN", "-Infinity"]
    assert [line["date"] for line in found] == ["2024-02-29"] * 3
    assert [line["raw"] for line in found] == ["b", {"base64": "/w=="}, None]
    assert [line["flag"] for line in found] == [False, None, True]
    sliced = json_lines({"list": pyarrow.array([[0], [1, 2], [3]]).slice(1)})
    assert bytes(sliced) == b'{"list": [1, 2]}\n{"list": [3]}\n'


def test_kept_values_of_json_lines_stay_what_they_are() -> None:
    """Objects differ in their keys and kinds: what is not there is null, and nothing is added."""
    objects: list[dict[str, Any]] = [
        {"a": {"deep": [1]}, "t": "\ud800"},
        {"a": {"other": 2.5}},
        {"a": "text", "b": 1},
        {"b": 2.5},
    ]
    block = RowBlock("f.jsonl", np.arange(1, 5), None, objects)
    found = lines(scored(block, y=np.arange(4)), {"a": "a", "b": "b", "t": "t"})
    assert [line["a"] for line in found] == [{"deep": [1]}, {"other": 2.5}, "text", None]
    assert [line["b"] for line in found] == [None, None, 1, 2.5]
    assert [line["t"] for line in found] == ["\ud800", None, None, None]


def test_bytes_are_text_or_base64() -> None:
    """Text where they are UTF-8, marked base64 where they are not."""
    rows = table_block({"id": ["a", "b"]})
    found = lines(scored(rows, y=np.array([[b"ok"], [b"\xff"]], object)), {})
    assert [line["y"] for line in found] == [["ok"], [{"base64": "/w=="}]]


@pytest.mark.parametrize("field", ["label", "model", "file"])
def test_a_kept_column_may_not_hide_another_field(field: str) -> None:
    """The message says how to keep it under another name."""
    with pytest.raises(ConfigurationError, match=f"expected_{field}=c"):
        check_fields({field: "c"}, with_origin=True, outputs=["label"])


def test_what_json_lacks_is_written_as_text() -> None:
    """Values of Parquet files, in failures and kept columns."""
    value = {
        "date": datetime.date(2024, 2, 29),
        "price": decimal.Decimal("1.10"),
        "raw": b"\xff",
        "nan": [float("nan"), float("-inf")],
        1: (True, None),
    }
    assert json.loads(json_text(value)) == {
        "date": "2024-02-29",
        "price": "1.10",
        "raw": {"base64": "/w=="},
        "nan": ["NaN", "-Infinity"],
        "1": [True, None],
    }
    line = json_lines(failure_columns(Failure("f.parquet", 7, "RowError", "no number", value)))
    assert json.loads(bytes(line)) == {
        "file": "f.parquet",
        "row": 7,
        "error": "RowError",
        "message": "no number",
        "data": {
            "date": "2024-02-29",
            "price": "1.10",
            "raw": {"base64": "/w=="},
            "nan": [{"float": "NaN"}, {"float": "-Infinity"}],
            "1": [True, None],
        },
    }


def test_data_of_a_failure_become_what_they_were() -> None:
    """Numbers and bytes that JSON lacks, at any depth; text that looks like them stays text."""
    data = {"x": [1.5, float("inf"), [float("-inf")]], "b": b"\xff\x00", "text": "NaN", "none": None}
    line = bytes(json_lines(failure_columns(Failure("f.parquet", 7, "E", "m", data))))
    assert restored(json.loads(line)["data"]) == data


@pytest.mark.parametrize(
    "data",
    [
        {"base64": "/9j/"},
        {"float": "1.5"},
        {"x": {"float": "fast"}},
        {"x": [{"float": 1}]},
        {"x": {"base64": 7}},
        {"x": {"base64": "not of base64!"}},
    ],
)
def test_rows_that_look_like_marked_values_stay_rows(data: dict[str, Any]) -> None:
    """A file's only column may have such a name; and so may an object's key."""
    assert restored(data) == data


def parquet(*rows: Columns) -> Any:
    class Kept(io.BytesIO):
        def close(self) -> None:
            self.content = self.getvalue()

    stream = Kept()
    writer = ColumnWriter(stream, "parquet")
    for columns in rows:
        assert writer.write(columns) == len(columns["model"])
    writer.close()
    return pyarrow.parquet.read_table(pyarrow.BufferReader(stream.content))


def results(objects: list[dict[str, Any]], keep: dict[str, str]) -> Columns:
    """Results of rows of JSON Lines, with outputs of several ranks."""
    count = len(objects)
    rows = RowBlock("f.jsonl", np.arange(count), None, objects)
    outputs: dict[str, Any] = {
        "label": np.ones(count, np.int64),
        "scores": np.full((count, 1, 2), 0.5, np.float32),
        "text": np.array([b"\xff"] * count, object),
    }
    return result_columns(ScoredRows(rows, outputs, "m:1"), keep=keep, with_origin=False)


def test_parquet_columns_have_the_models_types() -> None:
    """One value is a value, an array a list of its rank, and BYTES are binary."""
    table = parquet(results([{"id": "a", "n": 1}, {"id": "b", "n": None}], {"id": "id", "n": "n"}))
    assert [(field.name, str(field.type).replace("item", "element")) for field in table.schema] == [
        ("id", "string"),
        ("n", "int64"),
        ("label", "int64"),
        ("scores", "list<element: list<element: float>>"),
        ("text", "binary"),
        ("model", "string"),
    ]
    assert table.to_pylist()[1] == {
        "id": "b",
        "n": None,
        "label": 1,
        "scores": [[0.5, 0.5]],
        "text": b"\xff",
        "model": "m:1",
    }


def test_parquet_without_a_row_can_be_read() -> None:
    """An empty result is a Parquet file, too."""
    assert parquet().num_rows == 0


def test_later_parquet_values_become_the_first_ones_type() -> None:
    """Numbers become text where the first rows held text, and null stays null."""
    table = parquet(results([{"id": "a"}], {"id": "id"}), results([{"id": 5}, {}], {"id": "id"}))
    assert table.column("id").to_pylist() == ["a", "5", None]


@pytest.mark.parametrize("later", [[{"id": "text"}], [{"id": 2}, {"id": [1]}]])
def test_parquet_values_of_several_types_are_an_error(later: list[dict[str, Any]]) -> None:
    """The message says what to do."""
    with pytest.raises(ConfigurationError, match=r"results of several types: .*; write JSON Lines"):
        parquet(results([{"id": 1}], {"id": "id"}), results(later, {"id": "id"}))


def text_columns(text: str) -> Columns:
    return {"text": pyarrow.array([text])}


def sink(target: Target) -> ColumnSink:
    return ColumnSink(target, text_columns, "results")


def write(values: list[str], target: Target, workers: int = 1) -> None:
    options = PipelineOptions(["--direct_running_mode=multi_threading", f"--direct_num_workers={workers}"])
    with TestPipeline("FnApiRunner", options=options) as pipeline:
        _ = pipeline | beam.Create(values) | beam.Reshuffle() | beam.io.Write(sink(target))


def texts_of(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        return [] if table.num_columns == 0 else list(table.column("text").to_pylist())
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line)["text"] for line in text.splitlines()]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_one_file_holds_every_row_once(tmp_path: Path, name: str, workers: int) -> None:
    """However many workers wrote it; nothing else is left in the folder."""
    values = [f"line {number}" for number in range(500)]
    write(values, Target(str(tmp_path / name)), workers)
    assert sorted(texts_of(tmp_path / name)) == sorted(values)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_shards_are_numbered_and_those_of_earlier_runs_go(tmp_path: Path) -> None:
    """A reader of the pattern gets this run's values only; other files stay."""
    for name in ("out-00003-of-00007.jsonl", "out-00000-of-00001.jsonl", "out-old.jsonl"):
        (tmp_path / name).write_text("earlier\n")
    values = [f"line {number}" for number in range(500)]
    write(values, Target(str(tmp_path / "out-*.jsonl")), workers=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names.pop() == "out-old.jsonl"
    assert names == [f"out-{index:05d}-of-{len(names):05d}.jsonl" for index in range(len(names))]
    assert sorted(text for name in names for text in texts_of(tmp_path / name)) == sorted(values)


@pytest.mark.parametrize("name", ["out.jsonl", "out-*.jsonl"])
def test_nothing_to_write_gives_an_empty_file(tmp_path: Path, name: str) -> None:
    """A file that is there says that the job has ended."""
    write([], Target(str(tmp_path / name)))
    (path,) = tmp_path.iterdir()
    assert path.name == name.replace("*", "00000-of-00001")
    assert path.read_bytes() == b""


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet", "out-*.jsonl", "out-*.parquet"])
def test_rows_join_those_of_earlier_runs(tmp_path: Path, name: str) -> None:
    """Though the last step is repeated, a row is there once."""
    target = Target(str(tmp_path / name))
    write(["a", "b"], target)
    for number in range(2):
        used = ColumnSink(Target(str(tmp_path / name)), text_columns, "results", joins=True)
        folder = used.initialize_write()
        writer = used.open_writer(folder, "one")
        writer.write(f"joins {number}")
        shard = writer.close()
        used.pre_finalize(folder, [shard])
        list(used.finalize_write(folder, [shard], None))
        list(used.finalize_write(folder, [shard], None))
    texts = [text for path in sorted(tmp_path.iterdir()) for text in texts_of(path)]
    assert texts == ["a", "b", "joins 0", "joins 1"]


def test_earlier_shards_stay_until_rows_have_joined_them(tmp_path: Path) -> None:
    """Whatever happens while they are put in place, no row is only in a folder that will be deleted."""
    write(["a"], Target(str(tmp_path / "out-*.jsonl")))
    used = ColumnSink(Target(str(tmp_path / "out-*.jsonl")), text_columns, "results", joins=True)
    folder = used.initialize_write()
    used.pre_finalize(folder, [f"{folder}/one.jsonl"])
    assert texts_of(tmp_path / "out-00000-of-00001.jsonl") == ["a"]


def test_parquet_rows_take_the_types_of_those_that_they_join(tmp_path: Path) -> None:
    """Text of a failure becomes the date that it was; what cannot become one is an error."""
    path = tmp_path / "out.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"day": [datetime.date(2024, 2, 29)]}), path)

    def join(day: str) -> None:
        used = ColumnSink(Target(str(path)), lambda day: {"day": [day]}, "results", joins=True)
        folder = used.initialize_write()
        writer = used.open_writer(folder, "one")
        writer.write(day)
        list(used.finalize_write(folder, [writer.close()], None))

    join("2024-03-01")
    assert pyarrow.parquet.read_table(path).to_pydict() == {
        "day": [datetime.date(2024, 2, 29), datetime.date(2024, 3, 1)]
    }
    with pytest.raises(ConfigurationError, match="several types"):
        join("tomorrow")


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_file_of_the_same_size_is_replaced(tmp_path: Path, name: str) -> None:
    """Beam takes files of equal sizes for equal."""
    for value in ("a", "b"):
        write([value], Target(str(tmp_path / name)))
    assert texts_of(tmp_path / name) == ["b"]


@pytest.mark.parametrize("name", ["out.jsonl", "out-*.jsonl"])
def test_putting_in_place_may_be_repeated(tmp_path: Path, name: str) -> None:
    """A runner that repeats the last step, after it has done it, loses and doubles nothing."""
    used = sink(Target(str(tmp_path / name)))
    folder = used.initialize_write()
    shards = []
    for number in range(3):
        writer = used.open_writer(folder, str(number))
        writer.write(f"{number}")
        shards.append(writer.close())
    (Path(folder) / "uncommitted.jsonl").write_text("of a bundle that failed\n")
    first = list(used.finalize_write(folder, shards, None))
    contents = {path: Path(path).read_text() for path in first}
    list(used.finalize_write(folder, shards, None))
    assert {path: Path(path).read_text() for path in first} == contents
    assert sorted(text for path in first for text in texts_of(Path(path))) == ["0", "1", "2"]
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(first)


def test_a_lost_shard_is_an_error(tmp_path: Path) -> None:
    """Results are never put together with a part missing."""
    for name in ("out-*.jsonl", "out.jsonl"):
        used = sink(Target(str(tmp_path / name)))
        folder = used.initialize_write()
        with pytest.raises(BeamIOError, match="do not exist"):
            list(used.finalize_write(folder, [f"{folder}/a.jsonl", f"{folder}/b.jsonl"], None))


def test_a_failed_job_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    """The earlier result stays, and what was begun is in a folder that the command deletes."""
    path = tmp_path / "out.jsonl"
    path.write_text("earlier\n")
    target = Target(str(path))

    def fail(value: int) -> str:
        if value == 50:
            raise RuntimeError("in the midst")
        return str(value)

    with pytest.raises(RuntimeError, match="in the midst"), TestPipeline("FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(range(100)) | beam.Map(fail) | beam.io.Write(sink(target))
    assert path.read_text() == "earlier\n"
    FileSystems.delete([target.temporary_folder])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out.txt", "does not tell the format"),
        ("out.csv", "does not tell the format"),
        ("out", "does not tell the format"),
        ("out/", "does not tell the format"),
        ("*/out.jsonl", "in the file's name"),
        ("a*b*.jsonl", "one \\* at most"),
        ("out.parquet.gz", "does not tell the format"),
    ],
)
def test_targets_that_cannot_be_are_refused(path: str, message: str) -> None:
    """Each message holds the path."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Target(path)
    assert repr(path) in caught.value.message


def test_temporary_files_lie_beside_the_target() -> None:
    """So that a rename is one."""
    target = Target("gs://bucket/out/results-*.jsonl.gz")
    assert target.format == "jsonl"
    assert target.temporary_folder.startswith("gs://bucket/out/.results-.jsonl.gz-")
