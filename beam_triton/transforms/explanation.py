"""A job's Beam metrics, written to a file and read again, and what they say of where its time goes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import MetricResults, MetricsFilter
from apache_beam.runners.runner import PipelineResult

from beam_triton.errors import ConfigurationError
from beam_triton.policy.diagnosis import Distribution, Explanation, JobMetrics, ServerSettings, diagnose
from beam_triton.transforms.metrics import NAMESPACE

GivenMetrics: TypeAlias = PipelineResult | MetricResults | JobMetrics | Mapping[str, Any] | Iterable[Any]

_WHAT_IT_TAKES = (
    "give what PipelineResult.metrics() returns, a file of beam_triton.write_metrics or score --metrics, "
    "or what gcloud dataflow metrics list JOB --source=user --format=json prints"
)


def explain(metrics: GivenMetrics, server: ServerSettings | None = None) -> Explanation:
    """Where a job's time goes, and the one setting to change, of a pipeline that has run, on any runner.

    ::

        result = pipeline.run()
        result.wait_until_finish()
        print(beam_triton.explain(result.metrics()))

    All of the library's steps are taken together. The result's text is meant to be read; its ``stations``
    have the shares, ``advice`` the setting, the figure that says so and what to set, or is None where there
    is nothing to change.

    Args:
        metrics: what ``PipelineResult.metrics()`` returns; the result itself; or what `write_metrics` has
            written, or ``gcloud dataflow metrics list JOB --source=user --format=json`` prints, loaded.
        server: what is known of the model's configuration, besides.

    Raises:
        ConfigurationError: ``metrics`` is something else.
    """
    return diagnose(job_metrics(metrics), server)


def write_metrics(metrics: GivenMetrics, path: str) -> None:
    """Write a job's metrics of this library as JSON, for ``python -m beam_triton explain`` and for later.

    Args:
        metrics: as `explain` takes them.
        path: of the file, on any of Beam's file systems (``gs://…``).

    Raises:
        ConfigurationError: ``metrics`` is something else.
    """
    job = job_metrics(metrics)
    document = {
        "namespace": NAMESPACE,
        "counters": dict(sorted(job.counters.items())),
        "distributions": {
            name: {"count": each.count, "sum": each.sum, "min": each.minimum, "max": each.maximum}
            for name, each in sorted(job.distributions.items())
        },
    }
    with FileSystems.create(path, mime_type="application/json") as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())


def read_metrics(path: str) -> JobMetrics:
    """The metrics of a file, as `explain` takes them.

    Raises:
        ConfigurationError: it cannot be read, or holds something else.
    """
    try:
        with FileSystems.open(path) as file:
            document = json.loads(file.read())
    except (OSError, BeamIOError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}; {_WHAT_IT_TAKES}") from error
    try:
        return job_metrics(document)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


def job_metrics(metrics: GivenMetrics) -> JobMetrics:
    """The library's metrics among ``metrics``, those of all steps together.

    Raises:
        ConfigurationError: they are no metrics.
    """
    if isinstance(metrics, JobMetrics):
        return metrics
    try:
        if isinstance(metrics, PipelineResult):
            metrics = metrics.metrics()
        if isinstance(metrics, MetricResults):
            return _of_results(metrics)
        if isinstance(metrics, Mapping):
            return _of_service(metrics["metrics"]) if "metrics" in metrics else _of_file(metrics)
        return _of_service(list(metrics))  # type: ignore[arg-type]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"these are no metrics of a job ({error!r}): {_WHAT_IT_TAKES}") from error


def _of_results(results: MetricResults) -> JobMetrics:
    found = results.query(MetricsFilter().with_namespace(NAMESPACE))
    counters: Counter[str] = Counter()
    distributions: dict[str, Distribution] = {}
    for entry in found["counters"]:
        counters[entry.key.metric.name] += entry.result or 0
    for entry in found["distributions"]:
        each = entry.result
        if each is not None and each.count:
            _add(distributions, entry.key.metric.name, Distribution(each.count, each.sum, each.min, each.max))
    return JobMetrics(counters, distributions)


def _of_file(document: Mapping[str, Any]) -> JobMetrics:
    distributions = {
        name: Distribution(int(each["count"]), each["sum"], each["min"], each["max"])
        for name, each in document["distributions"].items()
    }
    return JobMetrics({name: int(value) for name, value in document["counters"].items()}, distributions)


def _of_service(entries: Iterable[Any]) -> JobMetrics:
    """Dataflow's ``MetricUpdate``: attempted values come twice, the tentative ones while the job runs."""
    counters: Counter[str] = Counter()
    distributions: dict[str, Distribution] = {}
    for entry in entries:
        name, context = entry["name"], entry["name"].get("context") or {}
        if context.get("namespace") != NAMESPACE or "tentative" in context:
            continue
        if entry.get("distribution") is not None:
            each = entry["distribution"]
            values = (float(each[key]) for key in ("sum", "min", "max"))
            _add(distributions, name["name"], Distribution(int(each["count"]), *values))
        elif entry.get("scalar") is not None:
            counters[name["name"]] += int(entry["scalar"])
    return JobMetrics(counters, distributions)


def _add(distributions: dict[str, Distribution], name: str, more: Distribution) -> None:
    known = distributions.get(name)
    if known is not None:
        more = Distribution(
            known.count + more.count,
            known.sum + more.sum,
            min(known.minimum, more.minimum),
            max(known.maximum, more.maximum),
        )
    distributions[name] = more
