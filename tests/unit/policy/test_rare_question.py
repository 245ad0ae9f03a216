"""How often something is asked, and whose answer counts."""

from __future__ import annotations

import operator

import pytest

from beam_triton.policy.rare_question import RareQuestion
from tests.support.clock import FakeClock


class Oracle:
    """Knows the answer, and counts how often it was asked."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.question: RareQuestion[str] = RareQuestion(self.clock, self.clock.sleep)
        self.truth = "old"
        self.asked = 0

    def answer(self) -> str:
        self.asked += 1
        return self.truth

    def ask(self, known: str) -> str:
        return self.question.ask(known, self.answer, operator.eq)


def test_a_doubt_that_was_wrong_is_not_repeated_for_ten_seconds() -> None:
    """Elements that are at fault themselves cost nothing more."""
    oracle = Oracle()
    for _ in range(5):
        assert oracle.ask("old") == "old"
    assert (oracle.asked, oracle.clock.sleeps) == (1, [])
    oracle.clock.advance(10)
    assert oracle.ask("old") == "old"
    assert oracle.asked == 2


def test_a_change_is_asked_for_once_for_all_threads() -> None:
    """Those that still hold the old answer get the new one."""
    oracle = Oracle()
    oracle.truth = "new"
    for _ in range(5):
        assert oracle.ask("old") == "new"
    assert oracle.asked == 1


def test_a_second_change_is_waited_for() -> None:
    """Where the answer has changed a moment ago, a doubt is taken seriously."""
    oracle = Oracle()
    oracle.truth = "new"
    assert oracle.ask("old") == "new"
    oracle.truth = "newest"
    oracle.clock.advance(4)
    assert oracle.ask("new") == "newest"
    assert oracle.clock.sleeps == [6.0]
    assert oracle.ask("old") == "newest"
    assert oracle.asked == 2


def test_a_question_that_fails_is_asked_again() -> None:
    """Nothing was learned from it."""
    oracle = Oracle()

    def fail() -> str:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        oracle.question.ask("old", fail, operator.eq)
    oracle.truth = "new"
    assert oracle.ask("old") == "new"
