"""The chunked transfer coding of an answer's body (RFC 9112 section 7.1), decoded piece by piece."""

from __future__ import annotations

from beam_triton.errors import RemoteProtocolError

_MAX_LINE_BYTES = 8_192


class ChunkedBody:
    """Collects the chunks of one body.

    Raises:
        RemoteProtocolError: from ``feed``, on a broken chunk or a body above ``max_bytes``.
    """

    def __init__(self, max_bytes: int) -> None:
        self.body = bytearray()
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._left = 0
        # Functions, not bound methods: those would refer back to this object, and keep the body alive until
        # the garbage collector runs.
        self._step = ChunkedBody._size_line

    def feed(self, data: bytes) -> int | None:
        """Add bytes; returns the number of bytes after the body's end, or ``None`` before its end."""
        self._buffer += data
        while self._step(self):
            if self._step is ChunkedBody._end:
                return len(self._buffer)
        return None

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0:
            if len(self._buffer) > _MAX_LINE_BYTES:
                raise RemoteProtocolError("the answer's chunked body has an endless line")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _size_line(self) -> bool:
        line = self._line()
        if line is None:
            return False
        digits = line.split(b";", 1)[0].strip()
        if not digits or len(digits) > 15 or not all(byte in b"0123456789abcdefABCDEF" for byte in digits):
            raise RemoteProtocolError(f"the answer's chunked body has the chunk size {line[:40]!r}")
        self._left = int(digits, 16)
        if len(self.body) + self._left > self._max_bytes:
            raise RemoteProtocolError(f"the answer is larger than max_response_bytes={self._max_bytes}")
        self._step = ChunkedBody._data if self._left else ChunkedBody._trailer
        return True

    def _data(self) -> bool:
        if not self._buffer:
            return False
        taken = min(self._left, len(self._buffer))
        self.body += memoryview(self._buffer)[:taken]
        del self._buffer[:taken]
        self._left -= taken
        if not self._left:
            self._step = ChunkedBody._data_end
        return True

    def _data_end(self) -> bool:
        line = self._line()
        if line is None:
            return False
        # A lone LF may be the next byte of a chunk that was announced one byte short.
        if line != b"\r":
            raise RemoteProtocolError("the answer's chunked body has a chunk longer than its size")
        self._step = ChunkedBody._size_line
        return True

    def _trailer(self) -> bool:
        line = self._line()
        if line is None:
            return False
        if line in (b"", b"\r"):
            self._step = ChunkedBody._end
        return True

    def _end(self) -> bool:
        return False
