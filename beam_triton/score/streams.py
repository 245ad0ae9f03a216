"""Files as streams of whole lines: opened by Beam's FileSystems, decompressed, never whole in memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, BinaryIO, cast

import zstandard
from apache_beam.io.filesystem import CompressedFile, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from beam_triton.score.progress import PROGRESS
from beam_triton.score.rows import CorruptFileError

BLOCK_BYTES = 1 << 20

_ZSTD_INPUT_BYTES = 1 << 17
_UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def compression_of(path: str) -> str:
    """The compression that the name's suffix (.gz, .bz2, .zst, .xz, …) tells, as one of CompressionTypes."""
    types: Any = CompressionTypes
    return str(types.detect_compression_type(path))


def is_compressed(path: str) -> bool:
    return compression_of(path) != CompressionTypes.UNCOMPRESSED


def byte_order_mark_bytes(path: str) -> int:
    """How many bytes `line_blocks` leaves out at the beginning of the file: 3 or 0."""
    with open_text(path) as stream:
        mark = stream.read(len(_UTF8_BYTE_ORDER_MARK))
    return len(mark) if mark == _UTF8_BYTE_ORDER_MARK else 0


@contextlib.contextmanager
def open_stored(path: str, *, is_progress: bool = False) -> Iterator[IO[bytes]]:
    """The file's bytes as they are stored, seekable; ``is_progress``: what is read is counted as such."""
    stored = FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
    try:
        yield cast("IO[bytes]", _Stored(stored, is_progress))
    finally:
        stored.close()


@contextlib.contextmanager
def open_text(path: str, *, is_progress: bool = False) -> Iterator[IO[bytes]]:
    """The file's content, decompressed where its name says so."""
    with open_stored(path, is_progress=is_progress) as stored:
        if is_compressed(path):
            yield cast("IO[bytes]", _Decompressed(path, _decompressor(path, stored)))
        else:
            yield stored


def _decompressor(path: str, stored: IO[bytes]) -> IO[bytes]:
    # Beam's CompressedFile takes the end of a truncated file for the end of the data; the standard
    # library's readers raise EOFError.
    kind = compression_of(path)
    if kind == CompressionTypes.GZIP:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stored, mode="rb"))
    if kind == CompressionTypes.BZIP2:
        return cast("IO[bytes]", bz2.BZ2File(stored))
    if kind == CompressionTypes.LZMA:
        return cast("IO[bytes]", lzma.LZMAFile(stored))
    if kind == CompressionTypes.ZSTD:
        return cast("IO[bytes]", _ZstdFile(stored))
    return cast("IO[bytes]", CompressedFile(cast("BinaryIO", stored), kind, read_size=BLOCK_BYTES))


def line_blocks(
    path: str, start: int = 0, stop: int | None = None, *, is_progress: bool = False
) -> Iterator[bytes]:
    """Blocks of about `BLOCK_BYTES` that end with a newline, but for a last one that may lack it.

    ``start`` and ``stop`` are byte offsets of line beginnings, for files that are not compressed. A byte
    order mark at the beginning of the file is left out. Raises CorruptFileError when a compressed file ends
    too early or cannot be decompressed.
    """
    with open_text(path, is_progress=is_progress) as stream:
        if start:
            stream.seek(start)
        left = stop - start if stop is not None else None
        # Parts of a line that is longer than a block; joined once, so that length costs no squares.
        unfinished: list[bytes] = []
        is_first = start == 0
        while True:
            data = stream.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
            if not data:
                break
            if left is not None:
                left -= len(data)
            if is_first:
                data = data.removeprefix(_UTF8_BYTE_ORDER_MARK)
                is_first = False
            end = data.rfind(b"\n") + 1
            if not end:
                unfinished.append(data)
                continue
            unfinished.append(data[:end])
            yield b"".join(unfinished)
            unfinished = [data[end:]] if end < len(data) else []
        if unfinished:
            yield b"".join(unfinished)


class Texts:
    """Blocks as text; bytes that are not UTF-8 become lone surrogates, which `is_utf8` finds again.

    The attribute ``is_utf8`` turns false with a block that is not UTF-8, and stays so until it is set.
    """

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self.is_utf8 = True

    def __iter__(self) -> Texts:
        return self

    def __next__(self) -> str:
        return self.decode(next(self._blocks))

    def decode(self, block: bytes) -> str:
        try:
            return block.decode("utf-8")
        except UnicodeDecodeError:
            self.is_utf8 = False
            return block.decode("utf-8", "surrogateescape")


def is_utf8(text: str) -> bool:
    """Whether a decoded text was UTF-8 throughout."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str) -> str:
    """Text for a message or a failure record: bytes that were not UTF-8 are written as ``\\xff``."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_lines(block: str) -> Iterator[str]:
    """Lines with their ends; ``\\n`` alone ends a line, as in bytes."""
    return io.StringIO(block, newline="\n")


class _ZstdFile:
    """Zstandard frames in a row; zstandard's own reader does not tell a truncation from the end."""

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored = stored
        self._frame: Any = None
        self._ready = memoryview(b"")

    def read1(self, size: int) -> bytes:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._stored.read(_ZSTD_INPUT_BYTES)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the compressed data end within a frame")
                return b""
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        part, self._ready = self._ready[:size], self._ready[size:]
        return bytes(part)


class _Decompressed:
    """Reads what can be decompressed, and only then raises CorruptFileError."""

    def __init__(self, path: str, file: Any) -> None:
        self._path = path
        self._read_some = file.read1 if hasattr(file, "read1") else file.read
        self._damage: CorruptFileError | None = None

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and self._damage is None:
            try:
                part: bytes = self._read_some(size)
            except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                self._damage = CorruptFileError(f"{self._path}: {error}")
            except OSError as error:
                # gzip and bz2 raise plain OSErrors for broken data; those of the system carry a number, and
                # may pass when the runner tries again.
                if error.errno is not None:
                    raise
                self._damage = CorruptFileError(f"{self._path}: {error}")
            else:
                if not part:
                    break
                parts.append(part)
                size -= len(part)
        if self._damage is not None and not parts:
            raise self._damage
        return b"".join(parts)


class _Stored:
    """A binary file that may add what is read to the process's progress."""

    def __init__(self, file: Any, is_progress: bool) -> None:
        self._file = file
        self._is_progress = is_progress
        # CompressedFile asks for it.
        self.mode = "rb"

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        if self._is_progress:
            PROGRESS.bytes_read += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return int(self._file.tell())

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)
