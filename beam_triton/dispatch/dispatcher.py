"""Many calls in flight for one owner, on the owner's thread."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from beam_triton.dispatch.activity import ACTIVITY
from beam_triton.dispatch.call import Call, CallRecord, Phase
from beam_triton.dispatch.channel import Channel
from beam_triton.dispatch.endpoints import Endpoint
from beam_triton.dispatch.health import start_health_checks
from beam_triton.dispatch.joint_requests import Joinable
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.dispatch.slots import POLL_AGAIN_SECONDS
from beam_triton.dispatch.tracing import RequestTracer
from beam_triton.policy.retry import CERTAIN
from beam_triton.transport.event_stream import StreamLimits
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.reactor import current_reactor

T = TypeVar("T")


class Dispatcher(Generic[T]):
    """Keeps requests in flight; each has a ``token`` by which its owner recognises it.

    Made and used on one thread, for one bundle. Requests progress only in `submit`, `step`, `wait`, `drain`.

    Attributes:
        completed: calls that have ended, with their tokens, in the order of their ends; the owner removes
            them.
        throttled_seconds: time spent waiting while some call was held by an overloaded or unhealthy server.
        slot_seconds: time spent waiting for a slot.
    """

    def __init__(self, channel: Channel) -> None:
        self.completed: deque[tuple[T, Call]] = deque()
        self.throttled_seconds = 0.0
        self.slot_seconds = 0.0
        self._context = channel.context(current_reactor())
        self._slots = self._context.endpoints.slots
        self._taken_slots = 0
        self._calls: set[Call] = set()
        tracing = self._context.options.tracing
        self._tracer = self._new_tracer() if tracing else None
        # Imported by the application, or by Beam: no reason for a tracer until a span is current.
        self._opentelemetry = sys.modules.get("opentelemetry.trace") if tracing is None else None

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    def submit(
        self,
        token: T,
        request: HttpRequest,
        read: Callable[[Exchange], Any],
        *,
        is_batch: bool = False,
        is_sequence: bool = False,
        suspicion: int = CERTAIN,
        lost_at: float = math.inf,
        joinable: Joinable | None = None,
        stream_limits: StreamLimits | None = None,
        pinned: Endpoint | None = None,
        starts_sequence: bool = False,
        may_be_blameless: bool = False,
        takes_slots: bool = True,
    ) -> None:
        """Send a request; waits while the process has ``max_concurrent_requests`` in flight.

        A request of several times ``slot_bytes`` counts for as many. The arguments are those of `Call`. By
        default a request whose deadline passes without a queue in the server to explain it fails; with less
        ``suspicion`` it is sent again. With ``takes_slots=False`` it is sent within a slot of `take_slot`.
        """
        slots = max(1, request.content_length // self._context.options.slot_bytes) if takes_slots else 0
        if self._context.endpoints.any_breaker_open:
            # Nothing else checks them unless a request waits: others are healthy, or requests fail at once.
            start_health_checks(self._context)
        if slots and not self._slots.try_take(slots):
            waited_seconds = self._context.reactor.waited_seconds
            self._slots.take(
                slots, self._context.reactor, lambda: self._wait_until(time.monotonic() + POLL_AGAIN_SECONDS)
            )
            self.slot_seconds += self._context.reactor.waited_seconds - waited_seconds
        span = None
        opentelemetry = self._opentelemetry
        if opentelemetry is not None and opentelemetry.get_current_span() is not opentelemetry.INVALID_SPAN:
            self._tracer = self._tracer or self._new_tracer()
        if self._tracer is not None:
            request, span = self._tracer.traced(request)
        call = Call(
            self._context,
            token,
            request,
            read,
            self._on_done,
            CallRecord(request.content_length),
            slots=slots,
            is_batch=is_batch,
            is_sequence=is_sequence,
            suspicion=suspicion,
            lost_at=lost_at,
            joinable=joinable,
            stream_limits=stream_limits,
            pinned=pinned,
            starts_sequence=starts_sequence,
            may_be_blameless=may_be_blameless,
        )
        self._calls.add(call)
        if span is not None and self._tracer is not None:
            self._tracer.watch(call, span)
        call.start()

    def take_slot(self, meanwhile: Callable[[], None]) -> None:
        """Take a slot for requests that follow one another; waits until there is one.

        ``meanwhile`` is called over and over, as the caller's own requests may have to go on for that.
        """

        def wait() -> None:
            self._wait_until(time.monotonic() + POLL_AGAIN_SECONDS)
            meanwhile()

        waited_seconds = self._context.reactor.waited_seconds
        self._slots.take(1, self._context.reactor, wait)
        self.slot_seconds += self._context.reactor.waited_seconds - waited_seconds
        self._taken_slots += 1

    def release_slot(self) -> None:
        """Give a slot of `take_slot` back."""
        self._taken_slots -= 1
        self._slots.release(1)

    def step(self) -> None:
        """Do what can be done without waiting."""
        if self._calls:
            self._context.reactor.step(0.0)

    def wait(self, latest: float = math.inf) -> None:
        """Do what can be done, and wait until something happens on this reactor, at most until ``latest``."""
        self._wait_until(latest)

    def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self._calls:
            self.wait()

    def cancel_unsent(self) -> None:
        """Abandon what waits for an endpoint, and leave alone what has been sent."""
        for call in [each for each in self._calls if each.phase is Phase.QUEUED]:
            call.cancel()
            self._calls.discard(call)
            self._slots.release(call.slots)

    def cancel(self) -> None:
        """Abandon everything in flight: close its connections, release its slots. May be called twice."""
        for call in list(self._calls):
            call.cancel()
            self._slots.release(call.slots)
        self._calls.clear()
        taken, self._taken_slots = self._taken_slots, 0
        self._slots.release(taken)
        self.completed.clear()
        if self._tracer is not None:
            self._tracer.end_all()

    def _new_tracer(self) -> RequestTracer:
        return RequestTracer(self._context.options.tracing, self._context.endpoints.model_name)

    def _on_done(self, call: Call) -> None:
        self._calls.discard(call)
        self._slots.release(call.slots)
        if self._tracer is not None:
            self._tracer.end(call)
        if ACTIVITY.watchers:
            ACTIVITY.ended(call)
        self.completed.append((call.token, call))

    def _wait_until(self, latest: float) -> None:
        throttled = any(call.is_throttled for call in self._calls)
        started = time.monotonic()
        self._context.reactor.step(latest)
        if throttled:
            self.throttled_seconds += time.monotonic() - started
