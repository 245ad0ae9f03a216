"""RunInference changes its model while a pipeline runs, on a real Triton."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import ModelMetadata, RunInference
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from beam_triton import TritonModelHandler
from beam_triton.testing import LocalTriton
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
    found = [(float(each.example[0]), each.model_id, version_of(each)) for each in outcome.results]
    assert found == [
        (0.0, "request_facts:1", "1"),
        (1.0, "request_facts:3", "3"),
        (2.0, "request_facts:1", "1"),
        (3.0, "request_facts:3", "3"),
    ]
    counted = {name: outcome.counters[f"{name}_num_inferences"] for name in ("three", "one", "newest")}
    assert counted == {"three": 1, "one": 1, "newest": 1}
