"""One logical request: attempts at one endpoint after another until an answer or a final error.

::

    start ─▶ admission ─▶ attempt ─▶ answer ─────────────────────────▶ done
               ▲  │ refused: waits     │ error
               │  ▼                    ├─▶ stale connection, rotated credentials: at once, once more
               │ throttled             ├─▶ retryable: backoff, budget ─▶ admission
               │                       ├─▶ overload, breaker open, policy waits ─▶ admission, afresh
               └───────────────────────┴─▶ final ─────────────────────▶ done

The deadline runs from the first attempt's start. Time in which a request is kept back (for a server that
restarts, is overloaded, or names a time to come back) is outside it, and bounded by the breaker policy's
``max_wait_seconds``; where that policy does not wait, it is inside. This is the only place where a request
is repeated.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

from beam_triton.dispatch.call_context import CallContext
from beam_triton.dispatch.call_options import CallKind, CallRecord
from beam_triton.dispatch.endpoints import Admission, Endpoint, Refusal
from beam_triton.dispatch.health import start_health_checks
from beam_triton.dispatch.kept_back import circuit_open, at_capacity
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.dispatch.slots import QueueEntry
from beam_triton.errors import (
    ConnectError,
    DeadlineExceededError,
    InferenceError,
    ModelExecutionError,
    RemoteProtocolError,
    TlsError,
    TritonError,
    without_frames,
)
from beam_triton.policy.retry import asked_for_seconds, decide, pause_seconds
from beam_triton.transport.attempt import Attempt, ConnectionUse
from beam_triton.transport.exchange import Exchange

_logger = logging.getLogger(__name__)

# A wake-up lost to a bug must not hang a pipeline: whoever waits for others looks again after this.
_POLL_AGAIN_SECONDS = 0.25

_REFUSES_CREDENTIALS = (401, 403)

# So many times the usual latency is more than any queue makes of it: who has not answered by then will not.
_HUNG_AFTER_LATENCIES = 10

T = TypeVar("T")


class Call(Generic[T]):
    """A request in flight.

    Args:
        token: by which the owner knows this call again.
        slots: how many the owner has taken for it.
        read: turns the answer into the result; what it raises is this attempt's error.
        on_done: called on the reactor's thread, exactly once, with ``result`` or ``error`` set.
        kind: whether a failure leads to a split.
        is_sequence: the model would see a repeated request twice: nothing that may have run is
            repeated.
    """

    # Most calls succeed at the first attempt: what only the others need is theirs from then on.
    wake_at = math.inf
    result: T | None = None
    error: TritonError | None = None
    is_throttled = False
    _errors: tuple[TritonError, ...] = ()
    _earlier: tuple[TritonError, ...] = ()
    _tried: tuple[Endpoint, ...] = ()
    _told: tuple[Endpoint, ...] = ()
    _admission: Admission | None = None
    _attempt: Attempt | None = None
    _attempt_started = 0.0
    _deadline = math.inf
    _give_up_at = math.inf
    _budget_is_due = False
    _is_counted = False
    _has_reread_credentials = False
    _pauses = 0
    # Made when it is needed and dropped after: it refers back to this call.
    _waiter: QueueEntry | None = None

    def __init__(
        self,
        context: CallContext,
        token: Any,
        request: HttpRequest,
        read: Callable[[Exchange], T],
        on_done: Callable[[Call[T]], None],
        kind: CallKind,
        is_sequence: bool,
        slots: int,
    ) -> None:
        self.token = token
        self.slots = slots
        self.record = CallRecord(request.content_length)
        self._context = context
        self._request = request
        self._read = read
        self._on_done = on_done
        self._kind = kind
        self._is_sequence = is_sequence

    def start(self) -> None:
        """Ask for admission, and send."""
        self._admit()

    def cancel(self) -> None:
        """Give up without calling ``on_done``: the bundle failed, nobody wants the answer."""
        self._context.reactor.remove(self)
        if self._attempt is not None:
            self._attempt.cancel()
        self.is_throttled = False
        self._stop_waiting()
        self._settle(None)

    def on_io(self) -> None:
        raise AssertionError("a call has no socket of its own")

    def on_time(self, now: float) -> None:
        self.wake_at = math.inf
        if now < self._deadline:
            self._admit()
        elif self._errors:
            self._conclude(self._errors[-1])
        else:
            self._finish_with(at_capacity(self._context.endpoints, self._context.options.timeout_seconds))

    def _admit(self) -> None:
        admission = self._context.endpoints.admit(self._tried)
        if isinstance(admission, Refusal):
            if self._get_in_line():
                admission = self._context.endpoints.admit(self._tried)
            if isinstance(admission, Refusal):
                self._context.reactor.add(self)
                self._wait_for_admission(admission)
                return
        if self._waiter is not None:
            self._stop_waiting()
        now = time.monotonic()
        if self._budget_is_due and not self._spend_budget(admission, now):
            return
        self.is_throttled = False
        self._admission = admission
        if self._deadline == math.inf:
            self._deadline = now + self._context.options.timeout_seconds
        if not self._is_counted:
            self._is_counted = True
            admission.endpoint.retry_budget.record_request()
        self._send(now)

    def _wait_for_admission(self, refusal: Refusal) -> None:
        now = time.monotonic()
        self.is_throttled = True
        patience = self._context.options.max_hold_seconds
        if refusal.open_seconds is None and not patience:
            if self._deadline == math.inf:
                self._deadline = now + self._context.options.timeout_seconds
            self.wake_at = min(now + _POLL_AGAIN_SECONDS, self._deadline)
            return
        if self._give_up_at == math.inf:
            self._give_up_at = now + patience
        if now >= self._give_up_at:
            endpoints = self._context.endpoints
            self._finish_with(
                at_capacity(endpoints, patience)
                if refusal.open_seconds is None
                else circuit_open(endpoints, refusal.open_seconds, patience)
            )
            return
        wait = _POLL_AGAIN_SECONDS
        if refusal.open_seconds is not None:
            # Not counted against the deadline: nothing has been sent that could be late.
            self._begin_afresh()
            start_health_checks(self._context)
            wait = min(max(refusal.open_seconds, 0.01), wait)
        self.wake_at = min(now + wait, self._give_up_at, self._deadline)

    def _get_in_line(self) -> bool:
        if self._waiter is None:
            context = self._context
            self._waiter = QueueEntry(
                context.endpoints.waiting_for_admission, context.reactor, self._on_woken_up
            )
        return self._waiter.wait()

    def _stop_waiting(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.stop()

    def _on_woken_up(self) -> None:
        self.wake_at = 0.0

    def _send(self, now: float) -> None:
        admission = self._admission
        assert admission is not None
        self._attempt_started = now
        self.record.attempts += 1
        context = self._context
        url = admission.endpoint.url
        timeout_seconds = self._attempt_seconds(now, admission.endpoint)
        try:
            parts = context.head_writer.parts(url, self._request)
        except TritonError as error:
            # A secret that cannot be read.
            self._finish_with(error)
            return
        self._attempt = attempt = Attempt(
            context.reactor,
            context.pool,
            url.origin,
            parts,
            min(self._deadline, now + timeout_seconds),
            timeout_seconds,
            context.options.max_response_bytes,
            self._on_attempt_end,
        )
        attempt.start()

    def _attempt_seconds(self, now: float, endpoint: Endpoint) -> float:
        """How long the attempt may take.

        Where another endpoint is well, one that says nothing for half of the time left is given up for it,
        unless answers usually take so long that half would not be plenty.
        """
        timeout_seconds = self._context.options.timeout_seconds
        endpoints = self._context.endpoints
        if (
            len(endpoints.endpoints) == 1
            or self._is_sequence
            or not self._elsewhere((*self._tried, endpoint))
        ):
            return timeout_seconds
        half = (self._deadline - now) / 2
        usual = endpoints.usual_latency_seconds
        return half if usual is not None and usual * _HUNG_AFTER_LATENCIES <= half else timeout_seconds

    def _elsewhere(self, but: Collection[Endpoint]) -> list[Endpoint]:
        """The endpoints that are well, but for these."""
        return [other for other in self._context.endpoints.endpoints if other.is_healthy and other not in but]

    def _on_attempt_end(self, attempt: Attempt) -> None:
        self._attempt = None
        record = self.record
        if attempt.connection_use is ConnectionUse.REUSED:
            record.connections_reused += 1
        elif attempt.connection_use is ConnectionUse.OPENED:
            record.connections_opened += 1
        record.connection_waits += attempt.waited
        error = attempt.error
        if error is None:
            assert attempt.exchange is not None
            record.latency_seconds = time.monotonic() - self._attempt_started
            record.response_bytes = len(attempt.exchange.body)
            try:
                self.result = self._read(attempt.exchange)
            except TritonError as caught:
                error = caught
            except Exception as caught:
                # Out of here it would end whatever else this reactor drives, and this call never.
                error = RemoteProtocolError(f"the answer cannot be read: {type(caught).__name__}: {caught}")
            else:
                self._succeed()
                return
        if (attempt.was_stale and not self._is_sequence) or self._has_other_credentials(attempt, error):
            self._send(time.monotonic())
            return
        self._on_failure(error)

    def _has_other_credentials(self, attempt: Attempt, error: TritonError) -> bool:
        """Whether the server refused credentials that have been replaced since: once, for they may change
        at each reading."""
        if not isinstance(error, InferenceError) or error.status not in _REFUSES_CREDENTIALS:
            return False
        if self._has_reread_credentials or self._admission is None:
            return False
        self._has_reread_credentials = True
        url = self._admission.endpoint.url
        return self._context.head_writer.is_outdated(url, self._request, attempt.head)

    def _succeed(self) -> None:
        admission = self._admission
        assert admission is not None
        admission.endpoint.limit.on_success(self.record.latency_seconds)
        if self._errors:
            _logger.info(
                "%s answered after %d failed attempt(s), the last one: %s",
                admission.endpoint.url,
                len(self._errors),
                self._errors[-1].message,
            )
        self._admission = None
        admission.settle(True)
        self._finish()

    def _on_failure(self, error: TritonError) -> None:
        admission = self._admission
        assert admission is not None
        endpoint = admission.endpoint
        now = time.monotonic()
        if error.is_overload or isinstance(error, DeadlineExceededError):
            endpoint.limit.on_overload(now - self._attempt_started)
        without_frames(error)
        self._errors += (error,)
        self._tried += (endpoint,)
        self._tell(endpoint, error)
        if self._pauses_for(error, endpoint, now):
            return
        retry = self._context.options.retry
        delay = decide(
            retry,
            error,
            len(self._errors),
            sum(isinstance(earlier, ModelExecutionError) for earlier in self._errors),
            sequence=self._is_sequence,
            remaining_seconds=self._deadline - now,
            random=random.random,
        )
        if self._kind is CallKind.HALF and isinstance(error, ModelExecutionError):
            delay = None
        endpoints = self._context.endpoints.endpoints
        elsewhere = self._elsewhere(self._tried)
        if isinstance(error, TlsError) and elsewhere and len(self._errors) <= retry.max_retries:
            # No attempt mends a certificate, but each server has its own.
            delay = 0.0
        usable = endpoint.is_healthy or not error.counts_as_failure or bool(elsewhere)
        if delay is None or not usable:
            self._conclude(error)
            return
        self.record.retries += 1
        # What is in flight to a server that fails must shrink: the place is given back during the wait.
        self._settle(None)
        if elsewhere and not error.is_overload:
            delay = 0.0
        if len(set(self._tried)) == len(endpoints):
            self._tried = (endpoint,)
        self.is_throttled = error.is_overload
        # A server that refuses connections has no load of this attempt, and for one that is overloaded the
        # concurrency limit bounds what it gets.
        self._budget_is_due = type(error) is not ConnectError and not error.is_overload
        self._context.reactor.add(self)
        self.wake_at = min(now + delay, self._deadline)

    def _pauses_for(self, error: TritonError, endpoint: Endpoint, now: float) -> bool:
        """Keep the request back, outside its deadline, where the server asks for time and the policy waits.

        Overload says so, and so does a ``Retry-After`` that the deadline does not leave.
        """
        options = self._context.options
        if not (options.max_hold_seconds and options.retry.max_retries and error.retryable):
            return False
        asked_for = asked_for_seconds(error)
        if not error.is_overload and (not asked_for or asked_for < self._deadline - now):
            return False
        self._pauses += 1
        # Not longer than what the server has been too busy for everybody: who is refused more often than
        # others would be left behind.
        pauses = min(self._pauses, max(1, endpoint.limit.overloads_in_a_row))
        self._give_up_at = min(self._give_up_at, now + options.max_hold_seconds)
        wake_at = now + pause_seconds(options.retry, error, pauses, random.random)
        if wake_at >= self._give_up_at:
            return False
        self.record.retries += 1
        self._settle(None)
        self._begin_afresh()
        self._tried = (endpoint,)
        self.is_throttled = True
        self._context.reactor.add(self)
        self.wake_at = wake_at
        return True

    def _conclude(self, error: TritonError) -> None:
        """No further attempt is due: fail, or wait for a server that is known to be away."""
        self._settle(None)
        if self._may_wait(error):
            self._begin_afresh()
            self._admit()
        else:
            self._errors = self._errors[:-1]
            self._finish_with(error)

    def _may_wait(self, error: TritonError) -> bool:
        """Whether the request is kept for when the server is well again, instead of failing."""
        if not self._context.options.max_hold_seconds:
            return False
        # A model that raises may go on raising for this element: that is for the batch to be split.
        if not (error.counts_as_failure and error.retryable) or error.splits_batch:
            return False
        if self._is_sequence and error.may_have_run:
            return False
        is_known_sick = any(not endpoint.is_healthy for endpoint in self._tried)
        return is_known_sick and time.monotonic() < self._give_up_at

    def _tell(self, endpoint: Endpoint, error: TritonError) -> None:
        """Tell the breaker of a failure, at most once for an endpoint, unless this is a probe.

        At once, not when the last retry has failed: a server that is away has everybody in backoff, and
        only an open breaker asks after its health and stops the deadlines.
        """
        if not error.counts_as_failure or (endpoint in self._told and endpoint.is_healthy):
            return
        model_fails = isinstance(error, ModelExecutionError)
        if model_fails and self._kind is not CallKind.SINGLE:
            return
        self._told += (endpoint,)
        # A deadline that passed may be the element's doing: a model can hang on it.
        self._settle(False, unreachable=not (model_fails or isinstance(error, DeadlineExceededError)))

    def _spend_budget(self, admission: Admission, now: float) -> bool:
        """Spend a retry of the admitted endpoint's budget, or give the place back and wait for one."""
        budget = admission.endpoint.retry_budget
        if budget.try_spend():
            self._budget_is_due = False
            return True
        admission.settle(None)
        self._context.reactor.add(self)
        wait = min(budget.seconds_until_token(), _POLL_AGAIN_SECONDS)
        self.wake_at = min(now + max(wait, 0.001), self._deadline)
        return False

    def _begin_afresh(self) -> None:
        self._earlier = (self._earlier + self._errors)[-8:]
        self._errors = self._tried = self._told = ()
        self._deadline = math.inf
        self._budget_is_due = False

    def _settle(self, healthy: bool | None, *, unreachable: bool = False) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.settle(healthy, unreachable=unreachable)

    def _finish_with(self, error: TritonError) -> None:
        error.attempts = self._earlier + self._errors
        self.error = error
        self._finish()

    def _finish(self) -> None:
        if self._waiter is not None:
            self._stop_waiting()
        if self._admission is not None:
            self._settle(None)
        self._context.reactor.remove(self)
        # Whoever is told holds this call, and would be held by it: a cycle with the answer's bytes in it.
        on_done, self._on_done = self._on_done, _told
        on_done(self)


def _told(call: Call[Any]) -> None:
    raise AssertionError("a call ends once")
