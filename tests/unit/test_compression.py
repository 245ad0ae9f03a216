"""Compressed bodies, against the standard library's gzip and zlib, and malicious bodies."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.compression import compress, decompress
from beam_triton.errors import RemoteProtocolError

BODY = bytes(range(256)) * 400
COMPRESSED = {"gzip": gzip.compress(BODY), "deflate": zlib.compress(BODY)}


@given(st.lists(st.binary(max_size=100), max_size=10), st.sampled_from(["gzip", "deflate"]))
def test_compressed_parts_decompress_to_one_body(parts: list[bytes], encoding: str) -> None:
    """Our own function and the standard library decompress them."""
    body = b"".join(parts)
    packed = compress([memoryview(part) for part in parts], encoding)
    assert decompress(packed, encoding, max_bytes=len(body)) == body
    assert (gzip.decompress(packed) if encoding == "gzip" else zlib.decompress(packed)) == body


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZip", " deflate "])
def test_bodies_of_the_standard_library_are_decompressed(encoding: str) -> None:
    """From bytes, bytearray and memoryview alike, whatever the case of the encoding's name."""
    packed = COMPRESSED[encoding.strip().lower()]
    for body in (packed, bytearray(packed), memoryview(packed)):
        assert decompress(body, encoding, max_bytes=len(BODY)) == BODY


def test_gzip_members_in_a_row_are_one_body() -> None:
    """RFC 1952 allows it for gzip; deflate has no members."""
    assert decompress(COMPRESSED["gzip"] * 3, "gzip", max_bytes=10**6) == BODY * 3
    with pytest.raises(RemoteProtocolError, match="follow the end"):
        decompress(COMPRESSED["deflate"] * 2, "deflate", max_bytes=10**6)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@given(data=st.data())
def test_a_truncated_body_is_refused(encoding: str, data: st.DataObject) -> None:
    """Any truncation, even to nothing."""
    cut = data.draw(st.integers(0, len(COMPRESSED[encoding]) - 1))
    with pytest.raises(RemoteProtocolError, match="truncated"):
        decompress(COMPRESSED[encoding][:cut], encoding, max_bytes=10**6)


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate"]))
def test_garbage_raises_only_remote_protocol_errors(body: bytes, encoding: str) -> None:
    """Arbitrary bytes are refused as the server's fault."""
    with contextlib.suppress(RemoteProtocolError):
        decompress(body, encoding, max_bytes=1000)


@pytest.mark.parametrize("encoding", ["br", "", "identity", "x-gzip"])
def test_an_unknown_encoding_is_refused(encoding: str) -> None:
    """Even one that HTTP defines, since it was not requested."""
    with pytest.raises(RemoteProtocolError, match="Content-Encoding"):
        decompress(b"", encoding, max_bytes=1000)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_never_inflates_past_the_limit(encoding: str) -> None:
    """200 MB of zeros in 200 KB: refused at the limit, with little more memory than that."""
    packed = compress([bytes(10**6)] * 200, encoding)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="max_response_bytes"):
            decompress(packed, encoding, max_bytes=10**6)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 10**6


def test_a_body_of_exactly_max_bytes_is_allowed() -> None:
    """Exactly max_bytes pass, one more does not."""
    assert len(decompress(COMPRESSED["gzip"], "gzip", max_bytes=len(BODY))) == len(BODY)
    with pytest.raises(RemoteProtocolError, match="max_response_bytes"):
        decompress(COMPRESSED["gzip"], "gzip", max_bytes=len(BODY) - 1)
