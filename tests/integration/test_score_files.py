"""Files scored from the command line, on a real Triton: what is written, and what is said."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow
import pyarrow.parquet
import pytest
from apache_beam.portability.api import beam_runner_api_pb2

from beam_triton.score.job_options import ScoreJob, parse_options
from beam_triton.score.score_command import build
from beam_triton.testing import LocalTriton
from pipelines import demo, score_files
from pipelines.score_files import MODEL_REPOSITORY

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "pipelines" / "data" / "digits.csv"


@pytest.fixture(scope="module")
def digits() -> Iterator[str]:
    """The endpoint of a server with the shipped models."""
    with LocalTriton(MODEL_REPOSITORY, stop_timeout_seconds=0.1) as server:
        yield server.endpoint


def score(*arguments: object) -> int:
    return score_files.main([*map(str, arguments), "--progress_seconds=0"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(folder: Path, kind: str, count: int) -> Path:
    """A file of rows ``id``, and ``x`` in four columns (as a list in JSON Lines)."""
    path = folder / f"rows.{kind}"
    numbers = [[float(number), number / 2, -float(number), 0.25] for number in range(count)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "x": x}) + "\n" for i, x in enumerate(numbers)))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "x0", "x1", "x2", "x3"])
            writer.writerows([i, *x] for i, x in enumerate(numbers))
    else:
        columns = {f"x{column}": [x[column] for x in numbers] for column in range(4)}
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(count)), **columns}), path)
    return path


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading", "multi_processing"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_row_has_its_own_result_once(
    triton: LocalTriton, tmp_path: Path, kind: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From each format, in each mode of Beam's local runner."""
    path = write_rows(tmp_path, kind, 3000)
    output = tmp_path / "out" / "results.jsonl"
    code = score(
        *("--files", path, "--endpoint", triton.endpoint, "--model", "double", "--output", output),
        *("--input", "x=x" if kind == "jsonl" else "x=x0:x3", "--keep", "id", "--with_origin"),
        *("--piece_bytes", 20_000, f"--direct_running_mode={mode}", "--direct_num_workers=2"),
    )
    assert code == 0
    results = sorted(lines(output), key=lambda result: result["row"])
    assert [result["row"] for result in results] == list(range(1, 3001))
    for number, result in enumerate(results):
        assert int(result["id"]) == number
        assert result["y"] == [2.0 * number, number, -2.0 * number, 0.5]
        assert (result["file"], result["model"]) == (str(path), "double:1")
    assert lines(tmp_path / "out" / "results-failures.jsonl") == []
    assert len(list((tmp_path / "out").iterdir())) == 2
    table = capsys.readouterr().out
    assert "elements           3,000" in table
    assert "results            3,000" in table


def test_parquet_shards_hold_every_result(triton: LocalTriton, tmp_path: Path) -> None:
    """Shards by a star in the name, read back by the same pattern; types are the model's and the source's."""
    path = write_rows(tmp_path, "parquet", 500)
    code = score(
        *("--files", path, "--endpoint", triton.endpoint, "--model", "double", "--input", "x=x0:x3"),
        *("--keep", "number=id", "--output", tmp_path / "results-*.parquet", "--piece_bytes", 1000),
    )
    assert code == 0
    files = list(tmp_path.glob("results-?????-of-?????.parquet"))
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    assert sorted(row["number"] for row in rows) == list(range(500))
    assert all(row["y"][0] == 2.0 * row["number"] for row in rows)


def test_text_and_several_inputs(triton: LocalTriton, tmp_path: Path) -> None:
    """A string column feeds BYTES; columns of the inputs' names need no mapping."""
    path = tmp_path / "a.csv"
    path.write_text('text\n"say ""hi"",\nplease"\ncaf\u00e9\n')
    output = tmp_path / "out.jsonl"
    code = score("--files", path, "--endpoint", triton.endpoint, "--model", "shout", "--output", output)
    assert code == 0
    assert [result["loud"] for result in lines(output)] == ['SAY "HI",\nPLEASE', "CAF\u00e9"]

    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"a": list(range(16)), "b": [1] * 16}) + "\n")
    arguments = ("--files", path, "--endpoint", triton.endpoint, "--model", "sum_and_difference")
    assert score(*arguments, "--outputs", "sum", "--output", output) == 0
    (result,) = lines(output)
    assert result == {"sum": list(range(1, 17)), "model": "sum_and_difference:1"}


