"""How long a request may hear nothing before its connection is suspected, rather than the server.

A NAT, a balancer or a dead node swallows what is sent on a connection and says nothing about it. What answers
usually take tells such a connection from a slow server: a request that hears nothing for ten times as long
goes out again on a fresh connection. Each further silence of this request doubles the time. An answer on the
fresh connection that takes more than half as long doubles it for all: the server was slow, and the connection
had nothing to do with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_USUAL_LATENCIES = 10
# Pauses of the garbage collector, of a virtual machine or of a network are shorter.
_LEAST_SECONDS = 1.0
# Four fresh connections in a row that hear nothing: it is the server.
_MOST_SILENCES = 4


class Silence:
    """What is known of silent connections to one endpoint; shared by the threads of a process.

    ``clock`` gives monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Doubled whenever a slow server was taken for a silent connection.
        self._factor = 1.0
        self._raised_at = -math.inf
        self._trial_ends_at = -math.inf

    def bound_seconds(
        self, usual_seconds: float | None, silences: int = 0, left_seconds: float = math.inf
    ) -> float:
        """How long a request may hear nothing, after ``silences`` connections that were silent already.

        Infinite where nothing is known of what answers take, ``usual_seconds``, and where another connection
        would not have as long again of the ``left_seconds`` until the deadline.
        """
        if usual_seconds is None or silences >= _MOST_SILENCES:
            return math.inf
        seconds = max(_USUAL_LATENCIES * usual_seconds, _LEAST_SECONDS) * self._factor
        if silences:
            seconds *= 2**silences
        return seconds if 2 * seconds <= left_seconds else math.inf

    def try_trial(self, seconds: float) -> bool:
        """Whether this request may try a fresh connection though no other request is being answered.

        Only one may in each ``seconds``: if the server is slow, it is not asked for all of its work twice.
        """
        now = self._clock()
        if now < self._trial_ends_at:
            return False
        self._trial_ends_at = now + seconds
        return True

    def answered_after(self, waited_seconds: float, latency_seconds: float) -> None:
        """After a connection was given up for ``waited_seconds`` of silence, a fresh one took
        ``latency_seconds`` to answer."""
        now = self._clock()
        if latency_seconds > waited_seconds / 2 and now - self._raised_at > waited_seconds:
            # Once for all that were given up together.
            self._raised_at = now
            self._factor *= 2
