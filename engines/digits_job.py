"""The digits as a job: ``pipelines/score_files.py``, unchanged, on any engine, and its results."""

from __future__ import annotations

import json
from pathlib import Path

from engines.engine import Engine
from engines.install import REPOSITORY

MODELS = REPOSITORY / "pipelines" / "model_repository"
MODEL = "digits"
SCORE_FILES = REPOSITORY / "pipelines" / "score_files.py"

_DIGITS = REPOSITORY / "pipelines" / "data" / "digits.csv"


def digits_arguments(endpoint: str, output: Path) -> list[str]:
    """The script and its arguments: it scores the digits that the model was not trained on."""
    return [
        str(SCORE_FILES),
        f"--endpoint={endpoint}",
        f"--model={MODEL}",
        f"--files={_DIGITS}",
        "--where=split=test",
        "--input=image=image",
        "--keep=id,expected=digit",
        "--outputs=label",
        f"--output={output}",
    ]


def score_digits(engine: Engine, endpoint: str, output: Path) -> dict[str, tuple[int, int]]:
    """Run the job; return each digit's label and the model's prediction, by id."""
    engine.run_pipeline(*digits_arguments(endpoint, output))
    return read_results(output)


def read_results(output: Path) -> dict[str, tuple[int, int]]:
    """Read what the job wrote: label and prediction by id. AssertionError if an id is there twice."""
    results: dict[str, tuple[int, int]] = {}
    for line in output.read_text().splitlines():
        row = json.loads(line)
        assert row["id"] not in results, f"{row['id']} has two results"
        results[row["id"]] = (int(row["expected"]), row["label"])
    return results


def accuracy(results: dict[str, tuple[int, int]]) -> float:
    """The share of digits that the model recognizes."""
    return sum(label == predicted for label, predicted in results.values()) / len(results)
