"""What a Triton counts while it is measured: how long requests waited, and how long executions took."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from beam_triton.client import TritonClient
from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError, TritonError

_METRICS_SECONDS = 2.0
_UTILIZATION = re.compile(r"^nv_(cpu|gpu)_utilization(?:\{[^}]*\})? ([0-9.eE+-]+)", re.MULTILINE)
_METRIC = re.compile(r"^nv_\w+[ {]", re.MULTILINE)


@dataclass(frozen=True)
class ServerSide:
    """What happened in the server within ``seconds``, whoever sent the requests.

    Attributes:
        requests: answered; ``elements`` are those in them.
        executions: of the model; of an ensemble there are none.
        queue_seconds, compute_seconds: of all requests, and of all executions, together.
    """

    seconds: float
    requests: int
    elements: int
    executions: int
    queue_seconds: float
    compute_seconds: float

    @property
    def queue_a_request(self) -> float:
        return self.queue_seconds / self.requests

    @property
    def compute_an_execution(self) -> float:
        return self.compute_seconds / self.executions

    def busy_share(self, instances: int) -> float:
        """The share of the time that an instance spent executing."""
        return self.compute_seconds / (self.seconds * instances)


@dataclass(frozen=True)
class Counts:
    """A server's counts of one model since it started, at one time."""

    at: float
    requests: int
    elements: int
    executions: int
    queue_ns: int
    compute_ns: int

    def since(self, before: Counts) -> ServerSide | None:
        """What happened in between; None if nothing did, or the two are not of one server."""
        requests = self.requests - before.requests
        executions = self.executions - before.executions
        if requests <= 0 or executions <= 0 or self.compute_ns <= before.compute_ns:
            return None
        return ServerSide(
            self.at - before.at,
            requests,
            self.elements - before.elements,
            executions,
            (self.queue_ns - before.queue_ns) / 1e9,
            (self.compute_ns - before.compute_ns) / 1e9,
        )


def read_counts(client: TritonClient, model_name: str, clock: Any) -> Counts | None:
    """The counts of the model's versions together; None where the server keeps none."""
    try:
        versions = client.statistics(model_name)["model_stats"]
        at = clock()
        found = [_of_version(each) for each in versions]
    except (TritonError, LookupError, TypeError, ValueError):
        return None
    return Counts(at, *(sum(column) for column in zip(*found, strict=True)))


def _of_version(version: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    inference = version["inference_stats"]
    # By request, the times of an execution that several share would count several times.
    compute_ns = sum(
        int(size[f"compute_{step}"]["ns"])
        for size in version.get("batch_stats") or ()
        for step in ("input", "infer", "output")
    )
    return (
        int(inference["success"]["count"]),
        int(version["inference_count"]),
        int(version["execution_count"]),
        int(inference["queue"]["ns"]),
        compute_ns,
    )


def utilization(metrics_url: str) -> dict[str, float]:
    """The busy share of the server's ``cpu`` and ``gpu``, as far as its metrics have them.

    Triton renews them every two seconds. Of several GPUs, the busiest.

    Raises:
        ConfigurationError: there are no metrics at that address.
    """
    shown = redact_url(metrics_url)
    try:
        with urllib.request.urlopen(metrics_url, timeout=_METRICS_SECONDS) as answer:
            text = answer.read(1 << 22).decode("utf-8", "replace")
    except HTTPException:
        # Its text may be a password, where the address has one.
        raise ConfigurationError(f"--metrics-url {shown}: no HTTP server answers there") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--metrics-url {shown}: {error}") from None
    if not _METRIC.search(text):
        raise ConfigurationError(
            f"--metrics-url {shown}: these are no metrics of a Triton, which has them at its port 8002 by "
            f"default: http://triton:8002/metrics"
        )
    found: dict[str, float] = {}
    for kind, value in _UTILIZATION.findall(text):
        found[kind] = max(found.get(kind, 0.0), float(value))
    return found
