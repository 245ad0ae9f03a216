"""Files are written atomically, each value once, whatever fails and is repeated on the way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import IO, Any

import apache_beam as beam
import pyarrow.parquet
import pytest
from apache_beam.io.filesystem import BeamIOError
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.score.encoders import JsonLinesWriter, ParquetWriter, join_parquet, result_types
from beam_triton.score.targets import Target
from beam_triton.score.writing import WriteFiles, _put_in_place, discard_temporary_files


class LineSink:
    """Writes strings as lines."""

    def setup(self) -> None:
        pass

    def open(self, stream: IO[bytes]) -> JsonLinesWriter:
        return JsonLinesWriter(stream)


def write(values: list[str], target: Target, workers: int = 1) -> None:
    options = PipelineOptions(["--direct_running_mode=multi_threading", f"--direct_num_workers={workers}"])
    with TestPipeline("FnApiRunner", options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create(values)
            | beam.Reshuffle()
            | WriteFiles(target, LineSink(), counter="values_written")
        )


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_one_file_holds_every_value_once(tmp_path: Path, name: str, workers: int) -> None:
    """However many workers wrote it; nothing else is left in the folder."""
    values = [f"line {number}" for number in range(500)]
    write(values, Target(path=str(tmp_path / name)), workers)
    data = (tmp_path / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    assert sorted(text.splitlines()) == sorted(values)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_shards_are_numbered_and_those_of_earlier_runs_go(tmp_path: Path) -> None:
    """A reader of the pattern gets this run's values only; other files stay."""
    for name in ("out-00003-of-00007.jsonl", "out-00000-of-00001.jsonl", "out-old.jsonl"):
        (tmp_path / name).write_text("earlier\n")
    values = [f"line {number}" for number in range(500)]
    write(values, Target(path=str(tmp_path / "out-*.jsonl")), workers=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names.pop() == "out-old.jsonl"
    assert names == [f"out-{index:05d}-of-{len(names):05d}.jsonl" for index in range(len(names))]
    found = [line for name in names for line in (tmp_path / name).read_text().splitlines()]
    assert sorted(found) == sorted(values)


@pytest.mark.parametrize("name", ["out.jsonl", "out-*.jsonl"])
def test_nothing_to_write_gives_an_empty_file(tmp_path: Path, name: str) -> None:
    """A file that is there says that the job has ended."""
    write([], Target(path=str(tmp_path / name)))
    (path,) = tmp_path.iterdir()
    assert path.name == name.replace("*", "00000-of-00001")
    assert path.read_bytes() == b""


@pytest.mark.parametrize("name", ["out.jsonl", "out-*.jsonl"])
def test_putting_in_place_may_be_repeated(tmp_path: Path, name: str) -> None:
    """A runner that repeats the last step, after it has done all or a part, loses and doubles nothing."""
    target = Target(path=str(tmp_path / name))
    Path(target.temporary_folder).mkdir()
    shards = []
    for number in range(3):
        shards.append(target.temporary_path())
        Path(shards[-1]).write_text(f"{number}\n")
    uncommitted = Path(target.temporary_path())
    uncommitted.write_text("of a bundle that failed\n")
    first = list(_put_in_place(target, LineSink(), shards))
    contents = {path: Path(path).read_text() for path in first}
    assert list(_put_in_place(target, LineSink(), shards)) == first
    assert {path: Path(path).read_text() for path in first} == contents
    assert sorted("".join(contents.values()).split()) == ["0", "1", "2"]
    assert not Path(target.temporary_folder).exists()


def test_a_lost_shard_is_an_error(tmp_path: Path) -> None:
    """Results are never put together with a part missing."""
    target = Target(path=str(tmp_path / "out-*.jsonl"))
    with pytest.raises(BeamIOError, match="neither"):
        list(_put_in_place(target, LineSink(), [target.temporary_path()]))


def test_a_failed_job_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    """The earlier result stays, and what was begun can be discarded."""
    path = tmp_path / "out.jsonl"
    path.write_text("earlier\n")
    target = Target(path=str(path))

    def fail(value: int) -> str:
        if value == 50:
            raise RuntimeError("in the midst")
        return str(value)

    with pytest.raises(RuntimeError, match="in the midst"), TestPipeline("FnApiRunner") as pipeline:
        _ = (
            pipeline
            | beam.Create(range(100))
            | beam.Map(fail)
            | WriteFiles(target, LineSink(), counter="values_written")
        )
    assert path.read_text() == "earlier\n"
    discard_temporary_files(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "out.txt"}, "does not tell the format"),
        ({"path": "out"}, "does not tell the format"),
        ({"path": "out/"}, "must be a file"),
        ({"path": "*/out.jsonl"}, "must be a file"),
        ({"path": "a*b*.jsonl"}, "must be a file"),
        ({"path": "out.jsonl", "format": "csv"}, "'csv' is none of"),
        ({"path": "out.parquet.gz"}, "compresses by itself"),
    ],
)
def test_targets_that_cannot_be_are_refused(options: dict[str, str], message: str) -> None:
    """Each message holds the path or the value."""
    with pytest.raises(ConfigurationError, match=message):
        Target(**options)


