"""The state of the servers that one model is scored on, shared by all DoFn instances of a process.

A request takes a *slot* first, and for each attempt an *admission* to an endpoint, which the endpoint's
circuit breaker and its adaptive concurrency limit grant.
"""

from __future__ import annotations

import logging
import math
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from beam_triton.dispatch.discovery import Discovery
from beam_triton.dispatch.joint_requests import JoinableCalls
from beam_triton.dispatch.shared_memory import RegionPool
from beam_triton.dispatch.slots import Slots, WaitQueue
from beam_triton.errors import CircuitOpenError, PoolTimeoutError, TritonError
from beam_triton.policy.circuit_breaker import CircuitBreaker, CircuitBreakerPolicy, State, max_hold_seconds
from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from beam_triton.policy.learned_size import UNLIMITED, LearnedSizes
from beam_triton.policy.politeness import Background
from beam_triton.policy.rare_question import RareQuestion
from beam_triton.policy.retry import EndpointView, RetryBudget, RetryPolicy
from beam_triton.policy.server_times import ServerStatistics
from beam_triton.policy.silence import Silence
from beam_triton.transport.origin import EndpointUrl

_logger = logging.getLogger(__name__)

# For so long after it was overloaded, waiting for an endpoint is reported as throttling.
_OVERLOADED_SECONDS = 10.0
# Of several endpoints each process asks one for its queue, and another one after this time.
_ASKED_SECONDS = 30.0
_WRITE_EVERY_SECONDS = 1.0


class EndpointSetKey(NamedTuple):
    """Users that agree on these share breakers, limits, budgets and slots.

    Requests go to the healthy one of ``urls`` with the fewest in flight, in turns among equals;
    ``max_concurrent_requests`` bounds those of all endpoints together, waiting ones included. An endpoint's
    limit keeps answers within
    ``timeout_seconds``. With ``discovery_seconds`` each address of a name is an endpoint; names are looked up
    again after that time. A version has a state of its own, and so has that of the server's choice ("", the
    default): one that is unloaded says nothing about the health of another, nor do their sizes and times.
    With a ``politeness`` of "background" an endpoint's other users come first. ``shared_memory`` is as in
    `beam_triton.dispatch.shared_memory`.
    """

    urls: tuple[EndpointUrl, ...]
    model_name: str
    max_concurrent_requests: int
    timeout_seconds: float
    retry: RetryPolicy
    circuit_breaker: CircuitBreakerPolicy | None
    discovery_seconds: float | None = None
    model_version: str = ""
    politeness: str | None = None
    shared_memory: str = "never"


