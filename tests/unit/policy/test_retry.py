"""Retries: how long to wait, when to give up, and how many a server may receive."""

from __future__ import annotations

import dataclasses
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import (
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    LocalProtocolError,
    ModelExecutionError,
    ProxyError,
    ServerOverloadedError,
    ServerUnavailableError,
    SharedMemoryError,
    SilentConnectionError,
    TlsError,
    TritonError,
)
from beam_triton.policy.retry import (
    BUDGET_WINDOW_SECONDS,
    CERTAIN,
    HALF_CERTAIN,
    EndpointView,
    Fail,
    History,
    Hold,
    Limits,
    Resend,
    Retry,
    RetryBudget,
    RetryPolicy,
    Step,
    next_step,
    repeat,
)
from tests.support.clock import FakeClock

POLICY = RetryPolicy(max_retries=4, initial_backoff_seconds=1.0, max_backoff_seconds=6.0)


def lowest() -> float:
    return 0.0


def highest() -> float:
    return math.nextafter(1.0, 0.0)


def step(
    error: TritonError,
    attempts_made: int = 1,
    server_error_attempts: int = 0,
    *,
    policy: RetryPolicy = POLICY,
    remaining_seconds: float = 1000.0,
    hold_seconds: float = 0.0,
    sequence: bool = False,
    was_in_shared_memory: bool = False,
    endpoint: EndpointView = EndpointView(),  # noqa: B008 # immutable
    holds: int = 0,
    suspicion: int = 0,
    random: Callable[[], float] = lowest,
) -> Step:
    """The decision after ``attempts_made``, ``server_error_attempts`` of which ended in a plain 500."""
    others = attempts_made - server_error_attempts
    errors = [*[ConnectError("refused")] * others, *[ModelExecutionError("raised")] * server_error_attempts]
    history = History((*errors[: attempts_made - 1], error), holds=holds, suspicion=suspicion)
    limits = Limits(
        remaining_seconds,
        hold_seconds,
        is_sequence=sequence,
        was_in_shared_memory=was_in_shared_memory,
    )
    return next_step(policy, error, history, limits, endpoint, random)


def wait(
    error: TritonError,
    attempts_made: int = 1,
    server_error_attempts: int = 0,
    *,
    policy: RetryPolicy = POLICY,
    sequence: bool = False,
    remaining_seconds: float = 1000.0,
    random: Callable[[], float] = lowest,
) -> float | None:
    """The backoff before the retry; None where the error is final."""
    decision = step(
        error,
        attempts_made,
        server_error_attempts,
        policy=policy,
        sequence=sequence,
        remaining_seconds=remaining_seconds,
        random=random,
    )
    assert isinstance(decision, Retry | Fail)
    return decision.after_seconds if isinstance(decision, Retry) else None


def backoff_seconds(retry_number: int, random: Callable[[], float]) -> float:
    policy = dataclasses.replace(POLICY, max_retries=retry_number)
    seconds = wait(ConnectError("refused"), retry_number, policy=policy, random=random)
    assert seconds is not None
    return seconds


@pytest.mark.parametrize(("retry_number", "full"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 6.0), (5, 6.0)])
def test_backoff_doubles_up_to_the_maximum_with_equal_jitter(retry_number: int, full: float) -> None:
    """Half of the backoff is fixed, the other half random."""
    assert backoff_seconds(retry_number, lowest) == full / 2
    assert backoff_seconds(retry_number, highest) == pytest.approx(full)


@given(st.integers(1, 200), st.floats(min_value=0, max_value=1, exclude_max=True))
def test_backoff_never_overflows(retry_number: int, chance: float) -> None:
    """After any number of retries the backoff is a number within the policy's bounds."""
    seconds = backoff_seconds(retry_number, lambda: chance)
    assert 0.5 <= seconds <= 6.0