def test_temporary_files_have_the_targets_suffix_and_folder() -> None:
    """Beside the target, so that a rename is one, and compressed as it is."""
    target = Target(path="gs://bucket/out/results-*.jsonl.gz")
    assert target.format == "jsonl"
    assert target.temporary_path().startswith("gs://bucket/out/.")
    assert target.temporary_path().endswith(".jsonl.gz")
    assert target.final_path(1, 12) == "gs://bucket/out/results-00001-of-00012.jsonl.gz"


MODEL = ModelSpec(
    "m",
    "1",
    (),
    (
        TensorSpec("label", "INT64", (1,)),
        TensorSpec("scores", "FP32", (-1, 2)),
        TensorSpec("text", "BYTES", (1,)),
        TensorSpec("unasked", "BOOL", ()),
    ),
    8,
)


def parquet_file(path: Path, records: list[dict[str, Any]], with_origin: bool = False) -> Any:
    with path.open("wb") as stream:
        types = result_types(MODEL, ["label", "scores", "text"], with_origin=with_origin)
        writer = ParquetWriter(stream, types)
        for record in records:
            writer.write(record)
        writer.finish()
    return pyarrow.parquet.read_table(path)


def record(**kept: Any) -> dict[str, Any]:
    return {**kept, "label": 1, "scores": [[0.5, 1.0]], "text": b"\xff", "model": "m:1"}


def test_parquet_columns_have_the_models_types(tmp_path: Path) -> None:
    """One value is a value, an array a list of its rank, and BYTES are binary."""
    table = parquet_file(tmp_path / "a.parquet", [record(id="a", n=1), record(id="b", n=None)])
    assert [(field.name, str(field.type).replace("item", "element")) for field in table.schema] == [
        ("id", "string"),
        ("n", "int64"),
        ("label", "int64"),
        ("scores", "list<element: list<element: float>>"),
        ("text", "binary"),
        ("model", "string"),
    ]
    assert table.to_pylist()[1] == record(id="b", n=None)


def test_parquet_without_a_row_has_its_columns_all_the_same(tmp_path: Path) -> None:
    """An empty result can be read like any other."""
    table = parquet_file(tmp_path / "a.parquet", [], with_origin=True)
    assert table.num_rows == 0
    assert table.schema.names == ["file", "row", "label", "scores", "text", "model"]


def test_kept_values_of_several_kinds_become_text(tmp_path: Path) -> None:
    """Objects of JSON Lines may hold anything under a key: it is kept as JSON."""
    table = parquet_file(tmp_path / "a.parquet", [record(id="a"), record(id=[1]), record(id=None)])
    assert table.column("id").to_pylist() == ["a", "[1]", None]


def test_a_later_kind_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """The first rows decide on the type of a kept column."""
    records = [record(id=number) for number in range(1 << 14)]
    with pytest.raises(ConfigurationError, match="column 'id' of the result is int64"):
        parquet_file(tmp_path / "a.parquet", [*records, record(id="text")])


def test_parquet_shards_become_one_file(tmp_path: Path) -> None:
    """Rows are copied; a column that was empty in one shard takes the other's type where it can."""
    for name, value in (("a", "x"), ("b", None)):
        parquet_file(tmp_path / name, [record(id=value)] * 3)
    a, b, joined = (tmp_path / name for name in ("a", "b", "joined"))
    with joined.open("wb") as target, a.open("rb") as first, b.open("rb") as second:
        join_parquet([first, second], target)
    assert pyarrow.parquet.read_table(joined).column("id").to_pylist() == ["x"] * 3 + [None] * 3


def test_text_that_is_no_unicode_is_written_escaped(tmp_path: Path) -> None:
    """A lone surrogate may stand in a JSON escape; it must not end the job."""
    with (tmp_path / "a").open("wb") as stream:
        writer = JsonLinesWriter(stream)
        writer.write('{"a": "\ud800"}')
        writer.finish()
    assert json.loads((tmp_path / "a").read_text()) == {"a": "\ud800"}
