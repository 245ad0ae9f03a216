"""What a Triton counts while it is measured: how long requests waited, and how long executions took."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException

from beam_triton.client import TritonClient
from beam_triton.credentials import redact_url
from beam_triton.dispatch.server_statistics import counts_of
from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.policy.server_times import ServerCounts

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

    @classmethod
    def between(cls, before: ServerCounts, after: ServerCounts) -> ServerSide | None:
        """What happened in between; None if nothing did, or the two are not of one server."""
        found = after.since(before)
        if found.requests <= 0 or found.executions <= 0 or found.busy_ns <= 0:
            return None
        return cls(
            found.at,
            found.requests,
            found.elements,
            found.executions,
            found.queue_ns / 1e9,
            found.busy_ns / 1e9,
        )

    @property
    def queue_a_request(self) -> float:
        return self.queue_seconds / self.requests

    @property
    def compute_an_execution(self) -> float:
        return self.compute_seconds / self.executions

    def busy_share(self, instances: int) -> float:
        """The share of the time that an instance spent executing."""
        return self.compute_seconds / (self.seconds * instances)


def read_counts(client: TritonClient, model_name: str, clock: Callable[[], float]) -> ServerCounts | None:
    """The counts of the model's versions together; None where the server keeps none."""
    try:
        versions = client.statistics(model_name)["model_stats"]
        return counts_of(versions)._replace(at=clock())
    except (TritonError, LookupError, TypeError, ValueError, AttributeError):
        return None


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
