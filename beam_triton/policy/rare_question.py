"""A question that is asked rarely, and whose answer all threads of a process share."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")

_INTERVAL_SECONDS = 10.0


class RareQuestion(Generic[T]):
    """Whether something is still as it was known to be; asked once in ten seconds at most.

    Args:
        clock: monotonic seconds.
        sleep: waits for some seconds.
    """

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], object]) -> None:
        self._clock = clock
        self._sleep = sleep
        self._lock = Lock()
        self._asked_at = -math.inf
        self._has_changed = False
        self._answer: T | None = None

    def ask(self, known: T, question: Callable[[], T], is_same: Callable[[T, T], bool]) -> T:
        """What holds now instead of ``known``, which a caller has reason to doubt.

        Within ten seconds of the last answer the question is not asked:

        - where that answer is not ``known``, the caller has not heard of the change yet, and gets it;
        - where it is, and brought no change, the doubt is as unfounded as it was then;
        - where it is, and brought one, there may be another: this waits for the rest of the ten seconds, and
          asks.

        Raises what ``question`` raises.
        """
        with self._lock:
            left_seconds = self._asked_at + _INTERVAL_SECONDS - self._clock()
            if left_seconds > 0 and self._answer is not None:
                if not is_same(self._answer, known):
                    return self._answer
                if not self._has_changed:
                    return known
                self._sleep(left_seconds)
            self._answer = None
            answer = question()
            self._asked_at = self._clock()
            self._has_changed = not is_same(answer, known)
            self._answer = answer
            return answer