@pytest.mark.parametrize("model", ["ragged", "unbatched"])
def test_rows_of_several_shapes(triton: LocalTriton, tmp_path: Path, model: str) -> None:
    """Lists of unequal lengths, whose outputs differ in length, and a model that takes one row a request."""
    path, output = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    lengths = [1, 3, 1, 2, 3, 1]
    name = "values" if model == "ragged" else "x"
    rows = [[float(length)] * length for length in lengths]
    values = rows if model == "ragged" else [[[each] * 4 for each in row] for row in rows]
    path.write_text("".join(json.dumps({"id": i, name: each}) + "\n" for i, each in enumerate(values)))
    arguments = ("--files", path, "--endpoint", triton.endpoint, "--model", model, "--output", output)
    assert score(*arguments, "--keep", "id") == 0
    found = sorted(lines(output), key=lambda result: result["id"])
    assert [result["id"] for result in found] == list(range(6))
    if model == "ragged":
        assert [result["doubled"] for result in found] == [[2 * each for each in row] for row in rows]
        assert [result["total"] for result in found] == [sum(row) for row in rows]
    else:
        assert [result["y"] for result in found] == [[[each + 1] * 4 for each in row] for row in rows]


def test_broken_and_refused_rows_become_failures(triton: LocalTriton, tmp_path: Path) -> None:
    """Broken lines, misfits and what the model refuses are failures with file, row and data."""
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"id": number, "x": [number]}) for number in range(600)]
    rows[10] = '{"id": 10, "x": [-1]}'
    rows[20] = '{"id": 20, "x": ["no"]}'
    rows[30] = '{"id": 30'
    rows[40] = '{"id": 40}'
    rows[550] = '{"id": 550, "x": [-7]}'
    path.write_text("\n".join(rows))
    output = tmp_path / "out.jsonl"
    code = score(
        *("--files", path, "--endpoint", triton.endpoint, "--model", "rejecting", "--keep", "id"),
        *("--output", output, "--failures", tmp_path / "failed.jsonl", "--max_failures", 5),
    )
    assert code == 0
    assert sorted(result["id"] for result in lines(output)) == [
        number for number in range(600) if number not in (10, 20, 30, 40, 550)
    ]
    failures = {failure["row"]: failure for failure in lines(tmp_path / "failed.jsonl")}
    assert {row: failure["error"] for row, failure in failures.items()} == {
        11: "InvalidRequestError",
        21: "RowError",
        31: "RowError",
        41: "RowError",
        551: "InvalidRequestError",
    }
    assert failures[11]["data"] == {"id": 10, "x": [-1]}
    assert failures[31]["data"] == '{"id": 30'
    assert all(failure["file"] == str(path) for failure in failures.values())


def test_damaged_files_become_failures(triton: LocalTriton, tmp_path: Path) -> None:
    """Damaged, without the column or without its first row's: the job goes on, though they come first."""
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    (tmp_path / "b.csv").write_text("y\n1\n")
    (tmp_path / "c [1].jsonl").write_text('{"id": 1}\n{"x": [2]}\n')
    output = tmp_path / "out.jsonl"
    code = score(
        *("--files", tmp_path / "*.parquet", tmp_path / "b.csv", tmp_path / "c [1].jsonl"),
        *("--endpoint", triton.endpoint, "--model", "rejecting", "--output", output, "--with_origin"),
    )
    assert code == 0
    assert [(Path(result["file"]).name, result["row"]) for result in lines(output)] == [("c [1].jsonl", 2)]
    failures = [
        (Path(failure["file"]).name, failure["row"]) for failure in lines(tmp_path / "out-failures.jsonl")
    ]
    assert sorted(failures) == [("a.parquet", None), ("b.csv", 1), ("c [1].jsonl", 1)]


