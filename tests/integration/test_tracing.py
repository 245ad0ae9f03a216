"""The real Triton continues a trace: what it exports holds the pipeline's trace and the request's span."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.testing.test_pipeline import TestPipeline

from beam_triton import TritonInference
from tests.support.answers import Answer, Request, always, forward_to
from tests.support.fault_server import FaultServer
from tests.support.models import throwaway_triton, write_models


def spans_of(request: Request) -> Iterator[dict[str, Any]]:
    """The spans of an export as JSON."""
    if request.body:
        for resource in json.loads(request.body)["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                yield from scope["spans"]


def test_triton_continues_the_trace_of_a_request(tmp_path: Path) -> None:
    """It exports spans of the trace to a collector, here one that keeps what it is sent."""
    repository = write_models(tmp_path, ["echo"])
    with (
        FaultServer(always(Answer())) as collector,
        throwaway_triton(
            repository,
            extra_args=[
                "--trace-config=mode=opentelemetry",
                "--trace-config=rate=0",
                "--trace-config=level=TIMESTAMPS",
                f"--trace-config=opentelemetry,url={collector.endpoint}/v1/traces",
                "--trace-config=opentelemetry,bsp_schedule_delay=200",
            ],
        ) as triton,
        FaultServer(forward_to(int(triton.endpoint.rpartition(":")[2]))) as front,
    ):
        with TestPipeline() as pipeline:
            elements = pipeline | beam.Create([np.zeros(128, np.float32)] * 4)
            _ = elements | TritonInference(front.endpoint, "echo", tracing=True)
        sent = [request.header("traceparent") for request in front.requests if "/infer" in request.target]
        trace_ids, span_ids = zip(*(header.split("-")[1:3] for header in sent), strict=True)
        until = time.monotonic() + 20
        exported: list[dict[str, Any]] = []
        while time.monotonic() < until and not exported:
            time.sleep(0.1)
            exported = [span for request in list(collector.requests) for span in spans_of(request)]
    assert {span["traceId"] for span in exported} == set(trace_ids)
    assert {span["parentSpanId"] for span in exported} >= set(span_ids)
    assert any(span["name"] == "InferRequest" for span in exported)
