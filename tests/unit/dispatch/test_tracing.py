"""Trace context and spans, by OpenTelemetry's own SDK and its exporter into memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from beam_triton import ServerUnavailableError, TritonClient
from beam_triton.testing import FakeModel, FakeTriton

X = np.arange(12, dtype=np.float32).reshape(3, 4)
ECHO = FakeModel(lambda given: {"y": given["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])})
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0[13]")
_EXPORTER = InMemorySpanExporter()


@pytest.fixture(scope="module", autouse=True)
def provider() -> None:
    """OpenTelemetry takes one provider for the life of a process."""
    tracer_provider = TracerProvider()
    tracer_provider.add_span_processor(SimpleSpanProcessor(_EXPORTER))
    trace.set_tracer_provider(tracer_provider)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    _EXPORTER.clear()
    return _EXPORTER


@pytest.fixture(scope="module")
def triton() -> Iterator[FakeTriton]:
    with FakeTriton({"echo": ECHO}) as server:
        yield server


def infer(triton: FakeTriton, **options: Any) -> dict[str, str]:
    """The header fields of an inference, and of its last attempt where there are several."""
    retry = {"initial_backoff_seconds": 0.01, "max_retries": 2}
    with TritonClient(triton.endpoint, retry=retry, circuit_breaker=None, **options) as client:
        client.infer("echo", {"x": X}, request_id="the-id")
    return {name.lower(): value for name, value in triton.requests[-1].headers.items()}


def own_span(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = [each for each in spans.get_finished_spans() if each.kind is SpanKind.CLIENT]
    return span


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_request_continues_the_current_trace(triton: FakeTriton, spans: InMemorySpanExporter) -> None:
    """Its span is a child of the application's, and the server gets the request's own span."""
    with trace.get_tracer("application").start_as_current_span("bundle") as parent:
        sent = infer(triton)
    span = own_span(spans)
    match = TRACEPARENT.fullmatch(sent["traceparent"])
    assert match is not None and span.context is not None and span.parent is not None
    assert int(match[1], 16) == span.context.trace_id == parent.get_span_context().trace_id
    assert int(match[2], 16) == span.context.span_id
    assert span.parent.span_id == parent.get_span_context().span_id
    port = int(triton.endpoint.rpartition(":")[2])
    attributes = attributes_of(span)
    assert attributes.pop("http.request.body.size") > X.nbytes
    assert span.name == "POST echo" and attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": port,
        "url.full": f"{triton.endpoint}/v2/models/echo/infer",
        "gen_ai.request.model": "echo",
        "beam_triton.batch_size": 3,
        "beam_triton.attempts": 1,
        "beam_triton.request_id": "the-id",
    }


def test_without_a_current_span_nothing_is_sent(triton: FakeTriton, spans: InMemorySpanExporter) -> None:
    """OpenTelemetry may be there for something else."""
    assert "traceparent" not in infer(triton)
    assert not spans.get_finished_spans()


def test_tracing_begins_traces(triton: FakeTriton, spans: InMemorySpanExporter) -> None:
    """Each request without a parent has a trace of its own."""
    first, second = (infer(triton, tracing=True)["traceparent"] for _ in range(2))
    assert TRACEPARENT.fullmatch(first) and TRACEPARENT.fullmatch(second) and first[:35] != second[:35]
    assert len(spans.get_finished_spans()) == 2


@pytest.mark.parametrize("options", [{"tracing": False}, {"headers": {"Traceparent": "mine"}}])
def test_tracing_can_be_switched_off(
    triton: FakeTriton, spans: InMemorySpanExporter, options: dict[str, Any]
) -> None:
    """By the option, or by a header of the user's, which is sent as it is."""
    with trace.get_tracer("application").start_as_current_span("bundle"):
        sent = infer(triton, **options)
    assert sent.get("traceparent") == ("mine" if "headers" in options else None)
    assert [span.name for span in spans.get_finished_spans()] == ["bundle"]


def test_attempts_are_one_span(triton: FakeTriton, spans: InMemorySpanExporter) -> None:
    """All of them carry its context."""
    triton.fail_next(2, status=503)
    infer(triton, tracing=True)
    attributes = attributes_of(own_span(spans))
    assert attributes["beam_triton.attempts"] == 3 and attributes["http.request.resend_count"] == 2
    assert len({request.headers["traceparent"] for request in triton.requests[-3:]}) == 1


def test_failure_is_on_the_span(triton: FakeTriton, spans: InMemorySpanExporter) -> None:
    """Kind, status and message."""
    triton.fail_next(3, status=503)
    with pytest.raises(ServerUnavailableError):
        infer(triton, tracing=True)
    span = own_span(spans)
    attributes = attributes_of(span)
    assert span.status.status_code is StatusCode.ERROR and "503" in str(span.status.description)
    assert attributes["error.type"] == "ServerUnavailableError"
    assert attributes["http.response.status_code"] == 503


def test_hook_sees_the_trace_context(triton: FakeTriton, spans: InMemorySpanExporter) -> None:
    """A signature may cover it."""
    seen: list[str] = []

    def auth(method: str, url: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        seen.append(headers.get("traceparent", ""))
        return {}

    sent = infer(triton, tracing=True, auth=auth)
    assert seen[-1] == sent["traceparent"] and all(map(TRACEPARENT.fullmatch, seen))


WITHOUT_OPENTELEMETRY = """
import sys
sys.modules["opentelemetry"] = None
import numpy as np
from beam_triton import TritonClient
for tracing in (None, True):
    with TritonClient(sys.argv[1], tracing=tracing) as client:
        client.infer("echo", {"x": np.zeros((3, 4), np.float32)})
"""


def test_without_opentelemetry_the_context_is_sent_all_the_same(triton: FakeTriton) -> None:
    """With ``tracing=True``; else there is none."""
    before = len(triton.requests)
    subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENTELEMETRY, triton.endpoint], check=True, env=dict(os.environ)
    )
    first, second = triton.requests[before:]
    assert "traceparent" not in first.headers and TRACEPARENT.fullmatch(second.headers["traceparent"])
