"""Many calls in flight for one owner, on the owner's thread."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from beam_triton.dispatch.call import Call
from beam_triton.dispatch.call_context import CallContext
from beam_triton.dispatch.call_options import CallKind
from beam_triton.dispatch.channel import Channel
from beam_triton.dispatch.health import start_health_checks
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.dispatch.slots import QueueEntry
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.reactor import Reactor, current_reactor

_POLL_AGAIN_SECONDS = 0.25

T = TypeVar("T")


class Dispatcher(Generic[T]):
    """Keeps requests in flight; each has a ``token`` by which its owner knows it again.

    Made and used on one thread, for one bundle. Nothing moves but in `submit`, `step` and `drain`.

    Attributes:
        completed: calls that have ended, with their tokens, in order of their ends; the owner
            takes them out.
        throttled_seconds: time spent waiting while some call was held back by an overloaded or
            sick server.
    """

    def __init__(self, channel: Channel) -> None:
        self.completed: deque[tuple[T, Call[Any]]] = deque()
        self.throttled_seconds = 0.0
        self._endpoints = channel.endpoints
        self._reactor: Reactor = current_reactor()
        self._context = CallContext(
            self._reactor,
            channel.pool,
            channel.endpoints,
            channel.head_writer,
            channel.options,
        )
        self._calls: set[Call[Any]] = set()
        self._waits_for_slot = False

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    def submit(
        self,
        token: T,
        request: HttpRequest,
        read: Callable[[Exchange], Any],
        *,
        kind: CallKind = CallKind.SINGLE,
        is_sequence: bool = False,
    ) -> None:
        """Send a request; waits while the process has ``max_concurrent_requests`` in flight.

        One of several times ``slot_bytes`` counts for as many.
        """
        slots = max(1, request.content_length // self._context.options.slot_bytes)
        if self._endpoints.any_breaker_open:
            # Where nobody waits for them (others are well, or requests fail at once), nobody else would ask.
            start_health_checks(self._context)
        self._take_slots(slots)
        call: Call[Any] = Call(self._context, token, request, read, self._on_done, kind, is_sequence, slots)
        self._calls.add(call)
        call.start()

    def step(self) -> None:
        """Move what can be moved without waiting."""
        if self._calls:
            self._reactor.step(0.0)

    def wait(self) -> None:
        """Move, and wait until something of this reactor happens."""
        self._wait_once()

    def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self._calls:
            self._wait_once()

    def cancel(self) -> None:
        """Let go of everything in flight: connections are closed, slots given back. A second call does
        nothing."""
        for call in list(self._calls):
            call.cancel()
            self._endpoints.give_slots_back(call.slots)
        self._calls.clear()
        self.completed.clear()

    def _on_done(self, call: Call[Any]) -> None:
        self._calls.discard(call)
        self._endpoints.give_slots_back(call.slots)
        self.completed.append((call.token, call))

    def _take_slots(self, count: int) -> None:
        endpoints = self._endpoints
        if endpoints.try_take_slots(count):
            return
        waiter = QueueEntry(endpoints.waiting_for_slot, self._reactor, _poll_again)
        self._waits_for_slot = True
        try:
            while not endpoints.try_take_slots(count):
                if not waiter.wait():
                    self._wait_once()
        finally:
            self._waits_for_slot = False
            waiter.stop()

    def _wait_once(self) -> None:
        throttled = any(call.is_throttled for call in self._calls)
        started = time.monotonic()
        self._reactor.step(started + _POLL_AGAIN_SECONDS if self._waits_for_slot else math.inf)
        if throttled:
            self.throttled_seconds += time.monotonic() - started


def _poll_again() -> None:
    """The wake-up itself has ended the wait."""