def test_jitter_spreads_clients_evenly() -> None:
    """Clients that failed together return spread over the random half."""
    generator = random.Random(7)
    waits = [backoff_seconds(3, generator.random) for _ in range(4000)]
    per_quarter = [sum(2 + n / 2 <= wait < 2.5 + n / 2 for wait in waits) for n in range(4)]
    assert sum(per_quarter) == 4000
    assert all(900 < count < 1100 for count in per_quarter)


def test_max_retries_bounds_the_retries() -> None:
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
        ProxyError("407"),
        ConfigurationError("no"),
    ],
)
def test_errors_that_are_not_retryable_are_final(error: TritonError) -> None:
    """An error that is not retryable is final at its first attempt."""
    assert wait(error) is None


def test_circuit_open_error_is_not_retried() -> None:
    """The breaker's policy has already decided about waiting."""
    assert wait(CircuitOpenError("open", open_seconds_left=1.0)) is None


def test_max_server_error_retries_bounds_retries_of_a_plain_500() -> None:
    """Retries of a model that raised have a bound of their own; others do not count towards it."""
    error = ModelExecutionError("raised", status=500)
    assert wait(error, 1, 1) is not None
    assert wait(error, 3, 1) is not None
    assert wait(error, 2, 2) is None
    assert wait(error, 1, 1, policy=RetryPolicy(max_server_error_retries=0)) is None
    assert wait(ConnectError("refused"), 3, 2) is not None


def test_sequence_request_that_may_have_run_is_not_retried() -> None:
    """A stateful model must not see a request twice; a request that cannot have arrived is sent again."""
    assert wait(ConnectionLostError("reset"), sequence=True) is None
    assert wait(ModelExecutionError("raised", status=500), 1, 1, sequence=True) is None
    assert wait(ConnectError("refused"), sequence=True) is not None
    assert wait(ConnectionLostError("reset"), sequence=False) is not None


def test_retry_after_extends_the_backoff() -> None:
    """It replaces a shorter fixed half, and the jitter is added to it."""
    error = ServerOverloadedError("busy", status=429, retry_after_seconds=5.0)
    assert wait(error) == 5.0
    late = wait(error, remaining_seconds=99.0, random=highest)
    assert late == pytest.approx(5.5)


@pytest.mark.parametrize("retry_after_seconds", [0.0, 0.1, 2.0, None])
def test_short_retry_after_does_not_shorten_the_backoff(retry_after_seconds: float | None) -> None:
    """A server that always sends zero does not turn retries into a busy loop."""
    error = ServerUnavailableError("down", status=503, retry_after_seconds=retry_after_seconds)
    assert wait(error, 3) == 2.0


@pytest.mark.parametrize(
    ("remaining_seconds", "expected"), [(5.1, 5.0), (5.0, 2.5), (4.0, 2.0), (0.1, None), (-1.0, None)]
)
def test_deadline_caps_retry_after(remaining_seconds: float, expected: float | None) -> None:
    """Half of the remaining time is waited, and nothing where even the shortest backoff is too long."""
    error = ServerOverloadedError("busy", status=503, retry_after_seconds=5.0)
    assert wait(error, remaining_seconds=remaining_seconds) == expected


def test_backoff_is_cut_to_the_remaining_time() -> None:
    """A server that recovers before the deadline is used; a backoff of almost no time is not started."""
    error = ConnectionLostError("reset")
    assert wait(error, 4) == 3.0
    assert wait(error, 4, remaining_seconds=2.0) == 1.0
    assert wait(error, 4, remaining_seconds=0.01) is None


STALE = ConnectionLostError("closed while idle")
STALE.was_stale = True
UNHEALTHY = EndpointView(is_healthy=False, any_tried_unhealthy=True)
BUSY = ServerOverloadedError("queue full", status=503)
DOWN = ServerUnavailableError("down", status=503)
LATER = ServerUnavailableError("down", status=503, retry_after_seconds=20.0)
RAISED = ModelExecutionError("raised", status=500)
LOST = ConnectionLostError("reset")
LATE = DeadlineExceededError("late")
SILENT = SilentConnectionError("silent")
HAS_ANSWERED = EndpointView(has_answered=True)
PASSED = {"hold_seconds": 600.0, "remaining_seconds": 0.0}


