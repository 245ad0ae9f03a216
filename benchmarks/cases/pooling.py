"""The gain of reusing connections, through TLS: the library's defaults beside ``reuse_enabled=False``."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, CaseLeftOut, Scale, take_turns
from benchmarks.peers import BEAM_TRITON
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO
from benchmarks.workload import Target, Workload
from tests.support.certificates import Certificates
from tests.support.nginx import Nginx, nginx_binary

_LATENCY, _RATE = "p50 ms", "requests/s"
_POOLED, _FRESH = "pooled", "reuse_enabled=False"


def _pooling(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """One row a request: from the client alone, one at a time, and from a pipeline with many in flight."""
    if nginx_binary() is None:
        raise CaseLeftOut("nginx is not installed (Debian: apt-get install nginx-light)")
    port = int(server.endpoint.rpartition(":")[2])
    requests = {_POOLED: scale.count(10_000, least=50), _FRESH: scale.count(2_000, least=50)}
    with tempfile.TemporaryDirectory() as folder:
        certificates = Certificates(Path(folder))
        with Nginx([port], certificate=certificates.good, requests_per_connection=1_000_000) as nginx:
            measures = {}
            for name, count in requests.items():
                options = {
                    "tls": {"ca_bundle": str(certificates.ca)},
                    "pool": {"reuse_enabled": name == _POOLED},
                }
                measures[name] = partial(run_in_fresh_process, _measure, nginx.endpoint, options, count)
            taken = take_turns(rounds, measures)
    values = {
        name: {quantity: [run[quantity] for run in runs] for quantity in (_LATENCY, _RATE)}
        for name, runs in taken.items()
    }
    latency = ratios(values[_POOLED][_LATENCY], values[_FRESH][_LATENCY])
    rate = ratios(values[_POOLED][_RATE], values[_FRESH][_RATE])
    figures = [
        Figure.of_rounds(f"p50 relative to {_FRESH}", "at most", 0.5, latency),
        Figure.of_rounds(f"requests/s relative to {_FRESH}", "at least", 3.0, rate),
    ]
    rows = [Row.of(name, measured) for name, measured in values.items()]
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


def _measure(endpoint: str, options: Mapping[str, Any], requests: int) -> dict[str, float]:
    latency_seconds = _median_latency_seconds(endpoint, options, requests // 5)
    work = Workload(Target(endpoint, "", ECHO), requests, batch_size=1, options=options)
    return {_LATENCY: 1000 * latency_seconds, _RATE: BEAM_TRITON.score(work).elements_per_second}


def _median_latency_seconds(endpoint: str, options: Mapping[str, Any], requests: int) -> float:
    x = np.arange(128, dtype=np.float32)[None]
    latencies = []
    with TritonClient(endpoint, **options) as client:
        client.infer(ECHO, {"x": x})
        for _ in range(requests):
            before = time.perf_counter()
            answer = client.infer(ECHO, {"x": x})
            latencies.append(time.perf_counter() - before)
            if not np.array_equal(answer.outputs["y"], x):
                raise AssertionError("an answer differs from what the request sent")
    return statistics.median(latencies)


CASE = Case("pooling", "Connections reused, or opened for each request, through TLS", _pooling)
