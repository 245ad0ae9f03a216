"""Whole bodies compressed and decompressed: ``Content-Encoding`` gzip and deflate.

``deflate`` means zlib (RFC 9110, 8.4.1.2), which is what Triton reads and writes. A header length
(``Inference-Header-Content-Length``) counts bytes of the decompressed body.
"""

from __future__ import annotations

import reprlib
import zlib
from collections.abc import Iterable

from beam_triton.errors import RemoteProtocolError

_WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
ENCODINGS = tuple(_WINDOW_BITS)
# Tensors hardly compress better at higher levels, and each level costs the sender's only core.
_LEVEL = 1
# zlib returns a copy of the input that it has not used: small steps keep these copies small.
_STEP_BYTES = 16 * 1024


def compress(parts: Iterable[bytes | memoryview], encoding: str) -> bytes:
    """The concatenated ``parts`` as one compressed body. ``encoding`` is one of ENCODINGS."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    pieces = [compressor.compress(part) for part in parts]
    pieces.append(compressor.flush())
    return b"".join(pieces)


def decompress(body: bytes | bytearray | memoryview, encoding: str, *, max_bytes: int) -> bytes:
    """The decompressed ``body``, of at most ``max_bytes`` bytes.

    Several gzip members in a row are one body (RFC 1952, 2.2). Raises RemoteProtocolError for an unknown
    encoding, invalid or truncated data, bytes after the end, and a body that exceeds ``max_bytes``, as soon
    as it does.
    """
    bits = _WINDOW_BITS.get(encoding.strip().lower())
    if bits is None:
        raise RemoteProtocolError(f"the answer has the unknown Content-Encoding {reprlib.repr(encoding)}")
    pieces: list[bytes] = []
    size = 0
    body = memoryview(body).cast("B")
    stream = zlib.decompressobj(bits)
    for start in range(0, len(body), _STEP_BYTES):
        step: bytes | memoryview = body[start : start + _STEP_BYTES]
        while step:
            if stream.eof:
                if bits == _WINDOW_BITS["deflate"]:
                    raise RemoteProtocolError(f"bytes follow the end of the answer's {encoding} body")
                stream = zlib.decompressobj(bits)
            try:
                piece = stream.decompress(step, max_bytes - size + 1)
            except zlib.error as error:
                raise RemoteProtocolError(f"the answer's {encoding} body is broken: {error}") from None
            size += len(piece)
            if size > max_bytes:
                raise RemoteProtocolError(
                    f"the answer's {encoding} body inflates beyond max_response_bytes ({max_bytes} bytes)"
                )
            pieces.append(piece)
            step = stream.unused_data if stream.eof else stream.unconsumed_tail
    if not stream.eof:
        raise RemoteProtocolError(f"the answer's {encoding} body is truncated")
    return b"".join(pieces)
