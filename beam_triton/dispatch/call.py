"""One request in flight: attempts at one endpoint after another until an answer or a final error.

::

    NEW ──▶ QUEUED ──▶ SENDING ──▶ answer ────────────▶ DONE
              ▲ ▲         │ error
              │ │         ├─ Resend ─▶ SENDING            same admission, no retry counted
              │ │         ├─ Retry ──▶ BACKING_OFF ─┐     within the deadline
              │ └─────────│─────────────────────────┘
              │           ├─ Hold ───▶ HELD ────────┐     outside the deadline
              └───────────│─────────────────────────┘
                          └─ Fail ────────────────────▶ DONE

QUEUED is waiting for an admission. `beam_triton.policy.retry.next_step` chooses the step; this file carries
it out. The deadline runs from the first attempt's start. Time in which a request is held, for an unhealthy or
overloaded server or one that named a time to come back, is outside it and bounded by ``max_wait_seconds`` of
the breaker's policy; where that policy does not wait, it is inside.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Any

from beam_triton.dispatch.channel import CallContext
from beam_triton.dispatch.endpoints import Admission, Endpoint, Refusal
from beam_triton.dispatch.health import start_health_checks
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.dispatch.slots import POLL_AGAIN_SECONDS, QueueEntry
from beam_triton.errors import (
    DeadlineExceededError,
    InferenceError,
    ModelExecutionError,
    RemoteProtocolError,
    TritonError,
    without_frames,
)
from beam_triton.policy.retry import Fail, History, Limits, Resend, Retry, next_step
from beam_triton.transport.attempt import Attempt
from beam_triton.transport.exchange import Exchange

_logger = logging.getLogger(__name__)


class Phase(Enum):
    """The states of a call; the picture above shows the changes between them."""

    NEW = "new"
    QUEUED = "queued"
    SENDING = "sending"
    BACKING_OFF = "backing off"
    HELD = "held"
    DONE = "done"


@dataclass
class CallRecord:
    """What happened to a call, for metrics: plain counts, written on the reactor's thread."""

    request_bytes: int = 0
    attempts: int = 0
    retries: int = 0
    connections_opened: int = 0
    connections_reused: int = 0
    connection_waits: int = 0
    response_bytes: int = 0
    latency_seconds: float = 0.0


class _CallState:
    """What changes while a call is in flight; one that succeeds at the first attempt assigns little of it."""

    phase = Phase.NEW
    wake_at = math.inf
    result: Any = None
    error: TritonError | None = None
    is_throttled = False
    _history = History()
    _tried: tuple[Endpoint, ...] = ()
    _reported: tuple[Endpoint, ...] = ()
    _admission: Admission | None = None
    _attempt: Attempt | None = None
    _sent_at = 0.0
    _deadline = math.inf
    _hold_until = math.inf
    _owes_budget = False
    _has_reread_credentials = False
    # Made when it is needed and dropped after: it refers back to this call.
    _queue_entry: QueueEntry | None = None