class Endpoint:
    """One server: its health, and how many requests it gets at a time.

    Attributes:
        turn: of equals the one with the lowest is next. In the order of the list, processes with few requests
            in flight would all meet at its first; by chance, requests would meet more often than in turns.
        answers: how many requests for the model it has answered, about: threads may count at once.
        answered_at: when it last answered a request for the model, be it that the model raised.
        checked_at: when it last passed a health check.
        is_stalled: a request has passed its deadline, and none has been answered since.
    """

    def __init__(self, url: EndpointUrl, key: EndpointSetKey, of_all: ConcurrencyLimit | None = None) -> None:
        self.url = url
        self.in_flight = 0
        self.answers = 0
        self.turn = random.random()
        self.limit = ConcurrencyLimit(
            key.max_concurrent_requests, key.timeout_seconds, time.monotonic, time.time, of_all=of_all
        )
        self.statistics = ServerStatistics()
        self.background: Background | None = None
        if key.politeness == "background":
            patience_seconds = max_hold_seconds(key.circuit_breaker) or key.timeout_seconds
            self.background = Background(time.monotonic, patience_seconds)
        self.silence = Silence(time.monotonic)
        self.regions = RegionPool(url, key.shared_memory)
        self.answered_at = -math.inf
        self.checked_at = -math.inf
        self._timeout_seconds = key.timeout_seconds
        self._has_told_redirect = False
        self.is_stalled = False
        self.retry_budget = RetryBudget(key.retry, time.monotonic)
        self.breaker: CircuitBreaker | None = None
        policy = key.circuit_breaker
        if policy is not None:
            unreachable_limit = policy.minimum_requests
            if policy.when_open == "wait":
                # All that are in flight are enough: more may never fail together.
                unreachable_limit = min(unreachable_limit, key.max_concurrent_requests)
            self.breaker = CircuitBreaker(
                policy, time.monotonic, self._log_change, unreachable_limit=unreachable_limit
            )

    @property
    def is_healthy(self) -> bool:
        """The breaker, where there is one, is closed."""
        return self.breaker is None or self.breaker.state is State.CLOSED

    @property
    def is_slow(self) -> bool:
        """Its answers usually take more than half of the deadline."""
        usual_seconds = self.limit.usual_latency_seconds
        return usual_seconds is not None and usual_seconds > self._timeout_seconds / 2

    def record_deadline(self, sent_at: float, now: float) -> None:
        """A request that was sent at ``sent_at`` has passed its deadline."""
        self.is_stalled = self.answered_at < sent_at
        if self.is_slow or self.is_stalled:
            # It may have passed in the server's queue, rather than while the model ran.
            self.limit.on_deadline(now - sent_at)

    def late_message(self, message: str) -> str:
        """``message`` of a request that passed its deadline, and what its user can do about it."""
        answers = "it has answered no request for this model so far"
        if self.answered_at > -math.inf:
            answers = "it has answered requests for this model with errors only so far"
        if self.limit.fastest_seconds < math.inf:
            answers = f"its fastest answer for this model took {self.limit.fastest_seconds:.3g} s"
        return (
            f"{message}; {answers}. If the model needs longer, raise timeout_seconds or lower "
            f"batching.max_batch_size"
        )

    def tells_redirect(self) -> bool:
        """Whether this is the first redirect that it answers."""
        is_first, self._has_told_redirect = not self._has_told_redirect, True
        return is_first

    def _log_change(self, old: State, new: State) -> None:
        level = logging.WARNING if new is State.OPEN else logging.INFO
        _logger.log(level, "circuit breaker of %s: %s, was %s", self.url, new.value, old.value)


class Admission:
    """Permission to send one request to ``endpoint``. `end` gives it back; a second call does nothing."""

    __slots__ = ("_endpoints", "_permit", "endpoint")

    def __init__(self, endpoints: EndpointSet, endpoint: Endpoint, permit: int | None) -> None:
        self._endpoints: EndpointSet | None = endpoints
        self._permit = permit
        self.endpoint = endpoint

    def end(self, healthy: bool | None, *, unreachable: bool = False) -> None:
        """Report what the request showed of the endpoint's health, as `CircuitBreaker.record` takes it."""
        endpoints, self._endpoints = self._endpoints, None
        if endpoints is None:
            return
        if self._permit is not None:
            assert self.endpoint.breaker is not None
            self.endpoint.breaker.record(self._permit, healthy, unreachable=unreachable)
        endpoints.leave(self.endpoint)


class Refusal(NamedTuple):
    """No endpoint may be sent to now. ``open_seconds`` is set where circuit breakers are the reason."""

    open_seconds: float | None


class Totals:
    """Counts that are added on any thread, and taken about once a second.

    A metric costs as much to write as a small request costs to send, and streams have thousands of bundles a
    second: what is known of each goes together.

    Attributes:
        due_at: when they are to be taken, in monotonic seconds.
        seen: what is to be found out once in a process, and has been.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.due_at = time.monotonic() + _WRITE_EVERY_SECONDS
        self.seen: set[str] = set()

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to the counts."""
        with self._lock:
            for name, value in counts.items():
                self._counts[name] += value

    def take(self) -> Counter[str]:
        """What has been added since the last time."""
        self.due_at = time.monotonic() + _WRITE_EVERY_SECONDS
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return taken


