"""A file system of Beam's that is not this machine's: names without folders, as an object store has them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from apache_beam.io.filesystem import CompressionTypes, FileMetadata, FileSystem

_SCHEME = "bucket"


class Bucket:
    """``bucket://NAME``, kept in a folder, with a copy of ``source`` below ``prefix``.

    A process has to `register` it, or to run what `block_after` gives, before Beam knows it there.
    """

    def __init__(self, folder: Path, prefix: str, source: Path) -> None:
        shutil.copytree(source, folder / "objects" / prefix, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "opened").mkdir()
        self._folder = folder
        self.url = f"{_SCHEME}://{str(folder).lstrip('/')}/objects"

    def register(self) -> None:
        """Beam knows it in this process."""
        BucketFileSystem.opened = self._folder / "opened"

    def block_after(self, *, bytes_read: int) -> Callable[[], None]:
        """For a process whose first read of more stops for good."""
        return partial(_block, self._folder / "opened", bytes_read)

    def files_opened(self) -> int:
        """By all processes."""
        return len(list((self._folder / "opened").iterdir()))


def _block(opened: Path, bytes_read: int) -> None:
    BucketFileSystem.opened = opened
    BucketFileSystem.blocks_after = bytes_read


class BucketFileSystem(FileSystem):
    """What Beam asks of a file system, for reading."""

    opened: Path | None = None
    blocks_after: int | None = None
    folders_listed = False
    """As HDFS: a listing has the folders of the next level, and nothing below."""

    @classmethod
    def scheme(cls) -> str:
        return _SCHEME

    def has_dirs(self) -> bool:
        return self.folders_listed

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        root = Path("/") / dir_or_prefix.removeprefix(f"{_SCHEME}://")
        for path in sorted(root.iterdir() if self.folders_listed else root.rglob("*")):
            name = f"{_SCHEME}:/{path}"
            if path.is_file():
                yield FileMetadata(name, path.stat().st_size)
            elif self.folders_listed:
                yield FileMetadata(name, 0)

    def open(
        self,
        path: str,
        mime_type: str = "application/octet-stream",
        compression_type: str = CompressionTypes.AUTO,
    ) -> BinaryIO:
        if self.opened is not None:
            (self.opened / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        file: Any = (Path("/") / path.removeprefix(f"{_SCHEME}://")).open("rb")
        if self.blocks_after is not None:
            real = file.read

            def read(size: int) -> bytes:
                time.sleep(60)
                return bytes(real(size))

            file.read = read
        assert compression_type == CompressionTypes.UNCOMPRESSED
        opened: BinaryIO = file
        return opened

    def join(self, basepath: str, *paths: str) -> str:
        return "/".join((basepath, *paths))

    def split(self, path: str) -> tuple[str, str]:
        head, _, tail = path.rpartition("/")
        return head, tail

    def mkdirs(self, path: str) -> None:
        raise NotImplementedError

    def create(self, path: str, *_: Any, **__: Any) -> BinaryIO:
        raise NotImplementedError

    def copy(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        raise NotImplementedError

    def rename(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        raise NotImplementedError

    def exists(self, path: str) -> bool:
        return (Path("/") / path.removeprefix(f"{_SCHEME}://")).exists()

    def size(self, path: str) -> int:
        raise NotImplementedError

    def last_updated(self, path: str) -> float:
        raise NotImplementedError

    def checksum(self, path: str) -> str:
        raise NotImplementedError

    def metadata(self, path: str) -> FileMetadata:
        raise NotImplementedError

    def delete(self, paths: list[str]) -> None:
        raise NotImplementedError
