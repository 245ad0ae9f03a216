"""Small batches of several bundles in one request, while the server is busy.

Streaming runners hand out bundles of a few elements on many threads. Each bundle's last batch is sent at once
where the server takes one more request. Where it does not, calls wait for an admission, and the one that gets
it takes with it those that wait for the same: databases call it group commit. An idle server is never waited
for, and a busy one gets fuller batches, with nothing to configure.

Each call still belongs to its own bundle and thread. What a joint request is answered is divided among them;
when it fails in a way that may be one element's doing, or its first call is cancelled, each call goes on by
itself, and joins no other again.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from beam_triton.dispatch.request_head import HttpRequest

if TYPE_CHECKING:
    from beam_triton.dispatch.call import Call


class Joinable(Protocol):
    """What a call may share a request by.

    Attributes:
        key: equal for calls whose batches may share a request.
        rows, nbytes: the elements of the batch, and their size.
        max_rows, max_bytes: how much a joint request may hold.
    """

    @property
    def key(self) -> Hashable: ...

    @property
    def rows(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def max_rows(self) -> int: ...

    @property
    def max_bytes(self) -> int: ...

    def join(self, others: Sequence[Any]) -> HttpRequest:
        """The request of this batch and of the batches of ``others``, in this order."""

    def divide(self, result: Any, rows: Sequence[int]) -> list[Any]:
        """The result of a joint request, as results of batches with so many rows each."""


class JoinableCalls:
    """The calls that wait for an admission and may join another's request; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, dict[Call, Joinable]] = {}

    def enter(self, call: Call, joinable: Joinable) -> None:
        """``call`` may be taken from now on."""
        with self._lock:
            self._waiting.setdefault(joinable.key, {})[call] = joinable

    def leave(self, call: Call, joinable: Joinable) -> bool:
        """``call`` may not be taken any more; False if another call has taken it."""
        with self._lock:
            waiting = self._waiting.get(joinable.key, {})
            if waiting.pop(call, None) is None:
                return False
            if not waiting:
                del self._waiting[joinable.key]
            return True

    def take(self, leader: Call, joinable: Joinable) -> JointRequest | None:
        """The calls, the oldest first, that fit into one request with ``leader``, which has left."""
        taken: dict[Call, Joinable] = {}
        rows, nbytes = joinable.rows, joinable.nbytes
        with self._lock:
            waiting = self._waiting.get(joinable.key, {})
            for call, each in waiting.items():
                if rows + each.rows > joinable.max_rows or nbytes + each.nbytes > joinable.max_bytes:
                    break
                rows, nbytes = rows + each.rows, nbytes + each.nbytes
                taken[call] = each
            for call in taken:
                del waiting[call]
                call.joined_to = leader
            if not waiting:
                self._waiting.pop(joinable.key, None)
        return JointRequest(joinable, taken) if taken else None


@dataclass(eq=False)
class JointRequest:
    """A request with the batches of several calls, sent by the first one.

    Args:
        first: of the call that sends it.
        others: the calls that have joined.
    """

    first: Joinable
    others: dict[Call, Joinable]

    @property
    def joined_rows(self) -> int:
        """Elements of the calls that have joined."""
        return sum(each.rows for each in self.others.values())

    def request(self) -> HttpRequest:
        """The request that holds all batches."""
        return self.first.join(list(self.others.values()))

    def divide(self, result: Any) -> Any:
        """Hand the others their parts of the result; the first call's own.

        Raises:
            TritonError: the result does not account for every row.
        """
        rows = [self.first.rows, *(each.rows for each in self.others.values())]
        own, *parts = self.first.divide(result, rows)
        others, self.others = self.others, {}
        for call, part in zip(others, parts, strict=True):
            call.hand_over(part)
        return own

    def dissolve(self) -> None:
        """Let each of the others go on by itself."""
        others, self.others = self.others, {}
        for call in others:
            call.hand_over(None)
