"""Numbered rows as a job: the models, the rows, ``pipelines/score_files.py`` on them, and its results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from engines.digits_job import MODEL, MODELS, SCORE_FILES
from engines.engine import Engine, PipelineRun
from tests.support.models import write_models

NUMBERS = ("numbers", "numbers_again")
"""Echo FP32 [n] after 20 ms, 64 elements in a request, four requests at a time: 20,000 in two seconds."""

SLOW_NUMBERS = "slow_numbers"
"""Echoes FP32 [n] after 0.5 s: 20,000 in 40 seconds, enough time to disturb a job."""

_FILES = 8


def write_repository(folder: Path) -> Path:
    """Write the models of numbers and the digits model into a folder, and return it."""
    for name, seconds in (*((name, "0.02") for name in NUMBERS), (SLOW_NUMBERS, "0.5")):
        write_models(
            folder,
            ["echo_variable"],
            name=name,
            max_batch_size=64,
            instances=4,
            parameters={"sleep_seconds": seconds},
        )
    shutil.copytree(MODELS / MODEL, folder / MODEL)
    return folder


def write_numbers(folder: Path, rows: int) -> str:
    """Write rows whose ``id`` and element ``x`` hold the same number; return the pattern of the files."""
    folder.mkdir()
    for index in range(_FILES):
        with (folder / f"numbers-{index}.jsonl").open("w") as file:
            for number in range(index, rows, _FILES):
                file.write(json.dumps({"id": number, "x": [float(number)]}) + "\n")
    return str(folder / "numbers-*.jsonl")


def start_numbers(engine: Engine, endpoint: str, *, files: str, output: Path) -> PipelineRun:
    """Start a job that scores numbered rows on the slow model."""
    return engine.start_pipeline(
        SCORE_FILES,
        f"--endpoint={endpoint}",
        f"--model={SLOW_NUMBERS}",
        f"--files={files}",
        "--input=x=x",
        "--keep=id",
        f"--output={output}",
    )


def scored_numbers(output: Path) -> list[int]:
    """The ids of the results in ascending order. AssertionError if a row has the result of another row."""
    numbers = []
    for line in output.read_text().splitlines():
        row = json.loads(line)
        assert row["y"] == [float(row["id"])], f"the result of another row: {row}"
        numbers.append(row["id"])
    return sorted(numbers)