@dataclass(eq=False, repr=False)
class Call(_CallState):
    """A request in flight, from `start` until ``on_done``.

    Args:
        context: what it shares with the other calls of its bundle.
        token: by which the owner recognises this call.
        read: turns the answer into the result; what it raises is this attempt's error.
        on_done: called on the reactor's thread, exactly once, with ``result`` or ``error`` set.
        slots: how many the owner has taken for it.
        is_batch: it holds several elements, one of which may have made the model raise: a plain 500 says
            nothing about the server's health.
        repeats_server_errors: a plain 500 may be retried, as the policy allows.
        is_sequence: the model would see a repeated request twice: nothing that may have run is repeated.
    """

    context: CallContext
    token: Any
    request: HttpRequest
    read: Callable[[Exchange], Any]
    on_done: Callable[[Call], None]
    record: CallRecord
    _: KW_ONLY
    slots: int
    is_batch: bool
    repeats_server_errors: bool
    is_sequence: bool

    def start(self) -> None:
        """Ask for an admission, and send; called again whenever there may be one."""
        endpoints = self.context.endpoints
        admission = endpoints.admit(self._tried)
        if isinstance(admission, Refusal) and self._join_queue():
            admission = endpoints.admit(self._tried)
        if isinstance(admission, Refusal):
            self._wait_for_admission(admission)
            return
        if self._queue_entry is not None:
            self._leave_queue()
        now = time.monotonic()
        if self._owes_budget and not self._spend_budget(admission, now):
            return
        self.is_throttled = False
        self._admission = admission
        if self._deadline == math.inf:
            self._deadline = now + self.context.options.timeout_seconds
        if not self.record.attempts:
            admission.endpoint.retry_budget.record_request()
        self._send(admission, now)

    def _wait_for_admission(self, refusal: Refusal) -> None:
        now = time.monotonic()
        endpoints, options = self.context.endpoints, self.context.options
        open_seconds, max_hold_seconds = refusal.open_seconds, endpoints.max_hold_seconds
        wait = POLL_AGAIN_SECONDS
        if open_seconds is None and not max_hold_seconds:
            self._deadline = min(self._deadline, now + options.timeout_seconds)
        else:
            self._hold_until = min(self._hold_until, now + max_hold_seconds)
            if now >= self._hold_until:
                self._finish_with(endpoints.refusal_error(open_seconds, max_hold_seconds))
                return
        if open_seconds is not None:
            # Outside the deadline: nothing has been sent that could be late.
            self._start_over(for_overload=False)
            start_health_checks(self.context)
            wait = min(max(open_seconds, 0.01), wait)
        self._wait(Phase.QUEUED, min(now + wait, self._hold_until, self._deadline), throttled=True)

    def _join_queue(self) -> bool:
        if self._queue_entry is None:
            self._queue_entry = QueueEntry(
                self.context.endpoints.waiting_for_admission, self.context.reactor, self._on_admission_free
            )
        return self._queue_entry.join()

    def _on_admission_free(self) -> None:
        self.wake_at = 0.0

    def _leave_queue(self) -> None:
        entry, self._queue_entry = self._queue_entry, None
        if entry is not None:
            entry.leave()

    def _spend_budget(self, admission: Admission, now: float) -> bool:
        """Spend a retry of the admitted endpoint's budget, or give the admission back and wait for one."""
        if admission.endpoint.retry_budget.try_spend():
            self._owes_budget = False
            return True
        admission.end(None)
        wake_at = min(now + POLL_AGAIN_SECONDS, self._deadline)
        self._wait(Phase.BACKING_OFF, wake_at, throttled=self.is_throttled)
        return False

    def _send(self, admission: Admission, now: float) -> None:
        self.phase = Phase.SENDING
        self.record.attempts += 1
        endpoints, options = self.context.endpoints, self.context.options
        url = admission.endpoint.url
        timeout_seconds = options.timeout_seconds
        if len(endpoints.endpoints) > 1 and not self.is_sequence:
            tried = (*self._tried, admission.endpoint)
            timeout_seconds = endpoints.attempt_seconds(timeout_seconds, self._deadline - now, tried)
        try:
            parts = self.context.head_writer.parts(url, self.request)
        except TritonError as error:
            # A secret that cannot be read.
            self._finish_with(error)
            return
        self._sent_at = now
        self._attempt = attempt = Attempt(
            self.context.reactor,
            self.context.pool,
            url.origin,
            parts,
            self._on_attempt_end,
            deadline=min(self._deadline, now + timeout_seconds),
            timeout_seconds=timeout_seconds,
            max_response_bytes=options.max_response_bytes,
        )
        attempt.start()

    def _on_attempt_end(self, attempt: Attempt) -> None:
        self._attempt = None
        now = time.monotonic()
        record, error = self.record, attempt.error
        record.connections_reused += attempt.has_reused
        record.connections_opened += attempt.has_opened
        record.connection_waits += attempt.has_waited
        if error is None:
            assert attempt.exchange is not None
            record.latency_seconds = now - self._sent_at
            record.response_bytes = len(attempt.exchange.body)
            try:
                self.result = self.read(attempt.exchange)
            except TritonError as caught:
                error = caught
            except Exception as caught:
                # An exception that left this frame would end every other call of this reactor.
                error = RemoteProtocolError(f"the answer cannot be read: {type(caught).__name__}: {caught}")
            else:
                self._succeed()
                return
        self._fail(attempt, error, now)

    def _succeed(self) -> None:
        admission, self._admission = self._admission, None
        assert admission is not None
        admission.endpoint.limit.on_success(self.record.latency_seconds)
        errors = self._history.errors
        if errors:
            _logger.info(
                "%s answered after %d failed attempt(s), the last one: %s",
                admission.endpoint.url,
                len(errors),
                errors[-1].message,
            )
        admission.end(True)
        self._finish()

    def _fail(self, attempt: Attempt, error: TritonError, now: float) -> None:
        assert self._admission is not None
        endpoint = self._admission.endpoint
        without_frames(error)
        if error.is_overload or isinstance(error, DeadlineExceededError):
            endpoint.limit.on_overload(now - self._sent_at)
        self._report_failure(endpoint, error)
        has_new_credentials = False
        is_refused = isinstance(error, InferenceError) and error.status in (401, 403)
        if is_refused and not self._has_reread_credentials:
            # Once per call: credentials may change at each reading.
            self._has_reread_credentials = True
            writer = self.context.head_writer
            has_new_credentials = writer.is_outdated(endpoint.url, self.request, attempt.parts[0])
        self._follow(self._history.after(error), (*self._tried, endpoint), now, has_new_credentials)

    def _report_failure(self, endpoint: Endpoint, error: TritonError) -> None:
        """Report a failure to the breaker, once per endpoint at most, unless this is a probe.

        At once, not when the last retry has failed: when a server is down all requests back off, and only an
        open breaker checks its health and stops the deadlines.
        """
        if not error.counts_as_failure or (endpoint in self._reported and endpoint.is_healthy):
            return
        model_raised = isinstance(error, ModelExecutionError)
        if model_raised and self.is_batch:
            return
        self._reported += (endpoint,)
        # A passed deadline may be the element's doing: a model can hang on it.
        self._end_admission(False, unreachable=not (model_raised or isinstance(error, DeadlineExceededError)))

    def _follow(
        self, history: History, tried: tuple[Endpoint, ...], now: float, has_new_credentials: bool = False
    ) -> None:
        """Carry out the step that follows the last failure, be it new or one whose deadline passed since."""
        error = history.errors[-1]
        endpoints = self.context.endpoints
        step = next_step(
            endpoints.retry,
            error,
            history,
            Limits(
                remaining_seconds=self._deadline - now,
                hold_seconds=min(self._hold_until - now, endpoints.max_hold_seconds),
                max_server_error_retries=None if self.repeats_server_errors else 0,
                is_sequence=self.is_sequence,
            ),
            endpoints.view(tried, has_new_credentials=has_new_credentials),
            random.random,
        )
        if isinstance(step, Resend):
            assert self._admission is not None
            self._send(self._admission, now)
            return
        self._history, self._tried = history, tried
        # The load of a server that fails must shrink: its admission is given back during the wait.
        self._end_admission(None)
        if isinstance(step, Fail):
            self._finish_with(error)
        elif isinstance(step, Retry):
            self.record.retries += 1
            if len(set(tried)) == len(endpoints.endpoints):
                self._tried = tried[-1:]
            self._owes_budget = step.is_budgeted
            wake_at = min(now + step.after_seconds, self._deadline)
            self._wait(Phase.BACKING_OFF, wake_at, throttled=error.is_overload)
        elif step.for_overload:
            self._start_over(for_overload=True)
            self._hold_until = min(self._hold_until, now + endpoints.max_hold_seconds)
            self.record.retries += 1
            self._tried = tried[-1:]
            self._wait(Phase.HELD, now + step.after_seconds, throttled=True)
        else:
            self._start_over(for_overload=False)
            self.start()

    def _start_over(self, *, for_overload: bool) -> None:
        """The next attempt is a first one again, with a deadline of its own."""
        self._history = self._history.held(for_overload=for_overload)
        self._tried = self._reported = ()
        self._deadline = math.inf
        self._owes_budget = False

    def _wait(self, phase: Phase, wake_at: float, *, throttled: bool) -> None:
        self.phase = phase
        self.is_throttled = throttled
        self.wake_at = wake_at
        self.context.reactor.add(self)

    def on_time(self, now: float) -> None:
        self.wake_at = math.inf
        if now < self._deadline:
            self.start()
        elif self._history.errors:
            self._follow(self._history, self._tried, now)
        else:
            timeout_seconds = self.context.options.timeout_seconds
            self._finish_with(self.context.endpoints.refusal_error(None, timeout_seconds))

    def cancel(self) -> None:
        """Give up without calling ``on_done``: the bundle failed, and the answer is of no use."""
        self.phase = Phase.DONE
        self.is_throttled = False
        self.context.reactor.remove(self)
        if self._attempt is not None:
            self._attempt.cancel()
        self._leave_queue()
        self._end_admission(None)

    def _end_admission(self, healthy: bool | None, *, unreachable: bool = False) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.end(healthy, unreachable=unreachable)

    def _finish_with(self, error: TritonError) -> None:
        history = self._history
        error.attempts = tuple(each for each in history.earlier + history.errors if each is not error)
        self.error = error
        self._leave_queue()
        self._end_admission(None)
        self._finish()

    def _finish(self) -> None:
        assert self.phase is not Phase.DONE, "a call ends once"
        self.phase = Phase.DONE
        self.context.reactor.remove(self)
        # The owner holds this call, and would be held by it: a cycle with the answer's bytes in it.
        on_done = self.on_done
        del self.on_done
        on_done(self)
