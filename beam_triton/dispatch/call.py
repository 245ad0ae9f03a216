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

QUEUED is waiting for an admission, or for another call that has taken this one's batch into its request
(`joint_requests.py`). `beam_triton.policy.retry.next_step` chooses the step; this file carries it out. The
deadline runs from the first attempt's start. Where the breaker's policy waits, two kinds of time are outside
it: a request is *held*, for an unhealthy or overloaded server, for one that named a time to come back or for
the retry budget, at most for ``max_wait_seconds``; and it waits for its turn at an endpoint that is at its
limit, however long that takes while the endpoint answers others.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import Any

from beam_triton.dispatch.channel import CallContext
from beam_triton.dispatch.endpoints import Admission, Endpoint, Refusal
from beam_triton.dispatch.health import start_health_checks
from beam_triton.dispatch.joint_requests import Joinable, JointRequest
from beam_triton.dispatch.request_head import JSON_HEADERS, HttpRequest
from beam_triton.dispatch.server_statistics import ask_for_statistics
from beam_triton.dispatch.slots import POLL_AGAIN_SECONDS, QueueEntry
from beam_triton.errors import (
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    DeadlineExceededError,
    InferenceError,
    ModelExecutionError,
    PoolTimeoutError,
    RemoteProtocolError,
    ServerUnavailableError,
    SharedMemoryError,
    SilentConnectionError,
    TritonError,
    with_message,
    without_frames,
)
from beam_triton.policy.retry import EndpointView, Fail, History, Hold, Limits, Resend, Retry, next_step
from beam_triton.protocol.region_layout import RegionLayout
from beam_triton.protocol.status import NO_SUCH_REGION
from beam_triton.transport.attempt import Attempt
from beam_triton.transport.event_stream import EventStream, StreamLimits
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.redirects import MAX_REDIRECTS, Redirect, redirected
from beam_triton.transport.shared_region import SharedRegion

_logger = logging.getLogger(__name__)

# A model may take far longer for the first token of a long prompt than it usually does.
_LEAST_STREAM_SILENCE_SECONDS = 30.0
# A process that sends fewer requests does not ask the server where their time went.
_FIRST_LOOK_ANSWERS = 16
# How Triton's refusals begin, and those of proxies do not.
_ERROR_OF_SERVER = b'{"error":'


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
    """What happened to a call, for metrics: plain counts, written on the reactor's thread.

    Its request held ``joined_rows`` of other calls as well; or it ``has_joined`` another's, which counts it.
    ``queued_seconds`` passed before the last attempt was sent: the endpoint's limit, earlier attempts and the
    waits between them. The answer came ``latency_seconds`` after that, of which ``connecting_seconds`` passed
    until there was a connection, and ``busy_seconds`` while the thread did something else than wait.
    """

    request_bytes: int = 0
    attempts: int = 0
    retries: int = 0
    connections_opened: int = 0
    connections_reused: int = 0
    connection_waits: int = 0
    joined_rows: int = 0
    has_joined: bool = False
    response_bytes: int = 0
    shared_memory_requests: int = 0
    latency_seconds: float = 0.0
    queued_seconds: float = field(default=0.0, init=False)
    connecting_seconds: float = field(default=0.0, init=False)
    busy_seconds: float = field(default=0.0, init=False)
    decoding_seconds: float = field(default=0.0, init=False)
    unasked_compression: bool = field(default=False, init=False)
    asked_compression: bool = field(default=False, init=False)


