"""The circuit breaker: cases by hand, then random histories against a model that keeps every event."""

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
    """The state, where a type checker would take the property to be what it was a line ago."""
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


def test_the_share_of_failures_opens_it() -> None:
    """Half of the outcomes failing is enough, less is not."""
    breaker = CircuitBreaker(POLICY, FakeClock())
    report(breaker, successes=4, failures=3)
    assert state_of(breaker) is State.CLOSED
    report(breaker, failures=1)
    assert state_of(breaker) is State.OPEN


def test_few_outcomes_do_not_open_it() -> None:
    """Failures alone prove nothing before there are enough outcomes."""
    breaker = CircuitBreaker(POLICY, FakeClock())
    report(breaker, failures=3)
    assert state_of(breaker) is State.CLOSED


def test_old_successes_do_not_hide_failures() -> None:
    """After hours of success a sick server is noticed as fast as ever."""
    clock = FakeClock()
    breaker = CircuitBreaker(POLICY, clock)
    for _ in range(100):
        report(breaker, successes=100)
        clock.advance(1.0)
    clock.advance(POLICY.window_seconds)
    report(breaker, failures=4)
    assert state_of(breaker) is State.OPEN


def test_old_failures_are_forgiven() -> None:
    """Failures farther apart than the window never open it."""
    clock = FakeClock()
    breaker = CircuitBreaker(POLICY, clock)
    for _ in range(50):
        report(breaker, failures=1)
        clock.advance(POLICY.window_seconds / 2)
    assert state_of(breaker) is State.CLOSED


def test_a_threshold_of_one_wants_failures_only() -> None:
    """With a threshold of 1, one success within the window keeps it closed."""
    policy = CircuitBreakerPolicy(failure_threshold=1, minimum_requests=4)
    breaker = CircuitBreaker(policy, FakeClock())
    report(breaker, successes=1, failures=100)
    assert state_of(breaker) is State.CLOSED


def test_open_lets_nothing_pass_until_its_time_is_over() -> None:
    """Nothing is sent for ``open_seconds``, then the probes are."""
    clock = FakeClock()
    breaker = opened(clock)
    assert (breaker.try_acquire(), breaker.seconds_until_probe()) == (None, 60.0)
    clock.advance(59.0)
    assert (breaker.try_acquire(), breaker.seconds_until_probe()) == (None, 1.0)
    clock.advance(1.0)
    assert breaker.seconds_until_probe() == 0.0
    acquire(breaker)
    assert state_of(breaker) is State.HALF_OPEN


def test_half_open_lets_only_its_probes_pass() -> None:
    """No more than ``half_open_requests`` are out at a time, and the next has to look again soon."""
    breaker = half_opened(FakeClock())
    for _ in range(3):
        assert breaker.seconds_until_probe() == 0.0
        acquire(breaker)
    assert breaker.try_acquire() is None
    assert 0 < breaker.seconds_until_probe() <= 0.1


def test_successful_probes_close_it() -> None:
    """All probes have to succeed; then everything passes, and old failures are forgotten."""
    breaker = half_opened(FakeClock())
    probes = [acquire(breaker) for _ in range(3)]
    for probe in probes:
        assert state_of(breaker) is State.HALF_OPEN
        probe.success()
    assert state_of(breaker) is State.CLOSED
    report(breaker, successes=1, failures=2)
    assert state_of(breaker) is State.CLOSED


def test_probes_that_succeeded_take_up_their_place() -> None:
    """Between two of three successes one more probe may go out, not three."""
    breaker = half_opened(FakeClock())
    report(breaker, successes=2)
    acquire(breaker)
    assert breaker.try_acquire() is None


def test_a_failed_probe_opens_it_for_the_whole_time() -> None:
    """One failure among the probes is enough, whatever the others said or will say."""
    clock = FakeClock()
    breaker = half_opened(clock)
    good, bad, late = (acquire(breaker) for _ in range(3))
    clock.advance(7.0)
    good.success()
    bad.failure()
    late.success()
    assert (state_of(breaker), breaker.seconds_until_probe()) == (State.OPEN, 60.0)


def test_what_was_before_it_opened_is_forgotten() -> None:
    """A closed breaker starts with an empty window, even within the old one's time."""
    breaker = CircuitBreaker(POLICY, FakeClock())
    report(breaker, successes=3, failures=3)
    assert state_of(breaker) is State.OPEN
    breaker.health_check_passed()
    report(breaker, successes=3)
    report(breaker, successes=1, failures=2)
    assert state_of(breaker) is State.CLOSED
    report(breaker, failures=1)
    assert state_of(breaker) is State.OPEN


