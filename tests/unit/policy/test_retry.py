"""Retries: how long to wait, when to give up, and how many a server may be given."""

from __future__ import annotations

import math
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import (
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    InvalidRequestError,
    LocalProtocolError,
    ModelExecutionError,
    ServerOverloadedError,
    ServerUnavailableError,
    TlsError,
    TritonError,
)
from beam_triton.policy.retry import BUDGET_WINDOW_SECONDS, RetryBudget, RetryPolicy, decide
from tests.support.clock import FakeClock

POLICY = RetryPolicy(max_retries=4, initial_backoff_seconds=1.0, max_backoff_seconds=6.0)


def lowest() -> float:
    return 0.0


def highest() -> float:
    return math.nextafter(1.0, 0.0)


def wait(
    error: TritonError,
    attempts_made: int = 1,
    server_error_attempts: int = 0,
    *,
    policy: RetryPolicy = POLICY,
    sequence: bool = False,
    remaining_seconds: float = 1000.0,
) -> float | None:
    """The decision when the random half of the backoff comes out as nothing."""
    return decide(
        policy,
        error,
        attempts_made,
        server_error_attempts,
        sequence=sequence,
        remaining_seconds=remaining_seconds,
        random=lowest,
    )


@pytest.mark.parametrize(("retry_number", "full"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 6.0), (5, 6.0)])
def test_backoff_doubles_up_to_the_maximum_with_equal_jitter(retry_number: int, full: float) -> None:
    """Half of the backoff is fixed, the other half random."""
    assert POLICY.backoff_seconds(retry_number, lowest) == full / 2
    assert POLICY.backoff_seconds(retry_number, highest) == pytest.approx(full)


@given(st.integers(min_value=1), st.floats(min_value=0, max_value=1, exclude_max=True))
def test_backoff_never_overflows(retry_number: int, chance: float) -> None:
    """However many retries were made, the wait is a number within the policy's bounds."""
    seconds = POLICY.backoff_seconds(retry_number, lambda: chance)
    assert 0.5 <= seconds <= 6.0


def test_jitter_spreads_clients_evenly() -> None:
    """Clients that failed together come back spread over the random half."""
    generator = random.Random(7)
    waits = [POLICY.backoff_seconds(3, generator.random) for _ in range(4000)]
    per_quarter = [sum(2 + n / 2 <= wait < 2.5 + n / 2 for wait in waits) for n in range(4)]
    assert sum(per_quarter) == 4000
    assert all(900 < count < 1100 for count in per_quarter)


def test_the_number_of_retries_is_bounded() -> None:
    """``max_retries`` counts the attempts after the first one, and 0 allows none."""
    waits = [wait(ConnectError("refused"), attempts) for attempts in range(1, 6)]
    assert waits == [0.5, 1.0, 2.0, 3.0, None]
    assert wait(ConnectError("refused"), policy=RetryPolicy(max_retries=0)) is None


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("bad shape", status=400),
        LocalProtocolError("bad dtype"),
        TlsError("expired"),
        ConfigurationError("no"),
    ],
)
def test_what_cannot_succeed_is_not_retried(error: TritonError) -> None:
    """An error that says it is not retryable is final at its first attempt."""
    assert wait(error) is None


def test_an_open_breaker_is_not_retried() -> None:
    """The breaker's policy has decided about waiting already."""
    assert wait(CircuitOpenError("open", open_seconds_left=1.0)) is None


def test_a_plain_500_is_retried_as_often_as_the_policy_says() -> None:
    """Retries of a model that raised have a bound of their own, others do not count towards it."""
    error = ModelExecutionError("raised", status=500)
    assert wait(error, 1, 1) is not None
    assert wait(error, 3, 1) is not None
    assert wait(error, 2, 2) is None
    assert wait(error, 1, 1, policy=RetryPolicy(max_server_error_retries=0)) is None
    assert wait(ConnectError("refused"), 3, 2) is not None


def test_a_sequence_request_that_may_have_run_is_not_repeated() -> None:
    """A model that keeps state must not see a request twice; what surely did not arrive is sent again."""
    assert wait(ConnectionLostError("reset"), sequence=True) is None
    assert wait(ModelExecutionError("raised", status=500), 1, 1, sequence=True) is None
    assert wait(ConnectError("refused"), sequence=True) is not None
    assert wait(ConnectionLostError("reset"), sequence=False) is not None


def test_retry_after_is_waited_for() -> None:
    """The server's wish replaces a shorter fixed half, and jitter stays on top of it."""
    error = ServerOverloadedError("busy", status=429, retry_after_seconds=5.0)
    assert wait(error) == 5.0
    late = decide(POLICY, error, 1, 0, sequence=False, remaining_seconds=99.0, random=highest)
    assert late == pytest.approx(5.5)


@pytest.mark.parametrize("retry_after_seconds", [0.0, 0.1, 2.0, None])
def test_a_short_retry_after_does_not_shorten_the_backoff(retry_after_seconds: float | None) -> None:
    """A server that always says zero does not turn retries into a busy loop."""
    error = ServerUnavailableError("down", status=503, retry_after_seconds=retry_after_seconds)
    assert wait(error, 3) == 2.0


