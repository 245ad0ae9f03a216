"""The model repository of the engines' tests: the digits classifier, and models of numbered elements."""

from __future__ import annotations

import shutil
from pathlib import Path

from engines.install import REPOSITORY
from tests.support.models import write_models

NUMBERS = ("numbers", "numbers_again")
"""Each echoes FP32 [n] after 20 ms, 64 elements a request, four requests at a time: 20,000 in two seconds."""

LEISURELY_NUMBERS = "leisurely_numbers"
"""One that does after 0.5 s: 20,000 in 40 seconds, so that much can happen before a job ends."""

DIGITS = "digits"


def write_repository(folder: Path) -> Path:
    """Write all four models into a folder, and return it."""
    for name, seconds in (*((name, "0.02") for name in NUMBERS), (LEISURELY_NUMBERS, "0.5")):
        write_models(
            folder,
            ["echo_variable"],
            name=name,
            max_batch_size=64,
            instances=4,
            parameters={"sleep_seconds": seconds},
        )
    shutil.copytree(REPOSITORY / "pipelines" / "model_repository" / DIGITS, folder / DIGITS)
    return folder
