"""Where `explain` takes a job's metrics from: Beam's results, files and Dataflow's service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.metrics import Metrics

import beam_triton
from beam_triton.errors import ConfigurationError
from beam_triton.transforms.explanation import job_metrics, read_metrics
from tests.support.pipelines import RUNNER


def ran() -> Any:
    """A job of two steps that write the library's metrics."""

    def write(value: int) -> int:
        Metrics.counter("beam_triton", "requests").inc(value)
        Metrics.counter("other", "requests").inc(1_000)
        Metrics.distribution("beam_triton", "batch_size").update(value)
        return value + 1

    pipeline = beam.Pipeline(runner=RUNNER)
    _ = pipeline | beam.Create([3, 5]) | "First" >> beam.Map(write) | "Second" >> beam.Map(write)
    result = pipeline.run()
    result.wait_until_finish()
    return result


def test_steps_of_a_job_are_added_up(tmp_path: Path) -> None:
    """From a result, its metrics, and the file that they were written to; without those of others."""
    result, path = ran(), str(tmp_path / "metrics.json")
    beam_triton.write_metrics(result.metrics(), path)
    for metrics in (job_metrics(result), job_metrics(result.metrics()), read_metrics(path)):
        assert dict(metrics.counters) == {"requests": 3 + 5 + 4 + 6}
        found = metrics.distributions["batch_size"]
        assert (found.count, found.sum, found.minimum, found.maximum) == (4, 18, 3, 6)


def dataflow(name: str, namespace: str = "beam_triton", tentative: bool = False, **value: Any) -> Any:
    context = {"namespace": namespace, "step": "s2"} | ({"tentative": "true"} if tentative else {})
    return {"name": {"name": name, "origin": "user", "context": context}, "updateTime": "…", **value}


@pytest.mark.parametrize("wrapped", [False, True], ids=["gcloud", "REST"])
def test_metrics_of_dataflow_are_taken_once(wrapped: bool, tmp_path: Path) -> None:
    """Attempted values come twice; Dataflow's own and other steps' come along."""
    distribution = {"count": 2, "sum": 9, "min": 4, "max": 5, "mean": 4}
    entries = [
        dataflow("requests", scalar=7),
        dataflow("requests", tentative=True, scalar=7),
        dataflow("requests", "other", scalar=100),
        dataflow("batch_size", distribution=distribution),
        {"name": {"name": "TotalVcpuTime", "origin": "dataflow/v1b3"}, "scalar": 12},
    ]
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"metrics": entries} if wrapped else entries))
    metrics = read_metrics(str(path))
    assert dict(metrics.counters) == {"requests": 7}
    assert metrics.distributions["batch_size"].mean == 4.5


@pytest.mark.parametrize("document", [3, "text", ["text"], {"counters": 3}, {"metrics": [{}]}])
def test_other_documents_are_refused(document: Any) -> None:
    """The message says what to give."""
    with pytest.raises(ConfigurationError, match="write_metrics"):
        beam_triton.explain(document)


@pytest.mark.parametrize("text", [None, "no JSON"], ids=["no file", "no JSON"])
def test_file_that_cannot_be_read_is_refused(text: str | None, tmp_path: Path) -> None:
    """The message names the file."""
    path = tmp_path / "metrics.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=str(path)):
        read_metrics(str(path))