class _CallState:
    """What changes while a call is in flight; one that succeeds at the first attempt assigns little of it."""

    phase = Phase.NEW
    wake_at = math.inf
    result: Any = None
    error: TritonError | None = None
    is_throttled = False
    stream: EventStream | None = None
    # The one that it was sent to last.
    endpoint: Endpoint | None = None
    # The failures, the endpoints that come last now, and those whose breakers know that this request failed.
    _history = History()
    _tried: tuple[Endpoint, ...] = ()
    _reported: tuple[Endpoint, ...] = ()
    _owes_budget = False
    _may_be_too_large = False
    _has_reread_credentials = False
    # The last attempt: where and when it was sent, and how long its connection may be silent.
    _admission: Admission | None = None
    _attempt: Attempt | None = None
    _redirect: Redirect | None = None
    _redirects = 0
    _sent_at = 0.0
    _waited_seconds = 0.0
    _was_stalled = False
    _silence_seconds = math.inf
    _gave_up_after_seconds = math.inf
    # Where its tensors lie, whether those of the last attempt lay there, and whether they travel by HTTP from
    # now on.
    _region: SharedRegion | None = None
    _was_in_region = False
    _goes_by_http = False
    # Infinite before the first attempt, and before the first time that it is held.
    _deadline = math.inf
    _hold_until = math.inf
    _queued_at: float | None = None
    # When it first had to wait, or to be sent again.
    _delayed_at: float | None = None
    # The call whose request holds this one's batch, set by that call's thread; and what that has handed over.
    joined_to: Call | None = None
    _handed_over: Any = None
    _wake_after_hand_over: Callable[[], None] | None = None
    # The joint request that this call sends, and what it has sent without the others.
    _joint: JointRequest | None = None
    _own_request: HttpRequest
    _sent_request: HttpRequest
    _own_is_batch: bool
    # Made when it is needed and dropped after: it refers back to this call.
    _queue_entry: QueueEntry | None = None


