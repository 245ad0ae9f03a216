"""Looking at something that changes, five times a second, for as long as a block runs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

W = TypeVar("W", bound="Watch")


class Watch(ABC):
    """A context manager that calls `look` on a thread of its own."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=type(self).__name__)

    @abstractmethod
    def look(self) -> None:
        """Note what there is now."""

    def __enter__(self: W) -> W:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.look()
