"""The head of an HTTP/1.1 answer: status line and header fields, from bytes (RFC 9112)."""

from __future__ import annotations

import re
from functools import lru_cache

from beam_triton.errors import RemoteProtocolError

MAX_HEAD_BYTES = 65_536
"""The longest head accepted, which ``http.client`` accepts for one line; Triton's is about 150 bytes."""

# Wider than RFC 9110's token, as in http.client and others: any visible character but a colon.
_FIELD_NAME = re.compile(r"[!-9;-~]+")


class ResponseHead:
    """A parsed head; immutable, because equal heads share one object.

    ``fields`` holds ``(name, value)`` pairs as sent; ``content_length`` is ``None`` where the length
    is not known beforehand, ``chunked`` where the body comes in chunks.
    """

    def __init__(self, data: bytes) -> None:
        lines = data.split(b"\n")
        self.http_minor, self.status, self.reason = _status_line(lines[0])
        self.fields = _header_fields(lines[1:])
        self._values: dict[str, str] = {}
        for name, value in self.fields:
            known = self._values.get(name.lower())
            self._values[name.lower()] = value if known is None else f"{known}, {value}"
        # RFC 9112 section 6.3: the statuses that never carry a body.
        self.has_body = not (self.status < 200 or self.status in (204, 304))
        # An interim answer has no body, and is skipped as a whole.
        self.chunked = self.status >= 200 and self._is_chunked()
        self.content_length = self._content_length() if self.status >= 200 else None
        self.keeps_alive = self._keeps_alive()

    def get(self, name: str) -> str | None:
        """A field's value, fields of the same name joined by commas; ``name`` in lower case."""
        return self._values.get(name)

    def _tokens(self, name: str) -> list[str]:
        return [token.strip().lower() for token in (self.get(name) or "").split(",") if token.strip()]

    def _is_chunked(self) -> bool:
        codings = self._tokens("transfer-encoding")
        if not codings:
            return False
        if codings != ["chunked"]:
            raise RemoteProtocolError(
                f"the answer's Transfer-Encoding {', '.join(codings)!r} is not supported"
            )
        return True

    def _content_length(self) -> int | None:
        if self.chunked:
            return None
        values = {value.strip() for value in (self.get("content-length") or "").split(",")}
        if values == {""}:
            return None
        value = values.pop()
        if values or not (value.isascii() and value.isdigit() and len(value) < 19):
            shown = (self.get("content-length") or "")[:60]
            raise RemoteProtocolError(f"the answer's Content-Length is {shown!r}, not one whole number")
        return int(value)

    def _keeps_alive(self) -> bool:
        tokens = self._tokens("connection")
        if self.chunked and (self.http_minor < 1 or self.get("content-length") is not None):
            # RFC 9112 section 6.1: after chunks from an HTTP/1.0 sender, or both framings at once, what
            # follows cannot be trusted.
            return False
        return "close" not in tokens if self.http_minor >= 1 else "keep-alive" in tokens


@lru_cache(maxsize=128)
def parse_response_head(data: bytes) -> ResponseHead:
    """Parse the bytes up to and without the empty line.

    A server's heads repeat to the byte from one answer to the next, so parsed ones are cached: a look-up
    instead of about 15 us.

    Raises:
        RemoteProtocolError: this is not an HTTP/1.x head.
    """
    return ResponseHead(data)


def _status_line(line: bytes) -> tuple[int, int, str]:
    text = line.rstrip(b"\r").decode("latin-1")
    version, _, rest = text.partition(" ")
    code, _, reason = rest.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (len(code) == 3 and code.isascii() and code.isdigit()):
        raise RemoteProtocolError(f"the server does not speak HTTP/1.1: it answered {text[:60]!r}")
    if code < "100":
        raise RemoteProtocolError(f"the server answered with the status {code}, which HTTP does not know")
    return int(version[-1]), int(code), reason


def _header_fields(lines: list[bytes]) -> tuple[tuple[str, str], ...]:
    fields = []
    for line in lines:
        text = line.removesuffix(b"\r").decode("latin-1")
        if not text:
            continue
        name, colon, value = text.partition(":")
        if not colon or not _FIELD_NAME.fullmatch(name):
            raise RemoteProtocolError(f"the answer's header line {text[:60]!r} has no field name")
        # RFC 9110 section 5.5: some parsers take these for the end of a line, and see other fields.
        if "\r" in value or "\0" in value:
            raise RemoteProtocolError(f"the answer's header line {text[:60]!r} holds a control character")
        fields.append((name, value.strip(" \t")))
    return tuple(fields)