def test_more_failures_than_allowed_end_the_job(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1, the message names a failure, and an earlier result stays as it was."""
    path = tmp_path / "a.csv"
    path.write_text("x\n1\nno\n2\n")
    output = tmp_path / "out.jsonl"
    output.write_text("earlier\n")
    arguments = ("--files", path, "--endpoint", triton.endpoint, "--model", "rejecting", "--output", output)
    assert score(*arguments, "--max_failures", 0) == 1
    message = capsys.readouterr().err
    assert "more than 0 row(s) failed" in message
    assert "row 2: RowError: column 'x' holds 'no'" in message
    assert output.read_text() == "earlier\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.csv", "out.jsonl"]
    assert score(*arguments, "--max_failures", 1) == 0


@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_job_without_a_result_fails(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    """Rows of which none could be scored: the exit code is 1, and the message says why, or where to look."""
    path = tmp_path / "a.csv"
    path.write_text("x\n-1\n-2\n")
    failures = tmp_path / "failed.jsonl"
    arguments = ("--files", path, "--endpoint", triton.endpoint, "--model", "rejecting")
    code = score(
        *(*arguments, "--output", tmp_path / "out.jsonl", "--failures", failures),
        *(f"--direct_running_mode={mode}", "--direct_num_workers=2"),
    )
    message = capsys.readouterr().err
    assert code == 1
    assert "none of 2 rows has a result: " in message and f"see {failures}" in message
    assert (f"{path}, row 1: InvalidRequestError" in message) is (mode == "in_memory")
    assert len(lines(failures)) == 2
    path.write_text("x\n")
    assert score(*arguments, "--output", tmp_path / "none.jsonl") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files", "missing.csv"], "there is no file missing.csv"),
        (["--files", "a.txt"], "a.txt: the suffix does not tell the format"),
        (["--files", "empty.csv"], "empty.csv is empty"),
        (["--input", "image=x0:x3"], "no input 'image'; inputs: x FP32 [4]; outputs: y FP32 [4]"),
        (["--input", "x=x0:x2"], "input x FP32 [4] does not take 3 values"),
        (["--input", "x=x0:x9"], "there is no column 'x4'"),
        ([], "there is no column 'x' for the inputs of model 'double' (x FP32 [4]); the file has id, x0, x1"),
        (["--input", "x=x0:x3", "--keep", "name"], "there is no column 'name'; the file has id, x0"),
        (["--input", "x=x0:x3", "--keep", "y=id"], "has the name of an output"),
        (["--input", "x=x0:x3", "--outputs", "z"], "no output 'z'"),
        (["--model", "nothing"], "'nothing' is not found; the server has: "),
        (["--model", "countdown"], "is decoupled"),
        (["--endpoint", "http://127.0.0.1:1"], "cannot connect to http://127.0.0.1:1"),
        (["--endpoint", "triton"], "'triton' is not an http or https URL"),
        (["--runner", "NoSuchRunner"], "NoSuchRunner"),
        (["--failures", "./out.jsonl"], "--output out.jsonl and --failures ./out.jsonl are the same file"),
        (["--failures", "rows.csv"], "--failures rows.csv would overwrite rows.csv, which --files reads"),
    ],
)
def test_wrong_use_exits_with_2_and_one_line(
    triton: LocalTriton,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Exit code 2, before anything is read or written, and a message that says what to change."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, "csv", 3)
    (tmp_path / "a.txt").write_text("x\n1\n")
    (tmp_path / "empty.csv").write_text("")
    options = {"--files": "rows.csv", "--endpoint": triton.endpoint, "--model": "double"}
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        options[name] = value
    assert score("--output", "out.jsonl", *(part for pair in options.items() for part in pair)) == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.startswith("score_files: ")
    assert written.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_server_is_started_where_there_is_no_endpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped models are served for as long as the job takes; the only model needs no name."""
    output = tmp_path / "out.jsonl"
    assert score("--files", DIGITS, "--where", "split=train", "--keep", "id", "--output", output) == 0
    assert len(lines(output)) == 899
    assert "starting a Triton server on this machine" in capsys.readouterr().err


def test_remote_workers_need_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On Dataflow an endpoint is needed, and the message says so."""
    arguments = ["--files", str(DIGITS), "--output", str(tmp_path / "out.jsonl"), "--runner=FlinkRunner"]
    assert score_files.main(arguments) == 2
    assert "--endpoint is needed" in capsys.readouterr().err


def test_a_password_in_an_endpoint_is_refused_for_remote_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options of a job that runs elsewhere are shown there; the message does not show it either."""
    arguments = ["--files", str(DIGITS), "--output", str(tmp_path / "out.jsonl"), "--runner=FlinkRunner"]
    assert score_files.main([*arguments, "--endpoint=http://me:hunter2@triton:8000", "--model=digits"]) == 2
    message = capsys.readouterr().err
    assert "--auth_token env:NAME" in message
    assert "hunter2" not in message


def test_the_file_runs_from_any_folder(digits: str, tmp_path: Path) -> None:
    """As engines and users start it: by its path, in some other folder."""
    command = [
        *(sys.executable, str(REPOSITORY / "pipelines" / "score_files.py"), "--endpoint", digits),
        *("--files", str(DIGITS), "--model", "digits", "--output", "results.jsonl", "--outputs", "label"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "results.jsonl")) == 1797
    assert "1,797" in done.stdout


def test_the_command_is_part_of_the_package(digits: str, tmp_path: Path) -> None:
    """``python -m beam_triton score``, without the folder of pipelines."""
    command = [
        *(sys.executable, "-m", "beam_triton", "score", "--endpoint", digits, "--files", str(DIGITS)),
        *(
            "--model",
            "digits",
            "--keep",
            "id,expected=digit",
            "--output",
            "results.jsonl",
            "--where=split=test",
        ),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    results = lines(tmp_path / "results.jsonl")
    assert len(results) == 898
    assert sum(int(row["expected"]) == row["label"] for row in results) / 898 >= 0.95
    assert len(results[0]["probabilities"]) == 10
    failed = subprocess.run(
        [sys.executable, "-m", "beam_triton", "score"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert failed.stderr.startswith("python -m beam_triton score: --files is needed")


def test_workers_load_the_graph_without_the_pipelines_folder(tmp_path: Path) -> None:
    """Every step of the graph is loaded where ``pipelines`` cannot be imported, as on a worker."""
    options = parse_options(["--files", "a.csv", "--output", "r.jsonl", "--max_failures", "3"])
    pipeline = beam.Pipeline(options=options)
    job = ScoreJob(options)
    build(pipeline, job, job.served(["http://triton:8000"], "digits"))
    graph = pipeline.to_runner_api()
    payloads = []
    for transform in graph.components.transforms.values():
        if transform.spec.urn == "beam:transform:pardo:v1":
            par_do = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
            # Some of Beam's own steps are named, not pickled.
            payloads += [par_do.do_fn.payload] if par_do.do_fn.payload else []
    assert len(payloads) > 10
    for number, payload in enumerate(payloads):
        (tmp_path / f"{number}.pickle").write_bytes(payload)
    program = (
        "import pathlib, sys; sys.modules['pipelines'] = None\n"
        "from apache_beam.internal import pickler\n"
        "for path in pathlib.Path('.').glob('*.pickle'): pickler.loads(path.read_bytes())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_demo_reads_95_percent_of_the_digits(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 95 % of the digits are read right, and the picture is where it is said to be."""
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--endpoint", digits]) == 0
    written = capsys.readouterr().out
    share = float(written.rpartition("accuracy ")[2].partition("%")[0])
    assert share >= 95
    assert "out/digits.png" in written
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")
    scored = demo.scored_digits(DIGITS, tmp_path / "out" / "digits.jsonl")
    assert len(scored) == 898
    assert sum(digit.is_right for digit in scored) / len(scored) == pytest.approx(share / 100, abs=1e-4)
