"""Results and failures keep the timestamps, windows and panes of their elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms import trigger, window

from beam_triton import TritonInference
from beam_triton.testing import LocalTriton
from tests.support.pipelines import Output, Run, run

# Small batches, so that many results are emitted while later elements, of other windows, are processed.
BATCHING = {"max_batch_size": 4}
COUNT = 200

WINDOWS = [
    pytest.param(window.GlobalWindows(), 1, id="global"),
    pytest.param(window.FixedWindows(10), 1, id="fixed"),
    pytest.param(window.SlidingWindows(10, 5), 2, id="two sliding"),
    pytest.param(window.SlidingWindows(12, 3), 4, id="four sliding"),
]


def timestamped(count: int) -> Iterator[Any]:
    """Elements with timestamps of their own, all in one bundle; the model rejects every seventh."""
    for n in range(count):
        value = np.array([n if n % 7 else -n - 1], np.float32)
        yield window.TimestampedValue((n, value), n / 3)


def numbered(pipeline: beam.Pipeline, windows: Any) -> Any:
    elements = pipeline | beam.Create([COUNT], reshuffle=False) | beam.FlatMap(timestamped)
    return elements | beam.WindowInto(windows)


def placement_of(output: Output) -> tuple[Any, ...]:
    """Timestamp, windows and pane of an output, in a comparable form."""
    return output.timestamp, tuple(sorted(map(repr, output.windows))), repr(output.pane)


def placements(run: Run, name: str, key: Any) -> list[tuple[Any, ...]]:
    return sorted((key(output.value), *placement_of(output)) for output in run.outputs[name])


@pytest.mark.parametrize(("windows", "each"), WINDOWS)
def test_results_and_failures_keep_timestamp_windows_and_pane(
    triton: LocalTriton, windows: Any, each: int
) -> None:
    """Every element comes out once, as a result or failure, at its own time and in its own windows."""

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = numbered(pipeline, windows)
        transform = TritonInference(triton.endpoint, "rejecting", batching=BATCHING)
        results, failures = elements | transform.with_exception_handling()
        return {"given": elements, "results": results, "failures": failures}

    outcome = run(build)
    given = placements(outcome, "given", lambda value: value[0])
    results = placements(outcome, "results", lambda value: value[0])
    failures = placements(outcome, "failures", lambda value: value[0][0])
    assert sorted(results + failures) == given
    assert [placement[0] for placement in failures] == [n for n in range(COUNT) if n % 7 == 0]
    assert all(len(output.windows) == each for output in outcome.outputs["results"])
    for output in outcome.outputs["results"]:
        n, result = output.value
        assert result.inference["y"].tolist() == [2.0 * n]


@pytest.mark.parametrize(("windows", "each"), WINDOWS)
def test_downstream_grouping_sees_each_result_once_per_window(
    triton: LocalTriton, windows: Any, each: int
) -> None:
    """A grouping after the transform counts exactly what a grouping before it counts."""

    def count(elements: Any, label: str) -> Any:
        return (
            elements
            | f"{label} key" >> beam.Map(lambda element: ("all", element[0]))
            | f"{label} group" >> beam.GroupByKey()
            | f"{label} sort" >> beam.MapTuple(lambda key, numbers: tuple(sorted(numbers)))
        )

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = numbered(pipeline, windows)
        transform = TritonInference(
            triton.endpoint, "rejecting", batching=BATCHING, default_value={"y": [0.0]}
        )
        return {"given": count(elements, "before"), "results": count(elements | transform, "after")}

    outcome = run(build)
    given = placements(outcome, "given", lambda value: value)
    assert placements(outcome, "results", lambda value: value) == given
    assert sum(len(numbers) for numbers, *_ in given) == COUNT * each


def test_session_windows_and_panes_of_a_grouping_are_kept(triton: LocalTriton) -> None:
    """Merged session windows and the panes of a grouping come out as they went in."""

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        times = [0, 1, 2, 50, 51, 100, 160, 161, 162, 163]
        groups = (
            pipeline
            | beam.Create([(n % 2, float(time)) for n, time in enumerate(times)])
            | beam.Map(lambda pair: window.TimestampedValue(pair, pair[1]))
            | beam.WindowInto(window.Sessions(20))
            | beam.GroupByKey()
            | beam.MapTuple(lambda key, values: ((key, min(values)), sorted(values)))
        )
        transform = TritonInference(triton.endpoint, "identity_fp32", batching=BATCHING)
        return {"given": groups, "results": groups | transform}

    outcome = run(build)
    given = placements(outcome, "given", lambda value: value[0])
    assert placements(outcome, "results", lambda value: value[0]) == given
    assert len({placement[2] for placement in given}) > 3
    for output in outcome.outputs["results"]:
        _, result = output.value
        assert result.inference["y"].tolist() == result.example


def test_panes_of_a_repeated_trigger_are_kept(triton: LocalTriton) -> None:
    """A trigger that fires more than once gives panes with different indices, which are kept."""

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        fired = (
            pipeline
            | beam.Create([("a", n) for n in range(10)])
            | beam.WindowInto(
                window.GlobalWindows(),
                trigger=trigger.Repeatedly(trigger.AfterCount(3)),
                accumulation_mode=trigger.AccumulationMode.DISCARDING,
            )
            | beam.GroupByKey()
            | beam.MapTuple(lambda key, numbers: (tuple(sorted(numbers)), [float(n) for n in numbers]))
        )
        return {"given": fired, "results": fired | TritonInference(triton.endpoint, "identity_fp32")}

    outcome = run(build)
    given = placements(outcome, "given", lambda value: value[0])
    assert placements(outcome, "results", lambda value: value[0]) == given
    assert all(output.pane.timing != 3 for output in outcome.outputs["results"])
