"""RunInference changes its model while a pipeline runs, on a real Triton; and the examples of its page."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import ModelMetadata, RunInference
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from beam_triton import ConfigurationError, ModelNotFoundError, TritonError, TritonModelHandler
from beam_triton.testing import LocalTriton
from beam_triton.transforms.run_inference import _IN_PROCESS
from tests.support.pipelines import Run, run


def fp32(*values: float) -> Any:
    return np.array(values, np.float32)


def in_windows(pipeline: beam.Pipeline, label: str, values: Sequence[Any]) -> Any:
    """Each value in a window of its own; the windows come in order."""
    stamped = list(enumerate(values))
    return (
        pipeline
        | f"Create {label}" >> beam.Create(stamped, reshuffle=False)
        | f"Stamp {label}" >> beam.MapTuple(lambda second, value: TimestampedValue(value, second))
        | f"Window {label}" >> beam.WindowInto(FixedWindows(1))
        | f"Key {label}" >> beam.Map(lambda value: ("", value))
        | f"Group {label}" >> beam.GroupByKey()
        | f"Flatten {label}" >> beam.FlatMap(lambda group: group[1])
    )


def scored_with_updates(
    handler: Any, elements: Sequence[Any], updates: Sequence[Any], *, keep_failures: bool = False
) -> Run:
    """The elements, each with the update beside it that its window has."""

    def build(pipeline: beam.Pipeline) -> Any:
        transform = RunInference(handler, model_metadata_pcoll=in_windows(pipeline, "updates", updates))
        if not keep_failures:
            return in_windows(pipeline, "elements", elements) | transform
        results, others = in_windows(pipeline, "elements", elements) | transform.with_exception_handling()
        return results, others.failed_inferences

    return run(build)


def version_of(result: Any) -> str:
    """The version that the model itself says it is."""
    return str(json.loads(result.inference["facts"][0])["version"])


def facts(results: Sequence[Any]) -> list[tuple[float, str, str]]:
    return [(float(each.example[0]), each.model_id, version_of(each)) for each in results]


def test_side_input_switches_the_version(triton: LocalTriton) -> None:
    """The version that the side input names answers, and results and metrics carry its name."""
    handler = TritonModelHandler(triton.endpoint, "request_facts", model_version=1)
    updates = [
        ModelMetadata("", ""),
        ModelMetadata("request_facts/versions/3", "three"),
        ModelMetadata("request_facts/versions/1", "one"),
        ModelMetadata("request_facts", "newest"),
    ]
    outcome = scored_with_updates(handler, [fp32(n) for n in range(4)], updates)
    assert facts(outcome.results) == [
        (0.0, "request_facts:1", "1"),
        (1.0, "request_facts:3", "3"),
        (2.0, "request_facts:1", "1"),
        (3.0, "request_facts:3", "3"),
    ]
    counted = {name: outcome.counters[f"{name}_num_inferences"] for name in ("three", "one", "newest")}
    assert counted == {"three": 1, "one": 1, "newest": 1}


def test_side_input_switches_the_model(triton: LocalTriton) -> None:
    """Another model, with other inputs and outputs, answers the elements of its own windows."""
    elements = [fp32(1), [1.0] * 4, fp32(2)]
    updates = [ModelMetadata(name, name) for name in ("request_facts", "double", "slow")]
    outcome = scored_with_updates(TritonModelHandler(triton.endpoint, "rejecting"), elements, updates)
    found = [(each.model_id, sorted(each.inference)) for each in outcome.results]
    assert found == [("request_facts:3", ["facts"]), ("double:1", ["y"]), ("slow:1", ["y"])]


def test_new_file_of_a_model_repository_switches_the_version(triton: LocalTriton, tmp_path: Path) -> None:
    """``watch_model_pattern`` takes the version from the folder of the file that has come."""
    file = tmp_path / "request_facts" / "1" / "model.py"
    file.parent.mkdir(parents=True)
    file.touch()
    # Beam takes files that are newer than the pipeline.
    os.utime(file, (time.time() + 60,) * 2)

    def build(pipeline: beam.Pipeline) -> Any:
        transform: Any = RunInference(
            TritonModelHandler(triton.endpoint, "request_facts"),
            watch_model_pattern=str(tmp_path / "request_facts" / "*" / "model.py"),
            # Once: Beam counts intervals from its import on.
            interval=1_000_000,
            stop_timestamp=time.time() + 1,
        )
        return pipeline | beam.Create([fp32(0)], reshuffle=False) | transform

    assert facts(run(build).results) == [(0.0, "request_facts:1", "1")]


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("request_facts/versions/9", ModelNotFoundError, "the server has: .*request_facts"),
        ("gone", ModelNotFoundError, "the server has: .*request_facts"),
        ("broken", TritonError, "broken"),
        ("http://triton:8000", ConfigurationError, "Another server needs another RunInference"),
    ],
)
@pytest.mark.parametrize("first", ["", "request_facts/versions/1"])
def test_model_that_cannot_be_opened_answers_nothing_and_neither_does_the_earlier_one(
    triton: LocalTriton, first: str, path: str, kind: type[Exception], message: str
) -> None:
    """Its batches are dead letters with the reason, and the next update works again."""
    handler = TritonModelHandler(triton.endpoint, "request_facts", model_version=1)
    updates = [ModelMetadata(name, "") for name in (first, path, path, "request_facts/versions/3")]
    outcome = scored_with_updates(handler, [fp32(n) for n in range(4)], updates, keep_failures=True)
    assert facts(outcome.results) == [(0.0, "request_facts:1", "1"), (3.0, "request_facts:3", "3")]
    failed = [(float(batch[0][0]), error[0]) for batch, error in outcome.failures]
    assert [element for element, _ in failed] == [1.0, 2.0]
    assert all(issubclass(each, kind) for _, each in failed), failed
    assert all(re.search(message, error[1]) for _, error in outcome.failures)


def test_model_that_cannot_be_opened_fails_the_bundle(triton: LocalTriton) -> None:
    """Without exception handling the runner repeats the bundle; the error names the model."""
    handler = TritonModelHandler(triton.endpoint, "request_facts")
    with pytest.raises(ModelNotFoundError, match="gone"):
        scored_with_updates(handler, [fp32(0)], [ModelMetadata("gone", "")])


def test_first_model_that_cannot_be_opened_is_named_for_every_batch(triton: LocalTriton) -> None:
    """Beam has no earlier model then."""
    handler = TritonModelHandler(triton.endpoint, "gone")
    updates = [ModelMetadata("", "")] * 2
    outcome = scored_with_updates(handler, [fp32(0), fp32(1)], updates, keep_failures=True)
    assert [error[0] for _, error in outcome.failures] == [ModelNotFoundError] * 2


def test_the_page_of_run_inference_runs(triton: LocalTriton) -> None:
    """Every example of docs/run-inference.md runs, in order."""
    pytest.importorskip("apache_beam.io.components.rate_limiter", reason="came after Beam 2.70")
    page = Path(__file__).parents[2] / "docs" / "run-inference.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        code = block.replace("http://triton:8000", triton.endpoint)
        exec(code.replace("beam.Pipeline()", "beam.Pipeline('FnApiRunner')"), names)
    assert len(blocks) == 5
    # Beam keeps the models of a KeyedModelHandler for as long as the process lives.
    for model in list(_IN_PROCESS.values()):
        model.close()