@pytest.mark.parametrize(
    ("remaining_seconds", "expected"), [(5.1, 5.0), (5.0, 2.5), (4.0, 2.0), (0.1, None), (-1.0, None)]
)
def test_the_deadline_caps_a_retry_after(remaining_seconds: float, expected: float | None) -> None:
    """Half of what is left is waited for, and nothing where even the shortest backoff is too long."""
    error = ServerOverloadedError("busy", status=503, retry_after_seconds=5.0)
    assert wait(error, remaining_seconds=remaining_seconds) == expected


def test_a_backoff_is_cut_to_what_the_deadline_leaves() -> None:
    """A server that comes back before the deadline is found; a wait of next to nothing is not begun."""
    error = ConnectionLostError("reset")
    assert wait(error, 4) == 3.0
    assert wait(error, 4, remaining_seconds=2.0) == 1.0
    assert wait(error, 4, remaining_seconds=0.01) is None


@pytest.mark.parametrize(
    "options",
    [
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"max_server_error_retries": -1},
        {"initial_backoff_seconds": 0},
        {"max_backoff_seconds": math.inf},
        {"budget_ratio": -0.1},
        {"budget_min_per_second": math.nan},
    ],
)
def test_a_policy_out_of_range_is_refused(options: dict[str, object]) -> None:
    """Each field is checked, and named."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        RetryPolicy.from_options(options)


def test_a_quiet_job_may_retry() -> None:
    """Without any requests counted, the minimum a second is to be had, and no more."""
    clock = FakeClock()
    budget = RetryBudget(RetryPolicy(budget_min_per_second=0.5), clock)
    assert [budget.try_spend() for _ in range(7)] == [True] * 5 + [False] * 2


def test_a_retry_is_remembered_for_the_whole_window() -> None:
    """Wherever in a bucket of time a retry falls, its token is back after ten seconds and not before."""
    clock = FakeClock(1000.95)
    budget = RetryBudget(RetryPolicy(budget_ratio=0, budget_min_per_second=0.1), clock)
    assert budget.try_spend()
    clock.advance(9.9)
    assert not budget.try_spend()
    clock.advance(1.1)
    assert budget.try_spend()


def test_a_sick_server_gets_a_tenth_more_than_a_healthy_one() -> None:
    """With every request failing and being retried at once, retries stay at the ratio plus the minimum."""
    clock = FakeClock()
    budget = RetryBudget(RetryPolicy(budget_ratio=0.1, budget_min_per_second=1.0), clock)
    retries = 0
    for _ in range(60_000):
        budget.record_request()
        retries += budget.try_spend()
        clock.advance(0.001)
    assert 60_000 * 0.1 * 0.8 < retries <= 60_000 * 0.1 + 60 + BUDGET_WINDOW_SECONDS


@given(
    steps=st.lists(
        st.tuples(st.floats(min_value=0, max_value=3), st.integers(0, 30), st.integers(0, 30)), max_size=40
    ),
    ratio=st.sampled_from([0.0, 0.1, 1.0]),
    free=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_budget_holds_over_every_window_that_ends_in_a_retry(
    steps: list[tuple[float, int, int]], ratio: float, free: float
) -> None:
    """Retries of the last ten seconds never exceed their share of that time's requests."""
    clock = FakeClock()
    budget = RetryBudget(RetryPolicy(budget_ratio=ratio, budget_min_per_second=free), clock)
    requests, retries = list[float](), list[float]()
    for pause_seconds, new_requests, new_retries in steps:
        clock.advance(pause_seconds)
        for _ in range(new_requests):
            budget.record_request()
            requests.append(clock())
        for _ in range(new_retries):
            if not budget.try_spend():
                break
            retries.append(clock())
            recent = clock() - BUDGET_WINDOW_SECONDS
            allowed = ratio * sum(when >= recent for when in requests) + free * BUDGET_WINDOW_SECONDS
            assert sum(when > recent for when in retries) <= allowed


@given(
    pauses=st.lists(st.floats(min_value=0, max_value=3), min_size=1, max_size=30),
    free=st.sampled_from([0.1, 0.3, 1.0]),
)
def test_a_token_is_there_when_it_was_said_to_be(pauses: list[float], free: float) -> None:
    """Whoever waits for as long as the budget says gets a retry, and nobody is sent to sleep for nothing."""
    clock = FakeClock()
    budget = RetryBudget(RetryPolicy(budget_ratio=0.5, budget_min_per_second=free), clock)
    for pause_seconds in pauses:
        clock.advance(pause_seconds)
        budget.record_request()
        while budget.try_spend():
            pass
    seconds = budget.seconds_until_token()
    assert seconds > 0
    clock.advance(seconds + 1e-6)
    assert budget.seconds_until_token() == 0.0
    assert budget.try_spend()


def test_a_budget_of_nothing_says_that_waiting_is_in_vain() -> None:
    """Without ratio and minimum there is never a token."""
    budget = RetryBudget(RetryPolicy(budget_ratio=0, budget_min_per_second=0), FakeClock())
    budget.record_request()
    assert not budget.try_spend()
    assert budget.seconds_until_token() == math.inf


def test_threads_share_one_budget() -> None:
    """However many threads spend at once, the sum is the budget's."""
    budget = RetryBudget(RetryPolicy(budget_ratio=0, budget_min_per_second=10), FakeClock())
    spent: list[bool] = []
    start = threading.Barrier(8)

    def spend() -> None:
        start.wait()
        spent.extend([budget.try_spend() for _ in range(50)])

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(spent), sum(spent)) == (400, 100)
