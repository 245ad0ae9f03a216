"""The circuit breaker: cases by hand, then random histories against a model that records every event."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from beam_triton.errors import ConfigurationError
from beam_triton.policy.circuit_breaker import CircuitBreaker, CircuitBreakerPolicy, State
from tests.support.clock import FakeClock

POLICY = CircuitBreakerPolicy(
    failure_threshold=0.5, minimum_requests=4, window_seconds=10, open_seconds=60, half_open_requests=3
)


def state_of(breaker: CircuitBreaker) -> State:
    """The state; a type checker would assume that the property still has the value of a line ago."""
    return breaker.state


class Sent:
    """A request that the breaker let through; reports its outcome once, as `Admission` does."""

    def __init__(self, breaker: CircuitBreaker, permit: int) -> None:
        self._breaker = breaker
        self._permit = permit
        self._has_ended = False

    def success(self) -> None:
        self._end(True)

    def failure(self, *, unreachable: bool = False) -> None:
        self._end(False, unreachable=unreachable)

    def release(self) -> None:
        self._end(None)

    def _end(self, healthy: bool | None, *, unreachable: bool = False) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._breaker.record(self._permit, healthy, unreachable=unreachable)


def try_send(breaker: CircuitBreaker) -> Sent | None:
    permit = breaker.try_acquire()
    return None if permit is None else Sent(breaker, permit)


def acquire(breaker: CircuitBreaker) -> Sent:
    sent = try_send(breaker)
    assert sent is not None
    return sent


def report(breaker: CircuitBreaker, *, successes: int = 0, failures: int = 0) -> None:
    for _ in range(successes):
        acquire(breaker).success()
    for _ in range(failures):
        acquire(breaker).failure()


def opened(clock: FakeClock, policy: CircuitBreakerPolicy = POLICY) -> CircuitBreaker:
    breaker = CircuitBreaker(policy, clock)
    report(breaker, failures=policy.minimum_requests)
    assert state_of(breaker) is State.OPEN
    return breaker


def half_opened(clock: FakeClock) -> CircuitBreaker:
    breaker = opened(clock)
    breaker.health_check_passed()
    assert state_of(breaker) is State.HALF_OPEN
    return breaker


def test_failure_threshold_opens_the_breaker() -> None:
    """Half of the outcomes failing is enough, fewer are not."""
    breaker = CircuitBreaker(POLICY, FakeClock())
    report(breaker, successes=4, failures=3)
    assert state_of(breaker) is State.CLOSED
    report(breaker, failures=1)
    assert state_of(breaker) is State.OPEN


def test_fewer_than_minimum_requests_do_not_open_the_breaker() -> None:
    """Failures alone prove nothing while there are too few outcomes."""
    breaker = CircuitBreaker(POLICY, FakeClock())
    report(breaker, failures=3)
    assert state_of(breaker) is State.CLOSED


def test_old_successes_do_not_hide_failures() -> None:
    """After hours of success a failing server is noticed as fast as ever."""
    clock = FakeClock()
    breaker = CircuitBreaker(POLICY, clock)
    for _ in range(100):
        report(breaker, successes=100)
        clock.advance(1.0)
    clock.advance(POLICY.window_seconds)
    report(breaker, failures=4)
    assert state_of(breaker) is State.OPEN


def test_failures_outside_the_window_do_not_count() -> None:
    """Failures farther apart than the window never open the breaker."""
    clock = FakeClock()
    breaker = CircuitBreaker(POLICY, clock)
    for _ in range(50):
        report(breaker, failures=1)
        clock.advance(POLICY.window_seconds / 2)
    assert state_of(breaker) is State.CLOSED


def test_threshold_of_one_requires_only_failures() -> None:
    """With a threshold of 1, one success within the window keeps the breaker closed."""
    policy = CircuitBreakerPolicy(failure_threshold=1, minimum_requests=4)
    breaker = CircuitBreaker(policy, FakeClock())
    report(breaker, successes=1, failures=100)
    assert state_of(breaker) is State.CLOSED


def test_open_breaker_admits_nothing_for_open_seconds() -> None:
    """After ``open_seconds`` it admits probes."""
    clock = FakeClock()
    breaker = opened(clock)
    assert (breaker.try_acquire(), breaker.seconds_until_probe()) == (None, 60.0)
    clock.advance(59.0)
    assert (breaker.try_acquire(), breaker.seconds_until_probe()) == (None, 1.0)
    clock.advance(1.0)
    assert breaker.seconds_until_probe() == 0.0
    acquire(breaker)
    assert state_of(breaker) is State.HALF_OPEN


def test_half_open_breaker_admits_only_its_probes() -> None:
    """At most ``half_open_requests`` are in flight, and a caller without one has to look again soon."""
    breaker = half_opened(FakeClock())
    for _ in range(3):
        assert breaker.seconds_until_probe() == 0.0
        acquire(breaker)
    assert breaker.try_acquire() is None
    assert 0 < breaker.seconds_until_probe() <= 0.1


def test_successful_probes_close_the_breaker() -> None:
    """All probes have to succeed; then every request is admitted, and old failures are forgotten."""
    breaker = half_opened(FakeClock())
    probes = [acquire(breaker) for _ in range(3)]
    for probe in probes:
        assert state_of(breaker) is State.HALF_OPEN
        probe.success()
    assert state_of(breaker) is State.CLOSED
    report(breaker, successes=1, failures=2)
    assert state_of(breaker) is State.CLOSED


def test_succeeded_probes_count_towards_half_open_requests() -> None:
    """After two of three successes one more probe is admitted, not three."""
    breaker = half_opened(FakeClock())
    report(breaker, successes=2)
    acquire(breaker)
    assert breaker.try_acquire() is None


def test_failed_probe_reopens_the_breaker_for_open_seconds() -> None:
    """One failed probe is enough, whatever the outcome of the others, before or after."""
    clock = FakeClock()
    breaker = half_opened(clock)
    good, bad, late = (acquire(breaker) for _ in range(3))
    clock.advance(7.0)
    good.success()
    bad.failure()
    late.success()
    assert (state_of(breaker), breaker.seconds_until_probe()) == (State.OPEN, 60.0)


def test_outcomes_before_opening_are_forgotten() -> None:
    """A closed breaker starts with an empty window, even if the old window is not over."""
    breaker = CircuitBreaker(POLICY, FakeClock())
    report(breaker, successes=3, failures=3)
    assert state_of(breaker) is State.OPEN
    breaker.health_check_passed()
    report(breaker, successes=3)
    report(breaker, successes=1, failures=2)
    assert state_of(breaker) is State.CLOSED
    report(breaker, failures=1)
    assert state_of(breaker) is State.OPEN


def test_successes_do_not_carry_over_to_the_next_probing() -> None:
    """Successes of probes before a failed one do not count towards the next closing."""
    breaker = half_opened(FakeClock())
    report(breaker, successes=2, failures=1)
    breaker.health_check_passed()
    report(breaker, successes=2)
    assert state_of(breaker) is State.HALF_OPEN
    report(breaker, successes=1)
    assert state_of(breaker) is State.CLOSED


def test_released_probe_admits_another_one() -> None:
    """Probes that say nothing about the server (a rejected element) do not use up the allowance."""
    breaker = half_opened(FakeClock())
    for _ in range(100):
        acquire(breaker).release()
    assert state_of(breaker) is State.HALF_OPEN
    report(breaker, successes=3)
    assert state_of(breaker) is State.CLOSED


def test_outcome_of_a_stale_permit_is_ignored() -> None:
    """Outcomes of requests sent before a change of state do not affect the new state."""
    clock = FakeClock()
    breaker = CircuitBreaker(POLICY, clock)
    before_opening = [acquire(breaker) for _ in range(20)]
    report(breaker, failures=4)
    breaker.health_check_passed()
    probe = acquire(breaker)
    for number, permit in enumerate(before_opening):
        (permit.success, permit.failure, permit.release)[number % 3]()
    assert state_of(breaker) is State.HALF_OPEN
    acquire(breaker), acquire(breaker)
    assert breaker.try_acquire() is None
    probe.failure()
    assert state_of(breaker) is State.OPEN


def test_passed_health_check_only_starts_the_probes() -> None:
    """Readiness ends ``open_seconds`` early, but only requests close the breaker."""
    breaker = CircuitBreaker(POLICY, FakeClock())
    breaker.health_check_passed()
    assert state_of(breaker) is State.CLOSED
    breaker = half_opened(FakeClock())
    acquire(breaker).success()
    for _ in range(10):
        breaker.health_check_passed()
    assert state_of(breaker) is State.HALF_OPEN
    report(breaker, successes=2)
    assert state_of(breaker) is State.CLOSED


def test_one_health_check_per_interval() -> None:
    """However many DoFns wait, an unhealthy server is checked once per interval, and only while open."""
    clock = FakeClock()
    breaker = CircuitBreaker(POLICY, clock)
    assert not breaker.claim_health_check()
    breaker = opened(clock)
    assert not breaker.claim_health_check()
    clock.advance(1.0)
    assert [breaker.claim_health_check() for _ in range(5)] == [True, False, False, False, False]
    clock.advance(1.0)
    assert [breaker.claim_health_check() for _ in range(2)] == [True, False]
    breaker.health_check_passed()
    clock.advance(10.0)
    assert not breaker.claim_health_check()


def test_health_checks_can_be_disabled() -> None:
    """Without an interval no caller is asked to check."""
    clock = FakeClock()
    breaker = opened(clock, CircuitBreakerPolicy(health_check_interval_seconds=None))
    clock.advance(1000.0)
    assert not breaker.claim_health_check()


def test_listener_is_called_outside_the_lock() -> None:
    """The listener gets old and new state once per change, and may use the breaker."""
    clock = FakeClock()
    changes: list[tuple[State, State]] = []

    def listen(old: State, new: State) -> None:
        changes.append((old, new))
        breaker.seconds_until_probe()

    breaker = CircuitBreaker(POLICY, clock, listen)
    report(breaker, failures=4)
    clock.advance(60.0)
    report(breaker, failures=1)
    breaker.health_check_passed()
    report(breaker, successes=3)
    assert changes == [
        (State.CLOSED, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.CLOSED),
    ]


def test_threads_never_exceed_half_open_requests() -> None:
    """Many threads that ask at the same time get the allowed probes and not one more."""
    breaker = half_opened(FakeClock())
    permits: list[int | None] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        permits.extend([breaker.try_acquire() for _ in range(50)])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(permits), sum(permit is not None for permit in permits)) == (400, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"failure_threshold": 0},
        {"failure_threshold": 1.01},
        {"minimum_requests": 0},
        {"half_open_requests": 0},
        {"window_seconds": 0},
        {"open_seconds": math.inf},
        {"when_open": "wat"},
        {"max_wait_seconds": -1},
        {"health_check_interval_seconds": 0},
    ],
)
def test_policy_out_of_range_is_rejected(options: dict[str, object]) -> None:
    """Each field is checked, and the error names it."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        CircuitBreakerPolicy.from_options(options)


