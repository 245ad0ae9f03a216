"""The demonstration: score_files on the half of the shipped digits that their model was not trained on.

``python -m pipelines.demo`` starts a Triton server on this machine, scores the digits, says how many were
read right, and draws them. Options of score_files and of Beam may follow, ``--endpoint`` of a server that has
the model, for example.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from beam_triton import ConfigurationError
from pipelines import score_files
from pipelines.digits_picture import ScoredDigit, accuracy, draw

DIGITS = Path(__file__).resolve().parent / "data" / "digits.csv"
NEEDED_ACCURACY = 0.95


def scored_digits(digits: Path, results: Path) -> list[ScoredDigit]:
    """The results joined with the images that they belong to."""
    with digits.open(newline="", encoding="utf-8") as file:
        images = {row["id"]: json.loads(row["image"]) for row in csv.DictReader(file)}
    found = []
    with results.open(encoding="utf-8") as file:
        for result in map(json.loads, file):
            image = np.array(images[result["id"]], dtype=np.float32).reshape(8, 8)
            found.append(
                ScoredDigit(image, int(result["expected"]), result["label"], max(result["probabilities"]))
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; 0 when at least `NEEDED_ACCURACY` of the digits were read right."""
    out = Path("out")
    results = out / "digits.jsonl"
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = [
        *("--files", _shown(DIGITS), "--where", "split=test", "--model", "digits"),
        *("--keep", "id,expected=digit", "--output", str(results)),
        *given,
    ]
    print(f"python -m pipelines.score_files {' '.join(command)}\n")
    exit_code = score_files.main(command)
    if exit_code or "--help" in given:
        return exit_code
    digits = scored_digits(DIGITS, results)
    share = accuracy(digits)
    errors = sum(not digit.is_right for digit in digits)
    print(f"\n{len(digits) - errors} of {len(digits)} digits read right: accuracy {share:.2%}")
    picture = out / "digits.png"
    try:
        draw(digits, picture, title="Handwritten digits, scored by a Beam pipeline on Triton")
        print(f"the digits and the model's errors: {picture}")
    except ConfigurationError as error:
        print(error.message)
    if share < NEEDED_ACCURACY:
        print(f"that is less than the {NEEDED_ACCURACY:.0%} that this model reaches", file=sys.stderr)
        return 1
    return 0


def _shown(path: Path) -> str:
    """The path as a user would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
