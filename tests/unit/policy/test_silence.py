"""How long a request may hear nothing before it tries another connection."""

from __future__ import annotations

import math

from beam_triton.policy.silence import Silence
from tests.support.clock import FakeClock


def test_bound_is_ten_times_the_usual_latency_and_at_least_a_second() -> None:
    """Where nothing is known of answers, there is no bound."""
    silence = Silence(FakeClock())
    assert silence.bound_seconds(0.5) == 5.0
    assert silence.bound_seconds(0.02) == 1.0
    assert silence.bound_seconds(None) == math.inf


def test_bound_doubles_with_each_silent_connection_and_ends_after_four() -> None:
    """If every connection is silent, the server is."""
    silence = Silence(FakeClock())
    assert [silence.bound_seconds(0.3, silences) for silences in range(5)] == [3.0, 6.0, 12.0, 24.0, math.inf]


def test_no_connection_is_suspected_where_no_time_is_left_for_another() -> None:
    """The next one needs as long."""
    silence = Silence(FakeClock())
    assert [silence.bound_seconds(0.3, 1, left_seconds) for left_seconds in (12.0, 11.9)] == [6.0, math.inf]


def test_slow_answer_on_a_fresh_connection_doubles_the_bound_once_for_all() -> None:
    """The server was slow: 32 requests that were given up together show that once."""
    clock = FakeClock()
    silence = Silence(clock)
    silence.answered_after(3.0, 0.3)
    assert silence.bound_seconds(0.3) == 3.0
    for _ in range(32):
        silence.answered_after(3.0, 2.0)
    assert silence.bound_seconds(0.3) == 6.0
    clock.advance(6.1)
    silence.answered_after(6.0, 5.0)
    assert silence.bound_seconds(0.3) == 12.0


def test_one_request_at_a_time_tries_a_fresh_connection_while_none_is_answered() -> None:
    """A server that is slow for all is not asked for all of its work twice."""
    clock = FakeClock()
    silence = Silence(clock)
    assert [silence.try_trial(2.0) for _ in range(3)] == [True, False, False]
    clock.advance(2.0)
    assert silence.try_trial(2.0)
