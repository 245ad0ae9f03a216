"""What this process's requests do, for `watch`; where nobody watches, a request looks at an empty tuple."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import NamedTuple

from beam_triton.dispatch.call import Call
from beam_triton.errors import TritonError


class EndedRequest(NamedTuple):
    """One that has an answer or an error.

    Attributes:
        elements: those that it has answered; 0 where it failed.
        batch_size: of the HTTP request; 0 where another one has carried the elements.
        latency_seconds: 0 where there was no answer.
        retries: attempts beyond the first.
        request_bytes, response_bytes: of the bodies.
    """

    elements: int
    batch_size: int
    latency_seconds: float
    retries: int
    request_bytes: int
    response_bytes: int


class FailedElements(NamedTuple):
    """So many elements failed for good, for one reason."""

    elements: int
    kind: str
    message: str


class OpenedModel(NamedTuple):
    """A model that scores elements from now on, with the options that are not the defaults, no secrets."""

    name: str
    description: str
    settings: dict[str, str]


Event = EndedRequest | FailedElements | OpenedModel


class Activity:
    """Hands events to any number of watchers; thread-safe.

    Attributes:
        watchers: each takes its events out of its own deque. Code with an event looks first whether the tuple
            is empty, which costs no call.
    """

    def __init__(self) -> None:
        self.watchers: tuple[deque[Event], ...] = ()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            # The thread that would empty the deque stays in the parent.
            os.register_at_fork(after_in_child=self._forget_all)

    def watch(self) -> deque[Event]:
        """A new deque, which gets every event until `unwatch`."""
        events: deque[Event] = deque()
        with self._lock:
            self.watchers = (*self.watchers, events)
        return events

    def unwatch(self, events: deque[Event]) -> None:
        with self._lock:
            self.watchers = tuple(each for each in self.watchers if each is not events)

    def tell(self, event: Event) -> None:
        for events in self.watchers:
            events.append(event)

    def ended(self, call: Call) -> None:
        """Tell of a request that has ended."""
        record, rows = call.record, call.request.rows
        if record.has_joined:
            # Its elements are its own, and its request is the other's.
            event = EndedRequest(rows, 0, 0.0, 0, 0, 0)
        else:
            event = EndedRequest(
                rows - record.joined_rows if call.error is None else 0,
                rows,
                record.latency_seconds if record.response_bytes else 0.0,
                record.retries,
                record.request_bytes,
                record.response_bytes,
            )
        for events in self.watchers:
            events.append(event)

    def failed(self, error: TritonError, count: int = 1) -> None:
        """Tell of elements that failed for good."""
        if self.watchers:
            self.tell(FailedElements(count, type(error).__name__, error.message))

    def _forget_all(self) -> None:
        self._lock = threading.Lock()
        self.watchers = ()


ACTIVITY = Activity()
