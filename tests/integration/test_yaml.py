"""Beam YAML: the pipelines of `pipelines/`, and what options of the transforms do, on a real Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apache_beam.yaml import main

from beam_triton.testing import LocalTriton
from pipelines.train_digits import DATA
from tests.support.models import write_models

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """The digits, and models of text and of a vector."""
    repository = write_models(tmp_path_factory.mktemp("models"), ["shout", "double", "classifier"])
    (repository / "digits").symlink_to(_ROOT / "pipelines" / "model_repository" / "digits")
    with LocalTriton(repository, stop_timeout_seconds=0.1) as triton:
        yield triton


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """200 digits, and one with too few pixels."""
    lines = DATA.read_text(encoding="utf-8").splitlines()[:201]
    path = tmp_path / "digits.csv"
    path.write_text("\n".join([*lines, 'odd,test,3,"[0,1,2]"\n']), encoding="utf-8")
    return path


def read(pattern: Path) -> list[dict[str, Any]]:
    (path,) = pattern.parent.glob(f"{pattern.name}*")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arguments(pipeline: str, triton: LocalTriton, digits: Path) -> list[str]:
    variables = {"endpoint": triton.endpoint, "files": str(digits), "output": str(digits.parent / "out")}
    return [
        f"--yaml_pipeline_file={_ROOT / 'pipelines' / pipeline}",
        f"--jinja_variables={json.dumps(variables)}",
        "--runner=FnApiRunner",
    ]


def run(triton: LocalTriton, *transforms: dict[str, Any], output: Path | None = None) -> list[dict[str, Any]]:
    """Run transforms one after the other, between a Create and a WriteToJson; what was written."""
    spec = {
        "providers": [{"include": str(_ROOT / "beam_triton" / "yaml" / "providers.yaml")}],
        "pipeline": {"type": "chain", "transforms": list(transforms)},
        "options": {"yaml_experimental_features": "ML"},
    }
    main.run([f"--yaml_pipeline={json.dumps(spec)}", "--runner=FnApiRunner"])
    return [] if output is None else read(output)


def create(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Create", "config": {"elements": list(elements)}}


def to_json(path: Path) -> dict[str, Any]:
    return {"type": "WriteToJson", "config": {"path": str(path)}}


def test_rows_are_scored_from_a_file_to_files(triton: LocalTriton, digits: Path) -> None:
    """`python -m apache_beam.yaml.main`: labels in one file, the row that failed and why in another."""
    command = [sys.executable, "-m", "apache_beam.yaml.main"]
    ran = subprocess.run(
        [*command, *arguments("score_rows.yaml", triton, digits)], cwd=_ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    scored = read(digits.parent / "out-scored")
    assert len(scored) == 200
    assert all(row.keys() == {"id", "expected", "label"} for row in scored)
    assert sum(row["label"] == row["expected"] for row in scored) > 190
    (failed,) = read(digits.parent / "out-failed")
    assert failed["id"] == "odd"
    assert "takes FP32 of shape [64], not shape [3]" in failed["reason"]


def test_run_inference_makes_a_row_of_the_outputs(triton: LocalTriton, digits: Path) -> None:
    """The elements are what ``preprocess`` makes of the rows, and the inference has the outputs' columns."""
    lines = digits.read_text(encoding="utf-8").splitlines()
    digits.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    main.run(arguments("run_inference.yaml", triton, digits))
    rows = read(digits.parent / "out-inferred")
    assert len(rows) == 200
    assert sum(row["label"] == row["expected"] for row in rows) > 190
    assert all(row["label"] == max(range(10), key=row["probabilities"].__getitem__) for row in rows)


def test_text_columns_and_classes_come_out_as_such(triton: LocalTriton, tmp_path: Path) -> None:
    """BYTES are text unless told otherwise, a column feeds an input of another name, classes have columns."""
    out = tmp_path / "out"
    scoring = {
        "endpoint": triton.endpoint,
        "model_name": "shout",
        "inputs": {"text": "word"},
        "outputs": {"loud": "shouted"},
        "keep": "all",
    }
    rows = run(
        triton,
        create({"word": "ant"}, {"word": "bee"}),
        {"type": "TritonInference", "config": scoring},
        to_json(out),
        output=out,
    )
    assert rows == [{"word": "ant", "shouted": "ANT"}, {"word": "bee", "shouted": "BEE"}]
    classes = {
        "endpoint": triton.endpoint,
        "model_name": "classifier",
        "classification": {"scores": 1},
        "prefix": "best_",
    }
    rows = run(
        triton,
        create({"x": [0.0, 1.0, 0.0, 0.0]}),
        {"type": "TritonInference", "config": classes},
        to_json(tmp_path / "classes"),
        output=tmp_path / "classes",
    )
    assert rows == [{"best_scores_label": "bee", "best_scores_score": 1.0, "best_scores_index": 1}]


def test_postprocess_gets_the_prediction_result(triton: LocalTriton, tmp_path: Path) -> None:
    """Beam's own example: a function of example, inference and model_id, with the type of its annotation."""
    out = tmp_path / "out"
    source = "def total(result) -> float:\n    return float(result.inference['y'].sum())\n"
    handler = {
        "type": "Triton",
        "config": {
            "endpoint": triton.endpoint,
            "model_name": "double",
            "postprocess": {"callable": source},
        },
    }
    rows = run(
        triton,
        create({"id": 1, "x": [1.0, 2.0, 3.0, 4.0]}),
        {"type": "RunInference", "config": {"model_handler": handler, "inference_tag": "total"}},
        {"type": "MapToFields", "config": {"fields": {"id": "id", "total": "total"}}},
        to_json(out),
        output=out,
    )
    assert rows == [{"id": 1, "total": 20.0}]


def test_the_first_failure_fails_a_pipeline_without_error_handling(triton: LocalTriton) -> None:
    """The error names the model's input; no row is lost in silence."""
    config = {"endpoint": triton.endpoint, "model_name": "double"}
    with pytest.raises(Exception, match=r"takes FP32 of shape \[4\], not shape \[1\]"):
        run(triton, create({"x": [1.0]}), {"type": "TritonInference", "config": config})


def test_a_pipeline_whose_rows_do_not_fit_the_model_is_not_started(triton: LocalTriton) -> None:
    """The schema is compared with the model's inputs before, with an error that says what is missing."""
    config = {"endpoint": triton.endpoint, "model_name": "double"}
    with pytest.raises(ValueError, match=r"'x' is missing|no column"):
        run(triton, create({"y": [1.0]}), {"type": "TritonInference", "config": config})
