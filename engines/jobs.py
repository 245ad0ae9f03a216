"""``pipelines/score_files.py``, unchanged, on whatever engine; and checks of what it has written."""

from __future__ import annotations

import json
from pathlib import Path

from engines import served
from engines.engine import Engine, PipelineRun
from engines.install import REPOSITORY

SCORE_FILES = REPOSITORY / "pipelines" / "score_files.py"
DIGITS_FILE = REPOSITORY / "pipelines" / "data" / "digits.csv"

_FILES = 8


def score_digits(engine: Engine, endpoint: str, output: Path) -> dict[str, tuple[int, int]]:
    """Score the digits that the model was not trained on: id to what was meant and what was predicted."""
    engine.run_pipeline(*digits_arguments(endpoint, output))
    return read_digits(output)


def digits_arguments(endpoint: str, output: Path) -> list[str]:
    """The script and its arguments."""
    return [
        str(SCORE_FILES),
        f"--endpoint={endpoint}",
        f"--model={served.DIGITS}",
        f"--files={DIGITS_FILE}",
        "--where=split=test",
        "--input=image=image",
        "--keep=id,expected=digit",
        "--outputs=label",
        f"--output={output}",
    ]


def read_digits(output: Path) -> dict[str, tuple[int, int]]:
    """The results by id. AssertionError where one came out twice."""
    results: dict[str, tuple[int, int]] = {}
    for line in output.open():
        row = json.loads(line)
        assert row["id"] not in results, f"{row['id']} came out twice"
        results[row["id"]] = (int(row["expected"]), row["label"])
    return results


def accuracy(results: dict[str, tuple[int, int]]) -> float:
    """The share of digits that were recognized."""
    return sum(expected == predicted for expected, predicted in results.values()) / len(results)


def write_numbers(folder: Path, rows: int) -> str:
    """Write rows of an ``id`` and an element ``x`` that holds the same number; return the files' pattern."""
    folder.mkdir()
    for index in range(_FILES):
        with (folder / f"numbers-{index}.jsonl").open("w") as file:
            for number in range(index, rows, _FILES):
                file.write(json.dumps({"id": number, "x": [float(number)]}) + "\n")
    return str(folder / "numbers-*.jsonl")


def start_numbers(
    engine: Engine, endpoint: str, *, files: str, output: Path, model: str = served.LEISURELY_NUMBERS
) -> PipelineRun:
    """Start a job on numbered rows."""
    return engine.start_pipeline(
        SCORE_FILES,
        f"--endpoint={endpoint}",
        f"--model={model}",
        f"--files={files}",
        "--input=x=x",
        "--keep=id",
        f"--output={output}",
    )


def scored_numbers(output: Path) -> list[int]:
    """The ids of the results in ascending order. AssertionError where a result is not its own row's."""
    numbers = []
    for line in output.open():
        row = json.loads(line)
        assert row["y"] == [float(row["id"])], f"the result of another row: {row}"
        numbers.append(row["id"])
    return sorted(numbers)
