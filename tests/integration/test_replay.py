"""Rows that failed, scored again on a real Triton once the cause is mended."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from beam_triton.cli.main import main
from beam_triton.testing import LocalTriton

# Takes what `rejecting` refuses.
FORGIVING = "short_of_memory"


def run(command: str, *arguments: object) -> int:
    return main([command, *map(str, arguments), "--progress_seconds=0"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(triton: LocalTriton, model: str, output: Path, *more: object) -> tuple[object, ...]:
    return ("--endpoint", triton.endpoint, "--model", model, "--output", output, *more)


def write_rows(path: Path, numbers: list[float]) -> None:
    """Rows ``id`` and ``x``, of which `rejecting` refuses those below zero."""
    rows = [{"id": index, "x": [number]} for index, number in enumerate(numbers)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "x"])
            writer.writerows([row["id"], row["x"]] for row in rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("output", ["out.jsonl", "out-*.jsonl", "out.parquet", "out-*.parquet"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_results_join_the_first_runs(triton: LocalTriton, tmp_path: Path, kind: str, output: str) -> None:
    """Of each format, into each: every row has one result, with its own file and number."""
    path, target = tmp_path / f"rows.{kind}", tmp_path / "out" / output
    write_rows(path, [-number if number % 10 == 3 else number for number in range(200)])
    same = ("--keep", "id", "--with_origin")
    assert run("score", "--files", path, *options(triton, "rejecting", target, *same)) == 0
    (failures,) = (tmp_path / "out").glob("out-failures*.jsonl")
    assert len(lines(failures)) == 20
    path.unlink()  # The failures have all that is needed.
    again = tmp_path / "out" / failures.name.replace("00000-of-00001", "*")
    assert run("replay", again, *options(triton, FORGIVING, target, *same)) == 0
    if target.suffix == ".parquet":
        rows = [
            row
            for file in target.parent.glob("out*.parquet")
            for row in pyarrow.parquet.read_table(file).to_pylist()
        ]
    else:
        rows = [
            row
            for file in target.parent.glob("out*.jsonl")
            if "failures" not in file.name
            for row in lines(file)
        ]
    assert sorted(int(row["id"]) for row in rows) == list(range(200))
    assert all(row["row"] == int(row["id"]) + 1 and row["file"] == str(path) for row in rows)
    assert {row["model"] for row in rows if int(row["id"]) % 10 == 3} == {f"{FORGIVING}:1"}
    assert lines(failures) == []


def test_what_fails_again_stays_a_failure(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its new reason, as often as it is replayed; lines that were no rows stay as they were."""
    path, output, failures = tmp_path / "a.jsonl", tmp_path / "out.jsonl", tmp_path / "out-failures.jsonl"
    write_rows(path, [1, -2, 3, -4])
    with path.open("a") as file:
        file.write('{"id": 5\n')
    assert run("score", "--files", path, *options(triton, "rejecting", output)) == 0
    first = capsys.readouterr().out
    assert f"in {failures}; python -m beam_triton replay scores them again" in first
    before = lines(failures)
    assert run("replay", failures, *options(triton, "rejecting", output)) == 1
    assert "none of 3 rows has a result" in capsys.readouterr().err
    assert [{**row, "message": ""} for row in lines(failures)] == [{**row, "message": ""} for row in before]
    assert run("replay", failures, *options(triton, FORGIVING, output)) == 0
    assert len(lines(output)) == 4
    (left,) = lines(failures)
    assert (left["row"], left["data"]) == (5, '{"id": 5')


def test_numbers_and_bytes_that_json_lacks_come_back(triton: LocalTriton, tmp_path: Path) -> None:
    """NaN is a number again, binary columns are bytes, and a date is of its column's type."""
    path, output = tmp_path / "a.parquet", tmp_path / "out.parquet"
    table = pyarrow.table(
        {
            "x": pyarrow.array([[1.0], [math.nan], [-math.inf]], pyarrow.list_(pyarrow.float32())),
            "raw": [b"\xff\x00", b"text", b"\xfe"],
            "day": [datetime.date(2024, 2, 29)] * 3,
        }
    )
    pyarrow.parquet.write_table(table, path)
    same = ("--keep", "raw,day", "--with_origin")
    failures = tmp_path / "out-failures.jsonl"
    assert run("score", "--files", path, *options(triton, "rejecting", output, *same)) == 0
    assert len(lines(failures)) == 1
    assert run("replay", failures, *options(triton, FORGIVING, output, *same)) == 0
    rows = sorted(pyarrow.parquet.read_table(output).to_pylist(), key=lambda row: row["row"])
    assert [row["raw"] for row in rows] == [b"\xff\x00", b"text", b"\xfe"]
    assert {row["day"] for row in rows} == {datetime.date(2024, 2, 29)}
    assert rows[2]["y"] == -math.inf


