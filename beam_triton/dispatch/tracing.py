"""W3C trace context on requests, and a span for each of them, where OpenTelemetry is in use.

OpenTelemetry is imported only where the application has imported it already, or has asked for tracing. A span
is a request with all its attempts, from its slot to its outcome; its name and attributes are those of HTTP
clients, and of the conventions for models where HTTP has none.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.errors import InferenceError

if TYPE_CHECKING:
    from beam_triton.dispatch.call import Call

_SCOPE = "beam_triton"

TraceHeaders = tuple[tuple[str, str], ...]


class RequestTracer:
    """Starts and ends the spans of one dispatcher, on its thread; a dispatcher without tracing has none.

    Args:
        tracing: ``True`` traces every request, ``None`` those that are sent in a span of the application's.
        model_name: of the model that the requests are for.
    """

    def __init__(self, tracing: bool | None, model_name: str) -> None:
        self._tracing = tracing
        self._model_name = model_name
        self._spans: dict[Call, Any] = {}

    def traced(self, request: HttpRequest) -> tuple[HttpRequest, Any]:
        """``request`` with trace context, and its span if there is one, which `watch` takes."""
        trace = _opentelemetry(self._tracing)
        if trace is None:
            return request._replace(trace_headers=trace_headers(self._tracing)), None
        if not (self._tracing or _has_context(trace)):
            return request, None
        span = trace.get_tracer(_SCOPE).start_span(
            f"{request.method} {self._model_name}",
            kind=trace.SpanKind.CLIENT,
            attributes={
                "http.request.method": request.method,
                "http.request.body.size": request.content_length,
                "gen_ai.request.model": self._model_name,
                "beam_triton.batch_size": request.rows,
                "beam_triton.request_id": request.request_id,
            },
        )
        headers = _injected(trace.set_span_in_context(span)) or trace_headers(self._tracing)
        return request._replace(trace_headers=headers), span

    def watch(self, call: Call, span: Any) -> None:
        """End ``span`` with ``call``."""
        self._spans[call] = span

    def end(self, call: Call) -> None:
        """Write what became of a call on its span, and end it."""
        span = self._spans.pop(call, None)
        if span is None:
            return
        if span.is_recording():
            self._describe(span, call)
        span.end()

    def end_all(self) -> None:
        """End the spans of calls that were given up."""
        for span in self._spans.values():
            span.set_attribute("error.type", "cancelled")
            span.end()
        self._spans.clear()

    def _describe(self, span: Any, call: Call) -> None:
        attributes: dict[str, str | int] = {"beam_triton.attempts": call.record.attempts}
        if call.record.attempts > 1:
            attributes["http.request.resend_count"] = call.record.attempts - 1
        url = None if call.endpoint is None else call.endpoint.url
        if url is not None:
            attributes["server.address"], attributes["server.port"] = url.origin.host, url.origin.port
            # Without the query, which an auth may add.
            attributes["url.full"] = (
                url.origin.url + url.translate(call.request.method, call.request.path).target
            )
        error = call.error
        if error is None:
            attributes["http.response.status_code"] = 200
        else:
            attributes["error.type"] = type(error).__name__
            if isinstance(error, InferenceError) and error.status is not None:
                attributes["http.response.status_code"] = error.status
            # The application has imported it, or there would be no span.
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR, error.message)
        span.set_attributes(attributes)


def trace_headers(tracing: bool | None) -> TraceHeaders:
    """The header fields of the current context; of a new trace, with ``tracing``, where there is none."""
    if tracing is False:
        return ()
    trace = _opentelemetry(tracing)
    if trace is not None and _has_context(trace):
        return _injected(None)
    if not tracing:
        return ()
    # A trace's first span, recorded by the server alone.
    return (("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"),)


def _opentelemetry(tracing: bool | None) -> ModuleType | None:
    module = sys.modules.get("opentelemetry.trace")
    if module is None and tracing:
        try:
            import opentelemetry.trace as module
        except ImportError:
            return None
    return module


def _has_context(trace: ModuleType) -> bool:
    return bool(trace.get_current_span().get_span_context().is_valid)


def _injected(context: Any) -> TraceHeaders:
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return _valid(tuple(carrier.items()))


def _valid(headers: Sequence[tuple[str, str]]) -> TraceHeaders:
    """Those that HTTP allows: a propagator of the application's may write any text."""
    return tuple((name, value) for name, value in headers if value.isascii() and value.isprintable())