@pytest.mark.parametrize(
    ("error", "situation", "expected"),
    [
        # The request is not to blame for the failure: sent again at once, and not counted.
        (STALE, {}, Resend()),
        (STALE, {"remaining_seconds": -1.0}, Resend()),
        (InferenceError("no", status=401), {"endpoint": EndpointView(has_new_credentials=True)}, Resend()),
        (InferenceError("no", status=401), {}, Fail),
        (STALE, {"sequence": True}, Fail),
        (SharedMemoryError("gone", status=404), {"was_in_shared_memory": True}, Resend()),
        (SharedMemoryError("gone", status=404), {}, Fail),
        # Backoff within the deadline, charged to the endpoint's budget where the retry costs the server work.
        (LOST, {}, Retry(0.5, is_budgeted=True)),
        (DeadlineExceededError("late"), {}, Retry(0.5, is_budgeted=True)),
        (ConnectError("refused"), {}, Retry(0.5, is_budgeted=False)),
        (ConnectTimeoutError("silent"), {}, Retry(0.5, is_budgeted=True)),
        (BUSY, {}, Retry(0.5, is_budgeted=False)),
        (LOST, {"attempts_made": 5}, Fail),
        (LOST, {"remaining_seconds": 0.0}, Fail),
        # Another healthy endpoint is tried at once; after overload there is a backoff all the same.
        (LOST, {"endpoint": EndpointView(has_alternative=True)}, Retry(0.0, is_budgeted=True)),
        (BUSY, {"endpoint": EndpointView(has_alternative=True)}, Retry(0.5, is_budgeted=False)),
        (TlsError("expired"), {"endpoint": EndpointView(has_alternative=True)}, Retry(0.0, is_budgeted=True)),
        (TlsError("expired"), {}, Fail),
        (ProxyError("403"), {"endpoint": EndpointView(has_alternative=True)}, Retry(0.0, is_budgeted=True)),
        (
            TlsError("expired"),
            {"endpoint": EndpointView(has_alternative=True), "remaining_seconds": 0.0},
            Fail,
        ),
        # Overload, or a Retry-After beyond the deadline: outside the deadline, where that is allowed.
        (BUSY, {"hold_seconds": 600.0}, Hold(0.5, for_overload=True)),
        (LATER, {"hold_seconds": 600.0, "remaining_seconds": 10.0}, Hold(20.0, for_overload=True)),
        (LATER, {"hold_seconds": 600.0, "remaining_seconds": 30.0}, Retry(20.0, is_budgeted=True)),
        (LATER, {"hold_seconds": 15.0, "remaining_seconds": 10.0}, Retry(5.0, is_budgeted=True)),
        (LATER, {"remaining_seconds": 10.0}, Retry(5.0, is_budgeted=True)),
        (BUSY, {"hold_seconds": 600.0, "policy": RetryPolicy(max_retries=0)}, Fail),
        # The backoff of a hold grows with the server's overload, not with one request's bad luck.
        (BUSY, {"hold_seconds": 600.0, "holds": 3}, Hold(0.5, for_overload=True)),
        (
            BUSY,
            {"hold_seconds": 600.0, "holds": 2, "endpoint": EndpointView(overload_streak=9)},
            Hold(2.0, for_overload=True),
        ),
        # An unhealthy endpoint: until it is healthy again, where that is allowed.
        (DOWN, {"endpoint": UNHEALTHY, "hold_seconds": 600.0}, Hold(0.0, for_overload=False)),
        (DOWN, {"endpoint": UNHEALTHY}, Fail),
        (DOWN, {"endpoint": UNHEALTHY, "hold_seconds": 600.0, "remaining_seconds": 0.0}, Hold(0.0, False)),
        (DOWN, {"hold_seconds": 600.0, "remaining_seconds": 0.0}, Fail),
        (LOST, {"endpoint": UNHEALTHY, "hold_seconds": 600.0, "sequence": True}, Fail),
        (TlsError("expired"), {"endpoint": UNHEALTHY, "hold_seconds": 600.0}, Fail),
        # A model that raises may do so for this element only: the batch is bisected instead.
        (RAISED, {"endpoint": UNHEALTHY, "hold_seconds": 600.0}, Fail),
        (RAISED, {"server_error_attempts": 1}, Retry(0.5, is_budgeted=True)),
        # A deadline that passes at a server that has answered before is not the request's fault until it is
        # certain; at one that never has, it is final.
        (LATE, {**PASSED, "endpoint": HAS_ANSWERED}, Hold(0.5, for_overload=True)),
        (LATE, {**PASSED, "endpoint": HAS_ANSWERED, "suspicion": CERTAIN - 1}, Hold(0.5, for_overload=True)),
        (LATE, {**PASSED, "endpoint": HAS_ANSWERED, "suspicion": CERTAIN}, Fail),
        (LATE, {**PASSED, "endpoint": EndpointView()}, Fail),
        (LATE, {"remaining_seconds": 0.0, "endpoint": HAS_ANSWERED}, Fail),
        (LATE, {**PASSED, "endpoint": HAS_ANSWERED, "sequence": True}, Fail),
        (LATE, {**PASSED, "endpoint": UNHEALTHY, "suspicion": CERTAIN}, Hold(0.0, for_overload=False)),
        (
            LATE,
            {
                **PASSED,
                "endpoint": EndpointView(is_healthy=False, any_tried_unhealthy=True, is_ready=True),
                "suspicion": CERTAIN,
            },
            Fail,
        ),
        (
            DOWN,
            {
                "endpoint": EndpointView(is_healthy=False, any_tried_unhealthy=True, is_ready=True),
                "hold_seconds": 600.0,
                "suspicion": CERTAIN,
            },
            Hold(0.0, for_overload=False),
        ),
        # Another connection than a silent one is tried at once.
        (SILENT, {}, Retry(0.0, is_budgeted=True)),
        (SILENT, {**PASSED, "endpoint": HAS_ANSWERED}, Hold(0.5, for_overload=True)),
        (SILENT, {"sequence": True}, Fail),
        # An error that says nothing about the endpoint's health is retried even at an unhealthy one.
        (BUSY, {"endpoint": UNHEALTHY}, Retry(0.5, is_budgeted=False)),
    ],
)
def test_next_step_after_each_failure(
    error: TritonError, situation: dict[str, Any], expected: Step | type[Fail]
) -> None:
    """The whole decision as a table: error, situation, step."""
    decision = step(error, **situation)
    # Equal tuples may be different steps.
    assert type(decision) is (Fail if expected is Fail else type(expected))
    assert decision == (Fail(error) if expected is Fail else expected)


