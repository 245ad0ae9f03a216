"""What is refused before a job starts, and what is left to the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from beam_triton import ConfigurationError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.score.job_options import ScoreJob, parse_options
from beam_triton.score.row_reading import match_files
from beam_triton.score.score_command import check_job, check_outputs

SPEC = ModelSpec("m", "1", (TensorSpec("x", "FP32", (2,)),), (), 8)


def job(*arguments: str) -> ScoreJob:
    return ScoreJob(parse_options(list(arguments)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--output r.jsonl --failures r.jsonl", "--output r.jsonl and --failures r.jsonl are the same file"),
        ("--output r.jsonl --failures ./sub/../r.jsonl", "--output r.jsonl and --failures ./sub/../r.jsonl"),
        ("--output r.jsonl --failures link/r.jsonl", "--output r.jsonl and --failures link/r.jsonl"),
        ("--output r-*.jsonl --failures r-00000-of-00001.jsonl", "are the same file"),
        ("--output gs://b/r.jsonl --failures gs://b/r.jsonl", "are the same file"),
        ("--output a.jsonl", "--output a.jsonl would overwrite {folder}/a.jsonl, which --files reads"),
        (
            "--output r.jsonl --failures link/a.jsonl",
            "--failures link/a.jsonl would overwrite {folder}/a.jsonl",
        ),
        ("--output part-*.jsonl", "--output part-*.jsonl would overwrite {folder}/part-00000-of-00001.jsonl"),
    ],
)
def test_outputs_that_would_overwrite_an_input_or_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    """Neither results by failures nor an input, whichever way its path is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("a.jsonl", "part-00000-of-00001.jsonl"):
        (tmp_path / name).write_text("{}\n")
    given = job("--files", f"{tmp_path}/*.jsonl", *options.split())
    with pytest.raises(ConfigurationError) as caught:
        check_outputs(given, [path for path, _ in match_files(given.given.files)])
    assert message.format(folder=tmp_path) in caught.value.message


@pytest.mark.parametrize("options", ["--output b.jsonl", "--output sub/a.jsonl", "--output part-*.jsonl"])
def test_outputs_may_lie_beside_the_input(tmp_path: Path, options: str) -> None:
    """Another name or another folder is another file."""
    check_outputs(job("--files", "a.jsonl", *options.split()), [str(tmp_path / "a.jsonl"), "a.jsonl"])


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            "*.jsonl",
            "",
            "--failures is needed: what fails again would be in {folder}/*.jsonl, and {folder}/a",
        ),
        ("[ab].jsonl", "", "--failures is needed"),
        (
            "a.jsonl",
            "--where digit=7",
            "--where: the rows that it leaves out would be lost from {folder}/a.jsonl",
        ),
        ("part-*.jsonl", "--where digit=7", "--where"),
        ("part-*.jsonl", "--where digit=7 --failures {folder}/part-*.jsonl", "--where"),
        ("part-*.jsonl", "", None),
        ("*.jsonl", "--failures f.jsonl --where digit=7", None),
    ],
)
def test_a_replay_neither_loses_nor_doubles_failures(
    tmp_path: Path, files: str, options: str, message: str | None
) -> None:
    """The files that it reads are replaced as a whole, by the rows that fail again."""
    for name in ("a.jsonl", "b.jsonl", "part-00000-of-00001.jsonl"):
        (tmp_path / name).write_text("")
    more = options.format(folder=tmp_path).split()
    given = job("--replay", "--files", f"{tmp_path}/{files}", "--output", "r.jsonl", *more)
    found = [path for path, _ in match_files(given.given.files)]
    if message is None:
        check_outputs(given, found)
        return
    with pytest.raises(ConfigurationError) as caught:
        check_outputs(given, found)
    assert message.format(folder=tmp_path) in caught.value.message


def check(folder: Path, files: dict[str, str], *options: str) -> None:
    """Checks a job of these files, in this order, on a model that takes two numbers as ``x``."""
    paths = [folder / name for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text)
    given = job("--files", *map(str, paths), "--output", "r.jsonl", *options)
    model = replace(given.served(["http://nowhere.invalid:8000"], "m"), spec=SPEC)
    check_job(given, model, list(map(str, paths)))


@pytest.mark.parametrize(
    "files",
    [
        {"a.csv": "y\n1\n", "b.csv": "x\n1 2\n"},
        {"a.csv": "", "b.csv": "x\n1 2\n"},
        {"a.parquet": "no Parquet", "b.csv": "y\n1\n", "c.jsonl": '{"x": [1, 2]}\n'},
        {"a.jsonl": '{"id": 1}\n{"x": [1, 2]}\n'},
        {"a.jsonl": '{"id": 1}\n' * 100, "b.jsonl": '{"x": [1, 2]}\n'},
        {"a.jsonl": ""},
        {"a.jsonl": "\n{oops\n"},
    ],
)
def test_one_file_that_fits_is_enough(tmp_path: Path, files: dict[str, str]) -> None:
    """One file that fits is enough, and objects need not all have the column."""
    check(tmp_path, files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.csv": "y\n1\n", "b.csv": "z\n1\n"},
            "no column 'x' for the inputs of.*the file has y; inputs: x",
        ),
        ({"a.csv": "", "b.csv": "z\n1\n"}, r"a\.csv is empty"),
        (
            {"a.jsonl": '{"y": 1}\n{"z": 1}\n'},
            "no column 'x' for the inputs of.*the file has y, z; inputs: x",
        ),
        ({"a.jsonl": "", "b.csv": "z\n1\n"}, "no column 'x' for the inputs of.*the file has z; inputs: x"),
    ],
)
def test_a_column_that_no_file_has_is_refused_before_the_job_starts(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    """It is mistyped, most likely; the message is about the first file."""
    with pytest.raises(ConfigurationError, match=message):
        check(tmp_path, files)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("a,b,c", r"x FP32 \[2\] does not take 3 values.*a\.jsonl has a, b"),
        ("a:b", "rows of JSON Lines have no order of columns"),
        ("a,c", "no column 'c'"),
    ],
)
def test_a_mapping_that_no_object_can_fit_is_refused_before_the_job_starts(
    tmp_path: Path, columns: str, message: str
) -> None:
    """As for files with a header, and for ranges that only those can have."""
    files = {"a.jsonl": '{"a": 1}\n{"b": 2}\n'}
    check(tmp_path, files, "--input", "x=a,b")
    with pytest.raises(ConfigurationError, match=message):
        check(tmp_path, files, "--input", f"x={columns}")
