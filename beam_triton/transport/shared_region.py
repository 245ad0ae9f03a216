"""Memory that this process and a server on the same machine both map: Linux's POSIX shared memory.

A region has a name until the server has opened it, and none after that: its memory is freed once nobody
maps it, however a process ends. A process that is killed in between leaves a file, and one that is killed
later leaves its name registered at the server; `is_abandoned` tells others of both. Each owner holds a socket
in the abstract namespace (unix(7)), which ends with it, so that an owner without one is dead. Process ids
could not tell: they are used again, and containers that share memory may not share them. Such containers may
not share the namespace of the sockets either, so its number is part of the name: where it is another one,
nobody knows whether the owner lives.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from weakref import ref

import numpy as np

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"beam_triton\.([0-9a-f]+-[0-9a-f]{16})\.[0-9]+")
# No process needs longer from making a file to having it registered.
_UNNAMED_AFTER_SECONDS = 60.0

_numbers = count(1)
_forks = 0
_owner: tuple[str, socket.socket] | None = None


def is_supported() -> bool:
    """Whether this system has shared memory as Triton's clients use it."""
    return sys.platform == "linux" and _FOLDER.is_dir()


class SharedRegion:
    """A region that this process has made; readable and writable, ``nbytes`` long.

    Attributes:
        name: by which the server opens it: ``/name`` is its key.

    Raises:
        OSError: the system has no memory for it. It is taken at once: memory that is only promised would end
            the process at the first write (Docker gives a container 64 MiB).
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.name = f"beam_triton.{_owner_name()}.{next(_numbers)}"
        self._loan: ref[object] | None = None
        self._forks_before_loan = 0
        descriptor = os.open(_FOLDER / self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            self._mapping = mmap.mmap(descriptor, nbytes)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(descriptor)

    @property
    def memory(self) -> memoryview:
        return memoryview(self._mapping)

    def unlink(self) -> None:
        """Take its name away: nobody else can open it now."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_FOLDER / self.name)

    def lend(self, on_return: Callable[[SharedRegion], None]) -> memoryview:
        """Its memory; ``on_return(self)`` is called, on any thread, once nothing refers to that any more."""
        # NumPy's views refer to the first array of a chain: this one, as its own base is none.
        self._forks_before_loan = _forks
        borrowed = np.ndarray(self.nbytes, np.uint8, self._mapping)
        self._loan = ref(borrowed, partial(_returned, self, on_return))
        return memoryview(borrowed)

    @property
    def is_shared_with_child(self) -> bool:
        """Whether a child was forked during the last loan: what it still refers to is not known here."""
        return self._forks_before_loan != _forks


def _returned(region: SharedRegion, on_return: Callable[[SharedRegion], None], loan: object) -> None:
    region._loan = None
    on_return(region)


def is_abandoned(name: str) -> bool:
    """Whether a region of this name was made by this library, in a process that has ended."""
    named = _NAME.fullmatch(name)
    if named is None or (_owner is not None and named[1] == _owner[0]):
        return False
    if not named[1].startswith(f"{_socket_namespace()}-"):
        return False
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with probe:
        try:
            probe.bind(_address(named[1]))
        except OSError:
            return False
    return True


def unlink_abandoned() -> None:
    """Remove the files of processes that were killed while they made a region."""
    for file in _FOLDER.glob("beam_triton.*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _UNNAMED_AFTER_SECONDS and is_abandoned(file.name):
                file.unlink()


def _owner_name() -> str:
    global _owner
    if _owner is None:
        name = f"{_socket_namespace()}-{secrets.token_hex(8)}"
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        holder.bind(_address(name))
        _owner = name, holder
    return _owner[0]


def _socket_namespace() -> str:
    try:
        return f"{os.stat('/proc/self/ns/net').st_ino:x}"
    except OSError:
        return "0"


def _address(owner: str) -> str:
    return f"\0beam_triton.{owner}"


def _forget_owner() -> None:
    """A forked child is an owner of its own; the parent's socket must end with the parent."""
    global _owner
    if _owner is not None:
        _owner[1].close()
        _owner = None


def _count_fork() -> None:
    # Before and after: another thread may lend a region in between.
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork, after_in_parent=_count_fork, after_in_child=_forget_owner)
