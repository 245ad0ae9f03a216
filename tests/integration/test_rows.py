"""Rows in and rows out on a real Triton, from a file to files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

from beam_triton.testing import LocalTriton
from pipelines import score_rows
from pipelines.train_digits import DATA

_REPOSITORY = Path(__file__).parents[2] / "pipelines" / "model_repository"


@pytest.fixture(scope="module")
def triton() -> Iterator[LocalTriton]:
    with LocalTriton(_REPOSITORY, stop_timeout_seconds=0.1) as triton:
        yield triton


def test_rows_are_scored_from_file_to_files_with_no_schema_written(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """Parquet has the types of the row and of the model, failures are rows with a reason, groups count."""
    lines = DATA.read_text(encoding="utf-8").splitlines()[:201]
    too_short = '"[0,1,2]"'
    digits = tmp_path / "digits.csv"
    digits.write_text("\n".join([*lines, f"odd,test,3,{too_short}"]), encoding="utf-8")
    score_rows.main([triton.endpoint, str(digits), str(tmp_path / "out"), "--runner=FnApiRunner"])

    (parquet,) = tmp_path.glob("out-scored*.parquet")
    table = pyarrow.parquet.read_table(parquet)
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "string",
        "digit": "int64",
        "probabilities": "list<: float not null>",
        "label": "int64",
    }
    rows = table.to_pylist()
    assert len(rows) == 200
    assert sum(row["digit"] == row["label"] for row in rows) > 190
    assert all(len(row["probabilities"]) == 10 for row in rows)

    (failures,) = tmp_path.glob("out-failed*")
    (failure,) = map(json.loads, failures.read_text(encoding="utf-8").splitlines())
    assert (failure["id"], failure["image"], failure["error_type"]) == (
        "odd",
        [0, 1, 2],
        "LocalProtocolError",
    )
    assert "takes FP32 of shape [64], not shape [3]" in failure["error_message"]

    (summary,) = tmp_path.glob("out-summary*")
    with summary.open(encoding="utf-8") as file:
        groups = list(csv.DictReader(file))
    assert sum(int(group["all"]) for group in groups) == 200
    assert len(groups) == 10
