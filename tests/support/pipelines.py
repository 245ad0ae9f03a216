"""Runs pipelines on FnApiRunner in this process, and returns their outputs and metrics.

The runner is named because DirectRunner may try to download Prism first.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.utils import shared

RUNNER = "FnApiRunner"


class Output(NamedTuple):
    """One output element."""

    value: Any
    timestamp: float
    windows: tuple[Any, ...]
    pane: Any


@dataclass
class Run:
    """A finished pipeline: its outputs by name, and the library's metrics."""

    outputs: dict[str, list[Output]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    distributions: dict[str, Any] = field(default_factory=dict)
    gauges: dict[str, int] = field(default_factory=dict)

    @property
    def results(self) -> list[Any]:
        """The values of the output ``results``."""
        return [output.value for output in self.outputs["results"]]

    @property
    def failures(self) -> list[Any]:
        """The values of the output ``failures``."""
        return [output.value for output in self.outputs["failures"]]


# FnApiRunner runs a pipeline in this process but pickles its functions, so they find their list by number.
_kept: dict[int, list[Output]] = {}
_numbers = itertools.count()


class _Keep(beam.DoFn):
    def __init__(self, number: int) -> None:
        self._number = number

    def process(self, value: Any, whole: Any = beam.DoFn.WindowedValueParam) -> Iterable[Any]:
        output = Output(value, float(whole.timestamp), tuple(whole.windows), whole.pane_info)
        _kept[self._number].append(output)
        return ()


def run(
    build: Callable[[beam.Pipeline], Any],
    *options: str,
    namespace: str = "beam_triton",
    runner: str = RUNNER,
) -> Run:
    """Run what ``build`` returns: a PCollection (``results``), (results, failures), or several by name."""
    numbers: dict[str, int] = {}
    pipeline = TestPipeline(runner=runner, options=PipelineOptions(list(options)))
    built = build(pipeline)
    if isinstance(built, tuple):
        built = dict(zip(("results", "failures"), built, strict=True))
    named: Mapping[str, Any] = built if isinstance(built, Mapping) else {"results": built}
    try:
        for name, pcollection in named.items():
            numbers[name] = next(_numbers)
            _kept[numbers[name]] = []
            _ = pcollection | f"Keep {name}" >> beam.ParDo(_Keep(numbers[name]))
        result = pipeline.run()
        result.wait_until_finish()
    finally:
        outputs = {name: _kept.pop(number) for name, number in numbers.items()}
    queried = result.metrics().query(MetricsFilter().with_namespace(namespace))
    counters: dict[str, int] = {}
    for counter in queried["counters"]:
        name = counter.key.metric.name
        counters[name] = counters.get(name, 0) + counter.result
    distributions = {entry.key.metric.name: entry.result for entry in queried["distributions"]}
    gauges = {entry.key.metric.name: entry.result.value for entry in queried["gauges"]}
    return Run(outputs, counters, distributions, gauges)


def score(elements: Iterable[Any], transform: Any, *options: str) -> Run:
    """Run the transform on these elements, in one bundle."""
    given = list(elements)
    return run(lambda pipeline: pipeline | beam.Create(given, reshuffle=False) | transform, *options)


class _Nothing:
    pass


def release_the_last_model() -> None:
    """Beam keeps the last model of a process alive: loading another one in its place releases it."""
    shared.Shared().acquire(_Nothing, tag="nothing")
    gc.collect()


@contextmanager
def bundle_of(dofn: Any) -> Iterator[Any]:
    """A DoFn after ``setup`` and ``start_bundle``; ``teardown`` follows the block, as on a runner."""
    dofn.setup()
    try:
        dofn.start_bundle()
        yield dofn
    finally:
        dofn.teardown()
