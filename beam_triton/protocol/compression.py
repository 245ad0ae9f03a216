"""Whole bodies compressed: ``Content-Encoding`` gzip and deflate; `beam_triton.compression` reads them.

A header length (``Inference-Header-Content-Length``) counts bytes of the decompressed body.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from beam_triton.compression import WINDOW_BITS
from beam_triton.errors import ConfigurationError
from beam_triton.protocol.text import shorten

ENCODINGS = tuple(WINDOW_BITS)
# Tensors hardly compress better at higher levels, and each level costs the sender's only core.
_LEVEL = 1


def checked_encoding(encoding: str | None) -> str | None:
    """``encoding`` if it is one of ENCODINGS or None. Raises ConfigurationError."""
    if encoding is not None and encoding not in ENCODINGS:
        raise ConfigurationError(f"compression must be None, 'gzip' or 'deflate', not {shorten(encoding)}")
    return encoding


def compress(parts: Iterable[bytes | memoryview], encoding: str) -> bytes:
    """The concatenated ``parts`` as one compressed body. ``encoding`` is one of ENCODINGS."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, WINDOW_BITS[encoding])
    pieces = [compressor.compress(part) for part in parts]
    pieces.append(compressor.flush())
    return b"".join(pieces)
