"""A real server from the machine's own package, run in a temporary folder of its own on 127.0.0.1."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TypeVar

P = TypeVar("P", bound="LocalProcess")

START_SECONDS = 10.0


def find_binary(name: str) -> str | None:
    """The path of a program: on ``PATH``, or in ``sbin``, which is not on an ordinary user's ``PATH``."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


class LocalProcess(ABC):
    """A context manager; its child says what is run.

    Attributes:
        name: the program's, and that of the temporary folder.
        package: the Debian package that has it.
        port: where it listens, chosen when it starts.
    """

    name: str
    package: str
    port: int

    @abstractmethod
    def _arguments(self) -> list[str]:
        """Write the configuration into the folder, and return the program's arguments."""

    @abstractmethod
    def error_log(self) -> str:
        """What it says of itself, for errors."""

    def __enter__(self: P) -> P:
        binary = find_binary(self.name)
        if binary is None:
            raise FileNotFoundError(f"{self.name} is not installed (Debian: apt-get install {self.package})")
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self._process = subprocess.Popen(
            [binary, *self._arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._await_start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it, close its connections and remove its folder."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _await_start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{self.error_log()}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.name} does not listen:\n{self.error_log()}") from None
                time.sleep(0.02)