@pytest.mark.parametrize(
    ("endpoint", "suspicion"),
    [
        # A queue explains it: answers take most of the deadline as it is.
        (EndpointView(has_answered=True, answered_meanwhile=True, is_slow=True), 0),
        # Others were answered quickly.
        (EndpointView(has_answered=True, answered_meanwhile=True), HALF_CERTAIN),
        # It was sent to a server that had just answered, and nobody has been answered since.
        (EndpointView(has_answered=True), HALF_CERTAIN),
        # Another request may have silenced the server before.
        (EndpointView(has_answered=True, was_stalled=True), 1),
    ],
)
def test_passed_deadline_makes_the_request_suspicious(endpoint: EndpointView, suspicion: int) -> None:
    """As far as nothing else explains it; other errors do not."""
    assert History().after(LATE, endpoint).suspicion == suspicion
    assert History().after(LATE, endpoint).held(for_overload=True).suspicion == suspicion
    assert History().after(LOST, endpoint).suspicion == 0


def test_half_of_a_batch_is_not_retried_after_a_plain_500() -> None:
    """Bisecting it further finds the cause faster than a repetition."""
    limits = Limits(1000.0, max_server_error_retries=0)
    decision = next_step(POLICY, RAISED, History((RAISED,)), limits, EndpointView(), lowest)
    assert decision == Fail(RAISED)