class BreakerHistory(RuleBasedStateMachine):
    """Requests, outcomes and time in any order, against a model that records every outcome's time.

    Time moves in whole buckets of the window, so that the breaker's window of ten buckets is exact.
    """

    POLICY = CircuitBreakerPolicy(
        failure_threshold=0.6, minimum_requests=3, window_seconds=10, open_seconds=15, half_open_requests=2
    )

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.changes: list[tuple[State, State]] = []
        self.breaker = CircuitBreaker(
            self.POLICY, self.clock, lambda old, new: self.changes.append((old, new))
        )
        self.state = State.CLOSED
        self.changed_at = 0.0
        self.outcomes: list[tuple[float, bool]] = []
        self.probes_succeeded = 0
        self.out: list[Sent] = []
        self.stale: list[Sent] = []

    def enter(self, state: State) -> None:
        self.state, self.changed_at = state, self.clock()
        self.outcomes, self.probes_succeeded = [], 0
        self.stale += self.out
        self.out = []

    @rule(seconds=st.integers(1, 20))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def ask(self) -> None:
        if self.state is State.OPEN and self.clock() - self.changed_at >= self.POLICY.open_seconds:
            self.enter(State.HALF_OPEN)
        allowed_requests = {
            State.CLOSED: math.inf,
            State.OPEN: 0,
            State.HALF_OPEN: self.POLICY.half_open_requests - self.probes_succeeded - len(self.out),
        }[self.state]
        waits = self.breaker.seconds_until_probe()
        permit = try_send(self.breaker)
        assert (permit is not None) == (allowed_requests > 0) == (waits == 0)
        if permit is not None:
            self.out.append(permit)

    @precondition(lambda self: self.out)
    @rule(pick=st.randoms(use_true_random=False), outcome=st.sampled_from(["success", "failure", "release"]))
    def end(self, pick: object, outcome: str) -> None:
        permit = self.out.pop(pick.randrange(len(self.out)))  # type: ignore[attr-defined]  # a Random
        self.stale.append(permit)
        getattr(permit, outcome)()
        if outcome == "release":
            return
        if self.state is State.HALF_OPEN:
            if outcome == "failure":
                self.enter(State.OPEN)
            else:
                self.probes_succeeded += 1
                if self.probes_succeeded == self.POLICY.half_open_requests:
                    self.enter(State.CLOSED)
            return
        now = self.clock()
        self.outcomes.append((now, outcome == "failure"))
        recent = [failed for when, failed in self.outcomes if now - when < self.POLICY.window_seconds]
        if len(recent) >= self.POLICY.minimum_requests and sum(recent) >= 0.6 * len(recent):
            self.enter(State.OPEN)

    @precondition(lambda self: self.stale)
    @rule(pick=st.randoms(use_true_random=False), outcome=st.sampled_from(["success", "failure", "release"]))
    def report_stale_outcome(self, pick: object, outcome: str) -> None:
        getattr(pick.choice(self.stale), outcome)()  # type: ignore[attr-defined]  # a Random

    @rule()
    def health_check_passes(self) -> None:
        self.breaker.health_check_passed()
        if self.state is State.OPEN:
            self.enter(State.HALF_OPEN)

    @invariant()
    def the_states_agree(self) -> None:
        assert state_of(self.breaker) is self.state
        allowed = {
            (State.CLOSED, State.OPEN),
            (State.OPEN, State.HALF_OPEN),
            (State.HALF_OPEN, State.OPEN),
            (State.HALF_OPEN, State.CLOSED),
        }
        assert set(self.changes) <= allowed
        assert all(old[1] is new[0] for old, new in zip(self.changes, self.changes[1:], strict=False))

    def teardown(self) -> None:
        """After any history, a server that is healthy again is used again."""
        for permit in self.out + self.stale:
            permit.release()
        self.clock.advance(self.POLICY.open_seconds)
        while state_of(self.breaker) is not State.CLOSED:
            acquire(self.breaker).success()
        acquire(self.breaker)