class EndpointSet:
    """The endpoints of one model and the process's slots for it; thread-safe.

    Attributes:
        endpoints: those that get requests now. Discovery replaces the tuple, on another thread: read it once.
        limit: of all of them together, where there may be several: each gets one request at a time at least,
            which for many processes with many endpoints is far too many.
        max_hold_seconds: how long a request may be held for an unhealthy or overloaded server.
        waiting_for_admission: is woken when a request to an endpoint has ended.
        joinable_calls: of those that wait, the ones that may share a request.
        learned: which sizes of requests pass.
        totals: what waits to be written to the job's metrics.
        model_questions: whether the model is still as it was described, by what its description depends on.
    """

    def __init__(self, key: EndpointSetKey) -> None:
        self._key = key
        self.limit: ConcurrencyLimit | None = None
        if len(key.urls) > 1 or key.discovery_seconds is not None:
            self.limit = ConcurrencyLimit(
                key.max_concurrent_requests,
                key.timeout_seconds,
                time.monotonic,
                time.time,
                is_of_several=True,
            )
        self._in_flight = 0
        self._turns = 0
        self._asked: Endpoint | None = None
        self._asked_until = -math.inf
        self.endpoints = tuple(Endpoint(url, key, self.limit) for url in key.urls)
        self.slots = Slots(key.max_concurrent_requests)
        self.waiting_for_admission = WaitQueue()
        self.joinable_calls = JoinableCalls()
        self.learned = LearnedSizes(time.monotonic)
        self.totals = Totals()
        self.model_questions: defaultdict[Any, RareQuestion[Any]] = defaultdict(
            lambda: RareQuestion(time.monotonic, time.sleep)
        )
        self.retry = key.retry
        self._timeout_seconds = key.timeout_seconds
        self.max_hold_seconds = max_hold_seconds(key.circuit_breaker)
        self._lock = threading.Lock()
        self._has_told_politeness = False
        self._discovery: Discovery | None = None
        if key.discovery_seconds is not None:
            self._discovery = Discovery(
                key.urls, key.discovery_seconds, self.replace, lambda: self.any_breaker_open
            )
            self._discovery.start()

    def __str__(self) -> str:
        return ", ".join(str(endpoint.url) for endpoint in self.endpoints)

    def close(self) -> None:
        """End the discovery, where there is one, and the use of shared memory."""
        if self._discovery is not None:
            self._discovery.stop()
        for endpoint in self.endpoints:
            endpoint.regions.close()

    def replace(self, urls: Sequence[EndpointUrl]) -> None:
        """Send requests to ``urls`` from now on; those in flight to others end where they are."""
        known = {endpoint.url: endpoint for endpoint in self.endpoints}
        self.endpoints = tuple(known.get(url) or Endpoint(url, self._key, self.limit) for url in urls)
        for endpoint in self.endpoints:
            self.wake_another(endpoint)

    @property
    def model_name(self) -> str:
        """The model that the requests are for."""
        return self._key.model_name

    @property
    def any_breaker_open(self) -> bool:
        """Whether some endpoint is unhealthy."""
        # Evaluated for each request: a generator would cost more than the question.
        for endpoint in self.endpoints:  # noqa: SIM110
            if not endpoint.is_healthy:
                return True
        return False

    @property
    def answered_at(self) -> float:
        """When an endpoint last answered."""
        return max(endpoint.answered_at for endpoint in self.endpoints)

    def view(
        self, tried: Sequence[Endpoint], sent_at: float, *, has_new_credentials: bool, was_stalled: bool
    ) -> EndpointView:
        """What `next_step` has to know after a request, sent at ``sent_at``, failed at the last endpoint of
        ``tried``."""
        endpoint = tried[-1]
        return EndpointView(
            is_healthy=endpoint.is_healthy,
            has_alternative=self.has_healthy_besides(tried),
            any_tried_unhealthy=any(not endpoint.is_healthy for endpoint in tried),
            overload_streak=endpoint.limit.overloads_in_a_row,
            has_new_credentials=has_new_credentials,
            has_answered=endpoint.answered_at > -math.inf,
            answered_meanwhile=endpoint.answered_at >= sent_at,
            was_stalled=was_stalled,
            is_ready=endpoint.checked_at >= sent_at - self._timeout_seconds,
            is_slow=endpoint.is_slow,
        )

    def silence_seconds(self, endpoint: Endpoint, silences: int, left_seconds: float) -> float:
        """How long a request to ``endpoint`` may hear nothing, see `Silence.bound_seconds`."""
        usual_seconds = endpoint.limit.usual_latency_seconds
        if usual_seconds is None and len(self.endpoints) > 1:
            others = [each.limit.usual_latency_seconds for each in self.endpoints]
            usual_seconds = max((seconds for seconds in others if seconds is not None), default=None)
        return endpoint.silence.bound_seconds(usual_seconds, silences, left_seconds)

    def admit(
        self,
        avoid: Collection[Endpoint],
        waited_seconds: float = math.inf,
        pinned: Endpoint | None = None,
    ) -> Admission | Refusal:
        """Permission to send to one endpoint, not one of ``avoid`` unless there is no other.

        With less ``waited_seconds`` than an answer usually takes, only where no request waits in its queue.
        To a ``pinned`` endpoint whatever its limit is: the sequence that goes on there began within it.
        """
        if pinned is not None:
            admission = self._try_enter(pinned, math.inf, within_limit=False)
            return admission or Refusal(self._open_seconds((pinned,)))
        endpoints = self.endpoints
        if len(endpoints) == 1:
            return self._try_enter(endpoints[0], waited_seconds) or Refusal(self._open_seconds(endpoints))
        if self.limit is not None and self._in_flight >= self.limit.limit:
            return Refusal(self._open_seconds(endpoints))
        preferred = [endpoint for endpoint in endpoints if endpoint not in avoid]
        for candidates in (preferred, endpoints if avoid else ()):
            for endpoint in sorted(candidates, key=_preference):
                admission = self._try_enter(endpoint, waited_seconds)
                if admission is not None:
                    return admission
        if self.limit is not None:
            # Or else it would not fall where those of the endpoints are what requests wait for.
            self.limit.was_reached = True
        return Refusal(self._open_seconds(endpoints))

    def leave(self, endpoint: Endpoint) -> None:
        self._left(endpoint)
        self.waiting_for_admission.wake_next()

    def to_ask(self, now: float) -> Endpoint | None:
        """The one of several endpoints whose statistics speak for all, where there may be a queue.

        Each by itself may get too few requests to be asked.
        """
        if self.limit is None or not self.limit.was_reached:
            return None
        if self._in_flight < 2 and self.waiting_for_admission.is_empty:
            return None
        if self._asked is None or now >= self._asked_until:
            self._asked, self._asked_until = random.choice(self.endpoints), now + _ASKED_SECONDS
        return self._asked if now >= self._asked.statistics.ask_at else None

    def is_overloaded(self, now: float) -> bool:
        """Whether an endpoint was overloaded a short time ago."""
        return any(now - endpoint.limit.overloaded_at < _OVERLOADED_SECONDS for endpoint in self.endpoints)

    @property
    def gives_way(self) -> bool:
        """Whether a background job sends less than it might, for others' sake."""
        return any(each.background is not None and each.background.gives_way for each in self.endpoints)

    def give_way(self) -> None:
        """Let a background job do what is known of others now, beside what `try_send` allows."""
        backgrounds = [each.background for each in self.endpoints if each.background is not None]
        self.learned.polite_rows = min((each.most_rows for each in backgrounds), default=UNLIMITED)
        if not self._has_told_politeness and not all(each.is_steered for each in backgrounds):
            self._has_told_politeness = True
            _logger.warning(
                "%s: it is not known how many requests for model %r are executed at a time, or for whom: "
                "politeness='background' sends them with the lowest priority at most, and as many as usual",
                self,
                self.model_name,
            )

    def next_turn_at(self) -> float:
        """When a request of a background job may try again; infinite where another's end decides."""
        return min(
            math.inf if each.background is None else each.background.next_turn_at(each.in_flight)
            for each in self.endpoints
        )

    def wake_another(self, endpoint: Endpoint) -> None:
        """Wake one more that waits for an admission, if ``endpoint`` has room: its limit may have grown."""
        if endpoint.in_flight < endpoint.limit.limit and (
            self.limit is None or self._in_flight < self.limit.limit
        ):
            self.waiting_for_admission.wake_next()

    def unhealthy_error(self, open_seconds: float, waited_seconds: float) -> TritonError:
        """The error of a request that is given up while all circuit breakers are open."""
        waited = f" after {waited_seconds:g} s of waiting" if waited_seconds else ""
        return CircuitOpenError(
            f"the circuit breaker of {self} is open{waited}: the request was not sent; "
            f"next probe in {open_seconds:.1f} s",
            open_seconds_left=open_seconds,
        )

    def busy_error(self, waited_seconds: float) -> TritonError:
        """The error of a request that is given up while endpoints are at their limits, and answer nothing."""
        limits = "+".join(str(endpoint.limit.limit) for endpoint in self.endpoints)
        return PoolTimeoutError(
            f"not sent within {waited_seconds:g} s: {self} is at its adaptive limit of {limits} requests "
            f"at a time, and others were queued first"
        )

    def has_healthy_besides(self, tried: Sequence[Endpoint]) -> bool:
        """Whether an endpoint that is not among ``tried`` is healthy."""
        return any(endpoint.is_healthy and endpoint not in tried for endpoint in self.endpoints)

    def _try_enter(
        self, endpoint: Endpoint, waited_seconds: float, *, within_limit: bool = True
    ) -> Admission | None:
        limit = most = endpoint.limit.limit
        limit_of_all = most_of_all = sys.maxsize if self.limit is None else self.limit.limit
        if waited_seconds < (endpoint.limit.usual_latency_seconds or 0.0):
            most = endpoint.limit.without_queue
            if self.limit is not None:
                most_of_all = self.limit.without_queue
        with self._lock:
            if within_limit:
                if endpoint.in_flight >= most or self._in_flight >= most_of_all:
                    return None
                if endpoint.background is not None and not endpoint.background.try_send(endpoint.in_flight):
                    return None
            endpoint.in_flight += 1
            self._in_flight += 1
            self._turns += 1
            endpoint.turn = self._turns
            if endpoint.in_flight >= limit:
                endpoint.limit.was_reached = True
            if self._in_flight >= limit_of_all and self.limit is not None:
                self.limit.was_reached = True
        permit = None
        if endpoint.breaker is not None:
            permit = endpoint.breaker.try_acquire()
            if permit is None:
                self._left(endpoint)
                return None
        return Admission(self, endpoint, permit)

    def _left(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.in_flight -= 1
            self._in_flight -= 1

    def _open_seconds(self, endpoints: Sequence[Endpoint]) -> float | None:
        waits = [
            endpoint.breaker.seconds_until_probe()
            for endpoint in endpoints
            if endpoint.breaker is not None and not endpoint.is_healthy
        ]
        return min(waits) if len(waits) == len(endpoints) else None


def _preference(endpoint: Endpoint) -> tuple[int, float, float]:
    load = endpoint.in_flight / max(1, endpoint.limit.limit)
    if endpoint.breaker is None or endpoint.is_healthy:
        return 1, load, endpoint.turn
    # A probe that is due comes first: while the others have room, this endpoint would never get a request.
    return 2 if endpoint.breaker.seconds_until_probe() > 0 else 0, load, endpoint.turn