def test_hold_resets_the_history_and_keeps_the_last_eight_errors() -> None:
    """Failures before a hold count towards no limit, but remain on the error for the user."""
    history = History()
    for _ in range(10):
        history = history.after(LOST).after(BUSY).held(for_overload=True)
    assert (history.errors, history.holds) == ((), 10)
    assert history.earlier == (LOST, BUSY) * 4
    assert history.after(LOST).held(for_overload=False).holds == 10


def test_repeat_retries_until_success_with_backoff() -> None:
    """Each retry is preceded by its backoff, and a stale connection by none."""
    outcomes: list[Any] = [ConnectError("refused"), STALE, LOST, "answer"]
    waits: list[tuple[float, TritonError]] = []

    def operation() -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, TritonError):
            raise outcome
        return outcome

    def wait_for(seconds: float, error: TritonError) -> None:
        waits.append((seconds, error))

    assert repeat(operation, POLICY, lambda: Limits(1000.0), wait_for, lowest) == "answer"
    assert [(seconds, type(error)) for seconds, error in waits] == [
        (0.5, ConnectError),
        (1.0, ConnectionLostError),
    ]


def test_repeat_raises_the_last_error_with_the_earlier_ones() -> None:
    """The user sees every attempt."""
    errors = [ConnectError("one"), ConnectionLostError("two"), InvalidRequestError("three", status=400)]

    def operation() -> None:
        raise errors.pop(0)

    with pytest.raises(InvalidRequestError, match="three") as caught:
        repeat(operation, POLICY, lambda: Limits(1000.0), lambda seconds, error: None, lowest)
    assert [error.message for error in caught.value.attempts] == ["one", "two"]


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
def test_policy_out_of_range_is_rejected(options: dict[str, object]) -> None:
    """Each field is checked, and the error names it."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        RetryPolicy.from_options(options)


def test_budget_minimum_is_available_without_requests() -> None:
    """Without any counted request, ``budget_min_per_second`` is available, and no more."""
    clock = FakeClock()
    budget = RetryBudget(RetryPolicy(budget_min_per_second=0.5), clock)
    assert [budget.try_spend() for _ in range(7)] == [True] * 5 + [False] * 2


def test_retry_occupies_its_token_for_the_whole_window() -> None:
    """Wherever in a bucket of time a retry falls, its token returns after ten seconds and not before."""
    clock = FakeClock(1000.95)
    budget = RetryBudget(RetryPolicy(budget_ratio=0, budget_min_per_second=0.1), clock)
    assert budget.try_spend()
    clock.advance(9.9)
    assert not budget.try_spend()
    clock.advance(1.1)
    assert budget.try_spend()


def test_budget_ratio_bounds_retries_of_a_sick_server() -> None:
    """With every request failing and retried at once, retries stay at the ratio plus the minimum."""
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
def test_budget_holds_over_every_window_that_ends_in_a_retry(
    steps: list[tuple[float, int, int]], ratio: float, free: float
) -> None:
    """Retries of the last ten seconds never exceed their share of the requests in that time."""
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
def test_spent_budget_has_a_retry_once_its_window_has_passed(pauses: list[float], free: float) -> None:
    """Retries that were spent leave the budget with their window of time, and no new request is needed."""
    clock = FakeClock()
    budget = RetryBudget(RetryPolicy(budget_ratio=0.5, budget_min_per_second=free), clock)
    for pause_seconds in pauses:
        clock.advance(pause_seconds)
        budget.record_request()
        while budget.try_spend():
            pass
    clock.advance(BUDGET_WINDOW_SECONDS * 1.1 + 1e-6)
    assert budget.try_spend()


def test_empty_budget_never_has_a_retry() -> None:
    """Without ratio and minimum no time that passes makes one."""
    clock = FakeClock()
    budget = RetryBudget(RetryPolicy(budget_ratio=0, budget_min_per_second=0), clock)
    for _ in range(3):
        budget.record_request()
        assert not budget.try_spend()
        clock.advance(BUDGET_WINDOW_SECONDS)


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