def test_a_mended_file_is_read_from_where_it_was_damaged(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compressed file that ended too early; one that is still damaged fails again."""
    path, output = tmp_path / "a.jsonl.gz", tmp_path / "out.jsonl"
    whole = gzip.compress(
        "".join(json.dumps({"x": [i], "id": f"{i:0200}"}) + "\n" for i in range(20_000)).encode()
    )
    path.write_bytes(whole[: len(whole) // 2])
    same = ("--keep", "id")
    failures = tmp_path / "out-failures.jsonl"
    assert run("score", "--files", path, *options(triton, "rejecting", output, *same)) == 0
    (damaged,) = lines(failures)
    assert damaged["error"] == "CorruptFileError"
    before = len(lines(output))
    assert run("replay", failures, *options(triton, "rejecting", output, *same)) == 2
    assert "a.jsonl.gz: Truncated compressed stream" in capsys.readouterr().err
    assert len(lines(output)) == before
    assert lines(failures) == [damaged]
    path.write_bytes(whole)
    assert run("replay", failures, *options(triton, "rejecting", output, *same)) == 0
    assert sorted(int(row["id"]) for row in lines(output)) == list(range(20_000))


def test_whole_files_are_read_again(triton: LocalTriton, tmp_path: Path) -> None:
    """A file that is a row is not in its failure; one that is gone stays a failure."""
    for name in ("good", "bad"):
        (tmp_path / f"{name}.bin").write_bytes(name.encode())
    same = ("--input_format", "bytes", "--input", "text=content", "--keep", "file")
    output, failures = tmp_path / "out.jsonl", tmp_path / "failures.jsonl"
    failed = {"file": str(tmp_path / "bad.bin"), "row": None, "error": "E", "message": "m", "data": None}
    gone = {**failed, "file": str(tmp_path / "gone.bin")}
    failures.write_text("".join(json.dumps(each) + "\n" for each in (failed, gone)))
    assert run("score", "--files", tmp_path / "good.bin", *options(triton, "shout", output, *same)) == 0
    assert run("replay", failures, *options(triton, "shout", output, *same)) == 0
    assert [(Path(row["file"]).name, row["loud"]) for row in lines(output)] == [
        ("good.bin", "GOOD"),
        ("bad.bin", "BAD"),
    ]
    assert lines(failures) == [gone]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ('{"id": 1, "x": [1]}\n', (), "does not hold failures of score: a line has id, x where file, row"),
        (None, ("--keep", "id"), "have model beside the model"),
        (None, ("--with_origin",), "--keep and --with_origin must be alike"),
    ],
)
def test_wrong_use_changes_nothing(
    triton: LocalTriton,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    more: tuple[object, ...],
    message: str,
) -> None:
    """Files that are no failures, and results that would have other fields."""
    path, output, failures = tmp_path / "a.jsonl", tmp_path / "out.jsonl", tmp_path / "out-failures.jsonl"
    write_rows(path, [1, -2])
    assert run("score", "--files", path, *options(triton, "rejecting", output)) == 0
    if content is not None:
        failures.write_text(content)
    before = (output.read_text(), failures.read_text())
    assert run("replay", failures, *options(triton, FORGIVING, output, *more)) == 2
    assert message in capsys.readouterr().err
    assert (output.read_text(), failures.read_text()) == before


def test_several_failures_files_need_one_for_what_fails_again(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [1, -2])
        target = options(triton, "rejecting", tmp_path / f"{name}-out.jsonl")
        assert run("score", "--files", tmp_path / f"{name}.jsonl", *target) == 0
    files = [tmp_path / "a-out-failures.jsonl", tmp_path / "b-out-failures.jsonl"]
    output = tmp_path / "again.jsonl"
    assert run("replay", *files, *options(triton, FORGIVING, output)) == 2
    assert "--failures is needed" in capsys.readouterr().err
    assert run("replay", *files, *options(triton, FORGIVING, output, "--failures", tmp_path / "f.jsonl")) == 0
    assert [row["y"] for row in lines(output)] == [-2.0, -2.0]
