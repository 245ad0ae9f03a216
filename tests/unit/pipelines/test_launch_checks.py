"""What is refused before a job starts, and what is left to the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from beam_triton import ConfigurationError
from pipelines.launch_checks import check_outputs, find_files
from pipelines.score_options import ScoreJob, parse_options


def job(*arguments: str) -> ScoreJob:
    return ScoreJob.from_options(parse_options(list(arguments)))


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
def test_nothing_is_overwritten_by_what_the_job_writes(
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
        check_outputs(given, [path for path, _ in find_files(given)])
    assert message.format(folder=tmp_path) in caught.value.message


@pytest.mark.parametrize("options", ["--output b.jsonl", "--output sub/a.jsonl", "--output part-*.jsonl"])
def test_outputs_may_lie_beside_the_input(tmp_path: Path, options: str) -> None:
    """Another name or another folder is another file."""
    check_outputs(job("--files", "a.jsonl", *options.split()), [str(tmp_path / "a.jsonl"), "a.jsonl"])