TestBreakerHistory = BreakerHistory.TestCase
TestBreakerHistory.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_unreachable_server_opens_the_breaker_despite_recent_successes() -> None:
    """As many requests in a row as ``unreachable_limit`` open it, whatever succeeded a moment ago."""
    breaker = CircuitBreaker(POLICY, FakeClock(), unreachable_limit=3)
    report(breaker, successes=1000)
    for _ in range(2):
        acquire(breaker).failure(unreachable=True)
    report(breaker, successes=1)
    for _ in range(2):
        acquire(breaker).failure(unreachable=True)
    assert state_of(breaker) is State.CLOSED
    acquire(breaker).failure(unreachable=True)
    assert state_of(breaker) is State.OPEN


def test_answered_failures_do_not_count_as_unreachable() -> None:
    """Failures with an answer neither open it by their number nor interrupt a row of unreachable ones."""
    breaker = CircuitBreaker(POLICY, FakeClock(), unreachable_limit=3)
    report(breaker, successes=1000, failures=10)
    assert state_of(breaker) is State.CLOSED
    acquire(breaker).failure(unreachable=True)
    acquire(breaker).failure(unreachable=True)
    report(breaker, failures=1)
    acquire(breaker).failure(unreachable=True)
    assert state_of(breaker) is State.OPEN