@dataclass(eq=False, repr=False)
class Call(_CallState):
    """A request in flight, from `start` until ``on_done``.

    Args:
        context: what it shares with the other calls of its bundle.
        token: by which the owner recognises this call.
        read: turns the answer into the result; what it raises is this attempt's error. Of an answer whose
            outputs are in shared memory, it gets them as ``places``.
        on_done: called on the reactor's thread, exactly once, with ``result`` or ``error`` set.
        slots: how many the owner has taken for it.
        is_batch: it holds several elements, one of which may have made the model raise, or too many: a plain
            500 is not retried and says nothing about the server's health.
        may_be_blameless: another request that the server executes together with it may have made the model
            raise: the same.
        is_sequence: the model would see a repeated request twice: nothing that may have run is repeated.
        pinned: the only endpoint that it may go to, which has the beginning of its sequence. Only an
            overloaded server is asked again: after other failures the owner sends the sequence again.
        starts_sequence: it may wait in the server until another sequence ends, and hears nothing meanwhile.
        suspicion: that this request hangs the model, as in `History`.
        lost_at: when this request, or the batch that it is a part of, was first lost without a reason.
        joinable: by which it may share a request with others that wait for an admission; None: it may not.
        stream_limits: the answer is a stream of server-sent events, which are in ``stream`` at the end: those
            of the last attempt that got any. A request that got some is not repeated, unless they allow it.
    """

    context: CallContext
    token: Any
    request: HttpRequest
    read: Callable[..., Any]
    on_done: Callable[[Call], None]
    record: CallRecord
    _: KW_ONLY
    slots: int
    is_batch: bool
    is_sequence: bool
    suspicion: int
    lost_at: float
    joinable: Joinable | None = None
    stream_limits: StreamLimits | None = None
    pinned: Endpoint | None = None
    starts_sequence: bool = False
    may_be_blameless: bool = False

    def __post_init__(self) -> None:
        if self.suspicion:
            self._history = History(suspicion=self.suspicion)

    def start(self) -> None:
        """Ask for an admission, and send; called again whenever there may be one."""
        endpoints = self.context.endpoints
        if self.joined_to is not None:
            self._stay_joined()
            return
        # What may be joined by others gains by waiting for them, up to the time of an answer.
        waited_seconds = math.inf
        if self.joinable is not None and not self.record.attempts:
            waited_seconds = 0.0 if self._queued_at is None else time.monotonic() - self._queued_at
        admission = endpoints.admit(self._tried, waited_seconds, self.pinned)
        if isinstance(admission, Refusal) and self.pinned is None and self._join_queue():
            admission = endpoints.admit(self._tried, waited_seconds)
        if isinstance(admission, Refusal):
            self._wait_for_admission(admission)
            return
        now = time.monotonic()
        if not self._leave_joinable():
            admission.end(None)
            self._stay_joined()
            return
        if self.joinable is not None and not self.record.attempts:
            # Before the next one is woken, which would leave with its own.
            self._take_others(self.joinable)
        if self._queue_entry is not None:
            self._leave_queue()
            endpoints.wake_another(admission.endpoint)
        if self._queued_at is not None:
            self._discount_turn(now - self._queued_at)
        if self._owes_budget and not self._spend_budget(admission, now):
            return
        self.is_throttled = False
        self._admission = admission
        if self._delayed_at is not None:
            self.record.queued_seconds = now - self._delayed_at
        if self._deadline == math.inf:
            self._deadline = now + self.context.options.timeout_seconds
        if not self.record.attempts:
            admission.endpoint.retry_budget.record_request()
        self._send(admission, now)

    def _take_others(self, joinable: Joinable) -> None:
        """Take those along that wait for an admission with batches that fit beside this one's."""
        joint = self.context.endpoints.joinable_calls.take(self, joinable)
        if joint is None:
            return
        for call in joint.others:
            call.withdraw()
        try:
            request = joint.request()
        except TritonError:
            joint.dissolve()
            return
        self._joint = joint
        self._own_request, self._own_is_batch = self.request, self.is_batch
        self.request = request._replace(trace_headers=self.request.trace_headers)
        self.is_batch = True
        self.record.request_bytes = request.content_length
        self.record.joined_rows = joint.joined_rows

    def _dissolve(self) -> None:
        """Let each call of a joint request go on by itself, with its own batch."""
        joint, self._joint = self._joint, None
        if joint is not None:
            joint.dissolve()
            self.request, self.is_batch, self.joinable = self._own_request, self._own_is_batch, None
            self.record.request_bytes = self.request.content_length
            self.record.joined_rows = 0

    def withdraw(self) -> None:
        """Take a call that has joined out of the queue for admissions; on the other call's thread."""
        entry = self._queue_entry
        if entry is not None:
            entry.withdraw()

    def hand_over(self, result: Any) -> None:
        """Give a joined call its result, None for none; on the other call's thread."""
        wake = self._wake_after_hand_over
        assert wake is not None
        self._handed_over = result
        wake()

    def _on_hand_over(self) -> None:
        if self.phase is Phase.DONE:
            return
        self._leave_queue()
        self._wake_after_hand_over = self.joined_to = self.joinable = None
        result, self._handed_over = self._handed_over, None
        if result is None:
            self.start()
            return
        self.record.has_joined = True
        self.result = result
        self._finish()

    def _leave_joinable(self) -> bool:
        """False if another call, on its own thread, was faster to take this one's batch."""
        if self._wake_after_hand_over is None:
            return True
        assert self.joinable is not None
        if not self.context.endpoints.joinable_calls.leave(self, self.joinable):
            return False
        self._wake_after_hand_over = None
        return True

    def _stay_joined(self) -> None:
        """Wait for what the other call hands over; an admission that became free is another's."""
        self.context.endpoints.waiting_for_admission.wake_next()
        self._wait(Phase.QUEUED, time.monotonic() + POLL_AGAIN_SECONDS, throttled=False)

    def _wait_for_admission(self, refusal: Refusal) -> None:
        now = time.monotonic()
        if self._delayed_at is None:
            self._delayed_at = now
        if self.pinned is not None:
            self._finish_with(self.context.endpoints.unhealthy_error(refusal.open_seconds or 0.0, 0.0))
        elif refusal.open_seconds is None:
            self._wait_for_turn(now)
        else:
            self._wait_for_health(refusal.open_seconds, now)

    def _wait_for_turn(self, now: float) -> None:
        """Wait at endpoints that are at their limits: while they answer others, however long it takes."""
        endpoints = self.context.endpoints
        if self._queued_at is None:
            self._queued_at = now
        patience_seconds = endpoints.max_hold_seconds or self.context.options.timeout_seconds
        gives_up_at = max(self._queued_at, endpoints.answered_at) + patience_seconds
        if now >= gives_up_at:
            self._finish_with(endpoints.busy_error(now - self._queued_at))
            return
        wake_at = min(now + POLL_AGAIN_SECONDS, gives_up_at, endpoints.next_turn_at())
        if not endpoints.max_hold_seconds:
            wake_at = min(wake_at, self._deadline)
        self._wait(Phase.QUEUED, wake_at, throttled=endpoints.is_overloaded(now) or endpoints.gives_way)

    def _discount_turn(self, waited_seconds: float) -> None:
        """It was held by no server while others had their turn, nor late for one."""
        self._queued_at = None
        self._hold_until += waited_seconds
        if self.context.endpoints.max_hold_seconds:
            self._deadline += waited_seconds

    def _wait_for_health(self, open_seconds: float, now: float) -> None:
        """Wait outside the deadline while no endpoint is healthy, as long as the policy allows."""
        if self._queued_at is not None:
            self._discount_turn(now - self._queued_at)
        max_hold_seconds = self.context.endpoints.max_hold_seconds
        self._hold_until = min(self._hold_until, now + max_hold_seconds)
        if now >= self._hold_until:
            self._finish_with(self.context.endpoints.unhealthy_error(open_seconds, max_hold_seconds))
            return
        self._start_over(for_overload=False)
        start_health_checks(self.context)
        seconds = min(max(open_seconds, 0.01), POLL_AGAIN_SECONDS)
        self._wait(Phase.QUEUED, min(now + seconds, self._hold_until), throttled=True)

    def _join_queue(self) -> bool:
        if self._queue_entry is None:
            self._queue_entry = QueueEntry(
                self.context.endpoints.waiting_for_admission, self.context.reactor, self._on_admission_free
            )
            if self.joinable is not None and not self.record.attempts:
                self._wake_after_hand_over = self.context.reactor.waker(self._on_hand_over)
                self.context.endpoints.joinable_calls.enter(self, self.joinable)
        return self._queue_entry.join()

    def _on_admission_free(self) -> None:
        self.on_time(time.monotonic())

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
        max_hold_seconds = self.context.endpoints.max_hold_seconds
        if max_hold_seconds:
            # The budget protects the server from this process: the request is not late for it.
            self._hold_until = min(self._hold_until, now + max_hold_seconds)
            if now < self._hold_until:
                self._deadline += POLL_AGAIN_SECONDS
        wake_at = min(now + POLL_AGAIN_SECONDS, self._deadline)
        self._wait(Phase.BACKING_OFF, wake_at, throttled=self.is_throttled)
        return False

    def _send(self, admission: Admission, now: float, redirect: Redirect | None = None) -> None:
        self.phase = Phase.SENDING
        options = self.context.options
        self.endpoint = endpoint = admission.endpoint
        url, request = endpoint.url, self.request
        if redirect is None:
            self.record.attempts += 1
        else:
            url, request = redirect.url, request._replace(path=redirect.path)
        if redirect is not self._redirect:
            self._redirect = redirect
            self._redirects = 0 if redirect is None else self._redirects + 1
        if not (self.is_sequence or self.starts_sequence) or self.pinned is not None:
            errors = self._history.errors
            silences = sum(isinstance(error, SilentConnectionError) for error in errors) if errors else 0
            self._silence_seconds = self.context.endpoints.silence_seconds(
                endpoint, silences, self._deadline - now
            )
            if self.stream_limits is not None:
                self._silence_seconds = max(self._silence_seconds, _LEAST_STREAM_SILENCE_SECONDS)
        self._was_stalled = endpoint.is_stalled
        if request.layout is not None and redirect is None and not self._goes_by_http:
            request = self._placed(request, endpoint)
        self._sent_request, self._was_in_region = request, self._region is not None
        try:
            parts = self.context.head_writer.parts(url, request)
        except TritonError as error:
            # A secret that cannot be read.
            self._leave_region(error)
            self._finish_with(error)
            return
        self._sent_at = now
        self._waited_seconds = self.context.reactor.waited_seconds
        self._attempt = attempt = Attempt(
            self.context.reactor,
            self.context.pool,
            url.origin,
            parts,
            self._on_attempt_end,
            deadline=self._deadline,
            timeout_seconds=options.timeout_seconds,
            max_response_bytes=options.max_response_bytes,
            silence_seconds=self._silence_seconds,
            on_silence=self._on_silence,
            stream_limits=self.stream_limits,
            on_event=self._on_event,
        )
        attempt.start()

    def _placed(self, request: HttpRequest, endpoint: Endpoint) -> HttpRequest:
        """The same request with its tensors in shared memory, where there is some."""
        layout = request.layout
        if layout is None or self.is_sequence or self.starts_sequence or self.pinned is not None:
            return request
        region = self._region = endpoint.regions.take(self.context, layout.nbytes)
        if region is None:
            return request
        body = layout.put(region.name, region.memory)
        return request._replace(body_headers=JSON_HEADERS, body=(body,), content_length=len(body))

    def _on_event(self, attempt: Attempt) -> None:
        """A server that sends events answers. The first one says how busy it is, not how long the text is."""
        assert self.endpoint is not None and attempt.exchange is not None
        stream = attempt.exchange.stream
        assert stream is not None
        self.endpoint.answered_at = stream.last_at
        if self.stream is not stream:
            self.stream = stream
            self.endpoint.is_stalled = False
            self.endpoint.limit.on_success(stream.first_at - self._sent_at)
            self.context.endpoints.wake_another(self.endpoint)

    def _on_silence(self, attempt: Attempt) -> None:
        """Give up a connection that is silent for far too long, if the server is known to answer others."""
        assert self._admission is not None
        endpoint = self._admission.endpoint
        if (
            endpoint.answered_at >= self._sent_at
            or self.context.endpoints.has_healthy_besides((*self._tried, endpoint))
            or endpoint.silence.try_trial(self._silence_seconds)
        ):
            self._gave_up_after_seconds = self._silence_seconds
            attempt.give_up()
        else:
            attempt.wake_at = min(time.monotonic() + POLL_AGAIN_SECONDS, attempt.deadline)

    def _on_attempt_end(self, attempt: Attempt) -> None:
        self._attempt = None
        now = time.monotonic()
        record, error = self.record, attempt.error
        record.connections_reused += attempt.has_reused
        record.connections_opened += attempt.has_opened
        record.connection_waits += attempt.has_waited
        if error is None:
            assert attempt.exchange is not None
            record.latency_seconds = latency_seconds = now - self._sent_at
            waited_seconds = self.context.reactor.waited_seconds - self._waited_seconds
            record.busy_seconds = max(0.0, latency_seconds - waited_seconds)
            has_connected = attempt.has_opened or attempt.has_waited
            record.connecting_seconds = attempt.sent_at - self._sent_at if has_connected else 0.0
            record.response_bytes = len(attempt.exchange.body)
            try:
                result = self._read(attempt.exchange)
                self.result = result if self._joint is None else self._joint.divide(result)
                self._joint = None
                record.decoding_seconds = time.monotonic() - now
                encoding = attempt.exchange.head.get("content-encoding") if attempt.exchange.head else None
                if encoding is not None and encoding.lower() != "identity":
                    record.asked_compression = self.context.options.compressed_on_purpose
                    record.unasked_compression = not record.asked_compression
            except TritonError as caught:
                error = self._after_redirect(attempt, caught, now)
                if error is None:
                    return
            except Exception as caught:
                # An exception that left this frame would end every other call of this reactor.
                error = RemoteProtocolError(f"the answer cannot be read: {type(caught).__name__}: {caught}")
            else:
                self._succeed()
                return
        else:
            self._leave_region(error)
        self._fail(attempt, error, now)

    def _read(self, exchange: Exchange) -> Any:
        """The result that an answer holds, or that the server has written into shared memory."""
        layout, region, self._region = self.request.layout, self._region, None
        if layout is None:
            return self.read(exchange)
        places = None
        if region is not None:
            assert self.endpoint is not None and exchange.head is not None
            regions = self.endpoint.regions
            if exchange.head.status != 200:
                # A proxy gives a request up that the server goes on with, and writes the outputs of.
                is_of_server = bytes(exchange.body[: len(_ERROR_OF_SERVER)]) == _ERROR_OF_SERVER
                (regions.give_back if is_of_server else regions.leave)(region)
                return self._read_refusal(exchange, region, layout)
            places = regions.answered(region, layout)
            self.record.shared_memory_requests = 1
            self.record.response_bytes += sum(map(len, places.values()))
        result = self.read(exchange, places=places)
        layout.learn(result)
        return result

    def _read_refusal(self, exchange: Exchange, region: SharedRegion, layout: RegionLayout) -> Any:
        assert self.endpoint is not None
        try:
            return self.read(exchange)
        except SharedMemoryError as error:
            self._goes_by_http = True
            # By the message: Triton up to 2.41 answers 400 to both.
            if error.server_message.startswith(NO_SUCH_REGION):
                self.endpoint.regions.lost(region)
            else:
                layout.outgrown()
            raise

    def _leave_region(self, error: TritonError | None) -> None:
        """Give the region up, where there is one, unless the server cannot have got the request."""
        region, self._region = self._region, None
        if region is None:
            return
        assert self.endpoint is not None
        if isinstance(error, ConfigurationError | ConnectError | PoolTimeoutError):
            self.endpoint.regions.give_back(region)
        else:
            self.endpoint.regions.leave(region)

    def _after_redirect(self, attempt: Attempt, error: TritonError, now: float) -> TritonError | None:
        """None where the answer was a redirect and the request is on its way there, otherwise the error."""
        assert attempt.exchange is not None and attempt.exchange.head is not None
        head = attempt.exchange.head
        if not 300 <= head.status < 400:
            return error
        assert self._admission is not None and self.endpoint is not None
        url, path = self._redirect or (self.endpoint.url, self.request.path)
        writer = self.context.head_writer
        try:
            step = redirected(
                url, path, self.request.method, head.status, head.get("location"), writer.given_host()
            )
            if isinstance(step, Redirect) and self._redirects >= MAX_REDIRECTS:
                step = f"{MAX_REDIRECTS} redirects in a row were"
            if isinstance(step, str):
                return with_message(error, f"{error.message}; {step}") if step else error
            step = step._replace(url=self.context.options.network.routed(step.url))
        except TritonError as caught:
            return caught
        if self.endpoint.tells_redirect():
            _logger.warning("%s redirects to %s: as endpoint, it gets each request once", url, step.url)
        self._send(self._admission, now, step)
        return None

    def _succeed(self) -> None:
        admission, self._admission = self._admission, None
        assert admission is not None
        endpoint, latency_seconds = admission.endpoint, self.record.latency_seconds
        endpoint.answered_at = answered_at = self._sent_at + latency_seconds
        if self.stream is None:
            background = endpoint.background
            if background is not None:
                background.on_success(latency_seconds, self.request.rows)
            if answered_at >= endpoint.statistics.ask_at and (
                background is not None or (endpoint.in_flight > 1 and endpoint.limit.was_reached)
            ):
                ask_for_statistics(self.context, endpoint, answered_at)
            elif self.context.endpoints.limit is not None:
                asked = self.context.endpoints.to_ask(answered_at)
                if asked is not None:
                    ask_for_statistics(self.context, asked, answered_at)
            endpoint.limit.on_success(latency_seconds)
            endpoint.answers += 1
            if answered_at >= endpoint.statistics.look_at and endpoint.answers >= _FIRST_LOOK_ANSWERS:
                ask_for_statistics(self.context, endpoint, answered_at)
        endpoint.is_stalled = False
        errors = self._history.errors
        if errors:
            if isinstance(errors[-1], SilentConnectionError):
                endpoint.silence.answered_after(self._gave_up_after_seconds, latency_seconds)
            _logger.info(
                "%s answered after %d failed attempt(s), the last one: %s",
                endpoint.url,
                len(errors),
                errors[-1].message,
            )
        admission.end(True)
        self._finish()

    def _fail(self, attempt: Attempt, error: TritonError, now: float) -> None:
        assert self._admission is not None
        endpoint = self._admission.endpoint
        if self._delayed_at is None:
            self._delayed_at = self._sent_at
        without_frames(error)
        self.describe(error)
        answered_meanwhile = endpoint.answered_at >= self._sent_at
        if error.is_overload:
            endpoint.limit.on_overload(now - self._sent_at)
        elif isinstance(error, DeadlineExceededError):
            if self.stream is None:
                endpoint.record_deadline(self._sent_at, now)
        elif isinstance(error, ModelExecutionError):
            # A model that raises has answered, if with no latency to learn from.
            endpoint.answered_at = now
            endpoint.is_stalled = False
        is_late = isinstance(error, DeadlineExceededError | SilentConnectionError)
        self._may_be_too_large = self.is_batch and self._suspects_size(endpoint, error, now)
        if not (is_late and answered_meanwhile) and not self._may_be_too_large:
            # A server that answers is healthy, however slow.
            self._report_failure(endpoint, error)
        has_new_credentials = False
        is_refused = isinstance(error, InferenceError) and error.status in (401, 403)
        if is_refused and not self._has_reread_credentials:
            # Once per call: credentials may change at each reading.
            self._has_reread_credentials = True
            writer = self.context.head_writer
            # A redirect's head is another one; the first endpoint decides again what follows.
            has_new_credentials = self._redirect is None and writer.is_outdated(
                endpoint.url, self._sent_request, attempt.parts[0]
            )
        lacks_region = self._was_in_region and isinstance(error, SharedMemoryError)
        is_harmless = error.is_overload or error.was_stale or lacks_region
        if self._joint is not None and not (is_harmless or has_new_credentials):
            # It may be the doing of one call's element: each is sent by itself, as if it had not been before.
            self._end_admission(None)
            self._dissolve()
            self._deadline = math.inf
            self.start()
            return
        tried = (*self._tried, endpoint)
        view = self._view(tried, has_new_credentials=has_new_credentials)
        self._follow(self._history.after(error, view), tried, now, view)

    def describe(self, error: TritonError) -> None:
        """Say on an error which request failed, at which endpoint, if it was sent to one."""
        if self.endpoint is not None:
            error.endpoint = str(self.endpoint.url if self._redirect is None else self._redirect.url)
            error.request_id = self.request.request_id or None
            error.attempt_count = self.record.attempts

    def _suspects_size(self, endpoint: Endpoint, error: TritonError, now: float) -> bool:
        """Whether a proxy may have refused this batch for its size, by another answer than 413 or by none.

        Its server is well: it has answered others, or a health check, since the batch was lost before (since
        it was sent, where the answer is that it is forbidden).
        """
        is_forbidden = isinstance(error, InferenceError) and error.status == 403
        is_lost = isinstance(error, ConnectionLostError | ServerUnavailableError) and not error.was_stale
        if not (is_forbidden or is_lost):
            return False
        lost_at = self._sent_at if is_forbidden else self.lost_at
        self.lost_at = min(self.lost_at, now)
        is_well = max(endpoint.answered_at, endpoint.checked_at) > lost_at
        return self.context.endpoints.learned.nbytes.suspects(self.request.content_length, is_well=is_well)

    def _report_failure(self, endpoint: Endpoint, error: TritonError) -> None:
        """Report a failure to the breaker, once per endpoint at most, unless this is a probe.

        At once, not when the last retry has failed: when a server is down all requests back off, and only an
        open breaker checks its health and stops the deadlines.
        """
        if not error.counts_as_failure or (endpoint in self._reported and endpoint.is_healthy):
            return
        model_raised = isinstance(error, ModelExecutionError)
        if model_raised and (self.is_batch or self.may_be_blameless):
            return
        self._reported += (endpoint,)
        # A passed deadline may be the element's doing: a model can hang on it.
        self._end_admission(False, unreachable=not (model_raised or isinstance(error, DeadlineExceededError)))

    def _follow(self, history: History, tried: tuple[Endpoint, ...], now: float, view: EndpointView) -> None:
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
                max_server_error_retries=0 if self.is_batch or self.may_be_blameless else None,
                is_sequence=self.is_sequence or self._may_not_repeat,
                was_in_shared_memory=self._was_in_region,
                may_be_too_large=self._may_be_too_large,
            ),
            view,
            random.random,
        )
        is_overload = isinstance(step, Hold) and step.for_overload
        if self.pinned is not None and not (is_overload or isinstance(step, Resend)):
            step = Fail(error)
        if isinstance(step, Resend):
            assert self._admission is not None
            self._send(self._admission, now)
            return
        self._history, self._tried = history, tried
        # The load of a server that fails must shrink: its admission is given back during the wait.
        self._end_admission(None)
        if isinstance(step, Fail):
            if isinstance(error, DeadlineExceededError) and self.stream_limits is None:
                error = with_message(error, tried[-1].late_message(error.message))
                error.splits_batch = history.is_to_blame and view.has_answered
            elif self._may_be_too_large:
                error.splits_batch = True
            self._finish_with(error)
        elif isinstance(step, Retry):
            self.record.retries += 1
            if set(tried).issuperset(endpoints.endpoints):
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

    @property
    def _may_not_repeat(self) -> bool:
        """Whether events came that a repetition would bring again."""
        return (
            self.stream is not None
            and self.stream_limits is not None
            and not self.stream_limits.repeat_started
        )

    def _view(self, tried: tuple[Endpoint, ...], *, has_new_credentials: bool = False) -> EndpointView:
        return self.context.endpoints.view(
            tried, self._sent_at, has_new_credentials=has_new_credentials, was_stalled=self._was_stalled
        )

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
        is_outside = self._queued_at is not None and self.context.endpoints.max_hold_seconds > 0
        if is_outside or now < self._deadline:
            self.start()
        else:
            # The deadline began with an attempt, which has failed.
            self._follow(self._history, self._tried, now, self._view(self._tried))

    def cancel(self) -> None:
        """Give up without calling ``on_done``: the bundle failed, and the answer is of no use."""
        self.phase = Phase.DONE
        self.is_throttled = False
        self.context.reactor.remove(self)
        if self._attempt is not None:
            self._attempt.cancel()
        self._leave_region(None)
        self._dissolve()
        self._leave_joinable()
        self._leave_queue()
        self._end_admission(None)

    def _end_admission(self, healthy: bool | None, *, unreachable: bool = False) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.end(healthy, unreachable=unreachable)

    def _finish_with(self, error: TritonError) -> None:
        if not self._leave_joinable():
            self._stay_joined()
            return
        history = self._history
        error.attempts = tuple(each for each in history.earlier + history.errors if each is not error)
        if error.endpoint is None:
            self.describe(error)
        self.error = error
        self._leave_queue()
        self._end_admission(None)
        self._finish()

    def _finish(self) -> None:
        assert self.phase is not Phase.DONE, "a call ends once"
        self.phase = Phase.DONE
        self.context.reactor.remove(self)
        self._dissolve()
        # The owner holds this call, and would be held by it: a cycle with the answer's bytes in it.
        on_done = self.on_done
        del self.on_done
        on_done(self)