def test_each_time_of_probing_needs_all_its_successes() -> None:
    """Successes of probes before a failed one do not count towards the next closing."""
    breaker = half_opened(FakeClock())
    report(breaker, successes=2, failures=1)
    breaker.health_check_passed()
    report(breaker, successes=2)
    assert state_of(breaker) is State.HALF_OPEN
    report(breaker, successes=1)
    assert state_of(breaker) is State.CLOSED


def test_a_released_probe_frees_its_place() -> None:
    """Probes that say nothing of the server (a rejected element) never use up the places."""
    breaker = half_opened(FakeClock())
    for _ in range(100):
        acquire(breaker).release()
    assert state_of(breaker) is State.HALF_OPEN
    report(breaker, successes=3)
    assert state_of(breaker) is State.CLOSED


def test_a_stale_permit_changes_nothing() -> None:
    """Outcomes of requests sent before a change of state do not judge the state after it."""
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


def test_a_passed_health_check_starts_the_probes_and_no_more() -> None:
    """Readiness ends the open time early, but only requests close the breaker; elsewhere it is nothing."""
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


def test_one_caller_an_interval_checks_the_health() -> None:
    """However many DoFns wait, the sick server is asked once an interval, and only while it is open."""
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


def test_health_checks_can_be_off() -> None:
    """Without an interval nobody is ever asked to check."""
    clock = FakeClock()
    breaker = opened(clock, CircuitBreakerPolicy(health_check_interval_seconds=None))
    clock.advance(1000.0)
    assert not breaker.claim_health_check()


def test_every_change_is_told_outside_the_lock() -> None:
    """The listener hears old and new state once a change, and may use the breaker."""
    clock = FakeClock()
    told: list[tuple[State, State]] = []

    def listen(old: State, new: State) -> None:
        told.append((old, new))
        breaker.seconds_until_probe()

    breaker = CircuitBreaker(POLICY, clock, listen)
    report(breaker, failures=4)
    clock.advance(60.0)
    report(breaker, failures=1)
    breaker.health_check_passed()
    report(breaker, successes=3)
    assert told == [
        (State.CLOSED, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.CLOSED),
    ]


def test_threads_never_have_more_probes_out_than_allowed() -> None:
    """Many threads asking at once get the half-open places and not one more."""
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
def test_a_policy_out_of_range_is_refused(options: dict[str, object]) -> None:
    """Each field is checked, and named."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        CircuitBreakerPolicy.from_options(options)


class BreakerHistory(RuleBasedStateMachine):
    """Requests, outcomes and time in any order, against a model that keeps every outcome's time.

    Time moves in whole buckets of the window, where the breaker's window of ten buckets is exact.
    """

    POLICY = CircuitBreakerPolicy(
        failure_threshold=0.6, minimum_requests=3, window_seconds=10, open_seconds=15, half_open_requests=2
    )

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.told: list[tuple[State, State]] = []
        self.breaker = CircuitBreaker(self.POLICY, self.clock, lambda old, new: self.told.append((old, new)))
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
        places = {
            State.CLOSED: math.inf,
            State.OPEN: 0,
            State.HALF_OPEN: self.POLICY.half_open_requests - self.probes_succeeded - len(self.out),
        }[self.state]
        waits = self.breaker.seconds_until_probe()
        permit = try_send(self.breaker)
        assert (permit is not None) == (places > 0) == (waits == 0)
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
    def report_what_is_over(self, pick: object, outcome: str) -> None:
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
        assert set(self.told) <= allowed
        assert all(old[1] is new[0] for old, new in zip(self.told, self.told[1:], strict=False))

    def teardown(self) -> None:
        """Whatever happened, a server that is well again is let in again."""
        for permit in self.out + self.stale:
            permit.release()
        self.clock.advance(self.POLICY.open_seconds)
        while state_of(self.breaker) is not State.CLOSED:
            acquire(self.breaker).success()
        acquire(self.breaker)


TestBreakerHistory = BreakerHistory.TestCase
TestBreakerHistory.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_a_server_that_is_away_is_noticed_after_a_busy_time() -> None:
    """So many requests in a row that find nobody open it, whatever succeeded a moment ago."""
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


def test_a_model_that_fails_is_not_away() -> None:
    """Failures that somebody answered neither open it by their number nor end a row of the others."""
    breaker = CircuitBreaker(POLICY, FakeClock(), unreachable_limit=3)
    report(breaker, successes=1000, failures=10)
    assert state_of(breaker) is State.CLOSED
    acquire(breaker).failure(unreachable=True)
    acquire(breaker).failure(unreachable=True)
    report(breaker, failures=1)
    acquire(breaker).failure(unreachable=True)
    assert state_of(breaker) is State.OPEN
