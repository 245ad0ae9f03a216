"""Server-sent events, read while the answer is still coming, and how long they may take.

The format is that of the HTML standard: lines end in CR, LF or both; an empty line ends an event; comments
begin with a colon. Of an event only ``data`` matters here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamLimits:
    """How long an answer's events may take, beside the deadline of the whole request.

    Attributes:
        first_token_seconds: from the request's being sent to the first event.
        between_tokens_seconds: from one event to the next; comments do not count.
        repeat_started: a request that fails after events came may be sent again.
    """

    first_token_seconds: float = math.inf
    between_tokens_seconds: float = math.inf
    repeat_started: bool = False


class EventStream:
    """The events of one answer.

    Attributes:
        events: the data of each complete event, in order.
        due_at: when the next event has to be there, in monotonic seconds as all times here.
        sent_at: when the request had been given a connection.
        first_at, last_at: when the first and the last event came; infinite before.
    """

    def __init__(self, limits: StreamLimits, sent_at: float) -> None:
        self.events: list[str] = []
        self.sent_at = sent_at
        self.first_at = self.last_at = math.inf
        self.due_at = sent_at + limits.first_token_seconds
        self._limits = limits
        self._line = bytearray()
        self._data: list[bytes] = []
        self._ended_by_cr = False
        self._is_first_line = True

    @property
    def is_within_event(self) -> bool:
        """Whether the last bytes belong to an event that is not complete."""
        return bool(self._data) or self._line.startswith(b"d")

    def feed(self, data: bytes, now: float) -> bool:
        """Add bytes of the answer's body; True where they completed an event."""
        known = len(self.events)
        if self._ended_by_cr and data:
            # The LF of a CRLF that came in two pieces.
            self._ended_by_cr = False
            data = data.removeprefix(b"\n")
        self._line += data
        if b"\n" in data or b"\r" in data:
            self._ended_by_cr = self._line.endswith(b"\r")
            *lines, rest = bytes(self._line).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            self._line = bytearray(rest)
            for line in lines:
                self._take(line)
        if len(self.events) == known:
            return False
        self.first_at = min(self.first_at, now)
        self.last_at = now
        self.due_at = now + self._limits.between_tokens_seconds
        return True

    def late_message(self) -> str:
        """What has not come in time."""
        if self.events:
            limit = self._limits.between_tokens_seconds
            return f"sent no event for between_tokens_seconds={limit:g} after {len(self.events)} of them"
        return f"sent no event within first_token_seconds={self._limits.first_token_seconds:g}"

    def _take(self, line: bytes) -> None:
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data:
                self.events.append(b"\n".join(self._data).decode(errors="replace"))
                self._data.clear()
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
