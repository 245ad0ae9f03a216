"""How long requests wait in a server's queue, from what the server counts.

A Triton counts requests and their times since it started, whoever sent them: what lies between two answers is
what happened meanwhile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# The second answer gives the first times: it comes soon, for processes that find a queue when they start.
_SECOND_AFTER_LATENCIES, _SECOND_AFTER_SECONDS = 2, 0.1
_NEXT_AFTER_LATENCIES, _NEXT_AFTER_SECONDS = 5, 1.0
_VALID_INTERVALS = 5
_LOOK_AFTER_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)

# Behind one address there may be several servers, each with counts of its own.
_MOST_SERVERS = 8
# The share of requests that are executed alone, below which they wait for each other.
_EXECUTED_ALONE = 0.95
# The share of the total that queue and computation make up, unless there are queues elsewhere.
_ACCOUNTED_FOR = 0.8


class ServerTimes(NamedTuple):
    """What requests took in the server, on average: in its queue, and besides."""

    queue_seconds: float
    other_seconds: float


class ServerCounts(NamedTuple):
    """What a server has counted for a model since it started.

    ``busy_ns`` is the time of its executions, where ``compute_ns`` has that of requests, which may share one.
    ``at`` is when it said so, ``own`` how many requests this process had sent it by then, and ``elements``
    are those of all requests.
    """

    requests: int
    executions: int
    total_ns: int
    queue_ns: int
    compute_ns: int
    busy_ns: int = 0
    at: float = 0.0
    own: int = 0
    elements: int = 0

    def may_follow(self, before: ServerCounts) -> bool:
        """Whether the same server may have given ``before`` earlier."""
        return all(old <= new for old, new in zip(before, self, strict=True))

    def since(self, before: ServerCounts) -> ServerCounts:
        """What has been counted after ``before``; ``at`` is the time between both."""
        return ServerCounts._make(new - old for old, new in zip(before, self, strict=True))


class Executions(NamedTuple):
    """How often a model has executed batches of one size, and for how long in all."""

    number: int
    busy_ns: int


def figures_of(difference: ServerCounts, instances: int) -> dict[str, int]:
    """What a server of so many ``instances`` (0: not known) has counted between two answers, by metric."""
    return {
        "server_requests": difference.requests,
        "server_requests_of_job": difference.own,
        "server_executions": difference.executions,
        "server_microseconds": difference.total_ns // 1000,
        "server_queue_microseconds": difference.queue_ns // 1000,
        "server_compute_microseconds": difference.compute_ns // 1000,
        "server_busy_microseconds": difference.busy_ns // 1000 if instances else 0,
        "server_instance_microseconds": round(instances * difference.at * 1e6),
    }


class ServerStatistics:
    """The counts that the servers of one address gave last, and when to ask again.

    Attributes:
        ask_at: the next question's time where requests may queue; infinite where the server does not answer
            it.
        look_at: the same where nothing is to be known but where time goes: soon at first, seldom later.
        observed: what requests took between the last two answers, with dynamic batching, too; for display.
    """

    def __init__(self) -> None:
        self.ask_at = self.look_at = -math.inf
        self.observed: ServerTimes | None = None
        self._looks = 0
        self.difference: ServerCounts | None = None
        self._interval_seconds = _NEXT_AFTER_SECONDS
        self._known: list[ServerCounts] = []

    @property
    def valid_seconds(self) -> float:
        """How long times are to be relied on: a few questions may fail."""
        return _VALID_INTERVALS * self._interval_seconds

    def ask(self, now: float, latency_seconds: float) -> None:
        """A question is asked; ``latency_seconds`` is that of requests for the model."""
        self._interval_seconds = max(_NEXT_AFTER_SECONDS, _NEXT_AFTER_LATENCIES * latency_seconds)
        self.look_at = now + _LOOK_AFTER_SECONDS[min(self._looks, len(_LOOK_AFTER_SECONDS) - 1)]
        self._looks += 1
        if self._known:
            self.ask_at = now + self._interval_seconds
        else:
            self.ask_at = now + max(_SECOND_AFTER_SECONDS, _SECOND_AFTER_LATENCIES * latency_seconds)

    def cannot_be_asked(self) -> None:
        """The server has no such counts."""
        self.ask_at = self.look_at = math.inf

    def add(self, now: ServerCounts) -> ServerTimes | None:
        """What requests took since the same server was asked last; None if that is not known.

        All that it counted meanwhile is the ``difference`` then, None after its first answer.
        Nor is it where requests share executions (dynamic batching): they wait for each other, not for a free
        instance. The requests of an ensemble wait in the queues of its models, which only its total has.
        """
        before = max((each for each in self._known if now.may_follow(each)), default=None)
        if before is not None:
            self._known.remove(before)
        self._known = [*self._known, now][-_MOST_SERVERS:]
        self.difference = None
        if before is not None:
            self.difference = now.since(before)
        if before is None or now.requests == before.requests:
            return None
        requests = now.requests - before.requests
        total_ns = now.total_ns - before.total_ns
        queue_ns = now.queue_ns - before.queue_ns
        if queue_ns + now.compute_ns - before.compute_ns < _ACCOUNTED_FOR * total_ns:
            return None
        self.observed = ServerTimes(queue_ns / requests / 1e9, (total_ns - queue_ns) / requests / 1e9)
        is_alone = now.executions - before.executions >= _EXECUTED_ALONE * requests
        return self.observed if is_alone else None
