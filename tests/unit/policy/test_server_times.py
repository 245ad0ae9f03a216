"""What a server's counts say about its queue."""

from __future__ import annotations

import math

import pytest

from beam_triton.policy.server_times import ServerCounts, ServerStatistics

MS = 1_000_000


def counts(
    requests: int, *, queue_ms: int = 0, other_ms: int = 0, executions: int | None = None
) -> ServerCounts:
    return ServerCounts(
        requests,
        requests if executions is None else executions,
        (queue_ms + other_ms) * MS,
        queue_ms * MS,
        other_ms * MS,
    )


def test_times_are_those_between_two_answers() -> None:
    statistics = ServerStatistics()
    assert statistics.add(counts(1_000, queue_ms=9_000, other_ms=20_000)) is None
    times = statistics.add(counts(1_010, queue_ms=9_050, other_ms=20_200))
    assert times == pytest.approx((0.005, 0.020))
    assert statistics.add(counts(1_010, queue_ms=9_050, other_ms=20_200)) is None


def test_restarted_server_counts_from_its_new_start() -> None:
    statistics = ServerStatistics()
    statistics.add(counts(1_000, other_ms=20_000))
    assert statistics.add(counts(10, other_ms=400)) is None
    assert statistics.add(counts(20, other_ms=800)) == pytest.approx((0.0, 0.040))


def test_servers_behind_one_address_are_told_apart() -> None:
    """Answers come from either; each is compared with the one that can be the same server's."""
    statistics = ServerStatistics()
    statistics.add(counts(1_000, queue_ms=5_000, other_ms=20_000))
    statistics.add(counts(100, queue_ms=10, other_ms=1_000))
    for step in range(1, 20):
        large = counts(1_000 + 10 * step, queue_ms=5_000 + 100 * step, other_ms=20_000 + 200 * step)
        small = counts(100 + 10 * step, queue_ms=10 + 10 * step, other_ms=1_000 + 100 * step)
        assert statistics.add(large) == pytest.approx((0.010, 0.020))
        assert statistics.add(small) == pytest.approx((0.001, 0.010))


def test_requests_that_share_executions_say_nothing() -> None:
    """With dynamic batching they wait for each other."""
    statistics = ServerStatistics()
    statistics.add(counts(0))
    assert statistics.observed is None
    assert statistics.add(counts(100, queue_ms=900, other_ms=1_000, executions=30)) is None
    # Whoever watches may know.
    assert statistics.observed == pytest.approx((0.009, 0.010))


def test_queues_of_the_models_of_an_ensemble_are_not_taken_for_work() -> None:
    statistics = ServerStatistics()
    statistics.add(counts(0))
    assert statistics.add(ServerCounts(40, 40, 13_672 * MS, 0, 4_388 * MS)) is None


def test_questions_are_few_but_the_second_one_comes_soon() -> None:
    statistics = ServerStatistics()
    assert statistics.ask_at == -math.inf
    statistics.ask(10.0, 0.02)
    assert statistics.ask_at == 10.1
    statistics.add(counts(1))
    statistics.ask(10.1, 0.02)
    assert statistics.ask_at == 11.1
    statistics.ask(20.0, 2.0)
    assert statistics.ask_at == 30.0
    assert statistics.valid_seconds == 50.0
    statistics.cannot_be_asked()
    assert statistics.ask_at == math.inf
