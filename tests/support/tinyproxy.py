"""A real forward proxy, tinyproxy from the machine's own package, on 127.0.0.1."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

_START_SECONDS = 10.0


def tinyproxy_binary() -> str | None:
    """The path of tinyproxy: on ``PATH``, or in ``sbin``, which is not on an ordinary user's ``PATH``."""
    return shutil.which("tinyproxy") or shutil.which("tinyproxy", path="/usr/sbin:/usr/local/sbin")


class Tinyproxy:
    """A context manager that runs tinyproxy in a temporary folder of its own.

    ``credentials``, user name and password, are what it asks its clients for. Without ``allows_tunnels`` it
    refuses every CONNECT.
    """

    def __init__(self, *, credentials: tuple[str, str] | None = None, allows_tunnels: bool = True) -> None:
        self._credentials = credentials
        self._allows_tunnels = allows_tunnels

    def __enter__(self) -> Tinyproxy:
        binary = tinyproxy_binary()
        if binary is None:
            raise FileNotFoundError("tinyproxy is not installed (Debian: apt-get install tinyproxy)")
        self._folder = Path(tempfile.mkdtemp(prefix="tinyproxy-"))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        lines = [
            f"Port {self.port}",
            "Listen 127.0.0.1",
            "Timeout 60",
            f'LogFile "{self._log}"',
            "LogLevel Connect",
            "MaxClients 100",
            "Allow 127.0.0.1",
        ]
        if self._credentials is not None:
            lines.append("BasicAuth {} {}".format(*self._credentials))
        if not self._allows_tunnels:
            # Listed ports are allowed, and 1 is none of a test.
            lines.append("ConnectPort 1")
        configuration = self._folder / "tinyproxy.conf"
        configuration.write_text("\n".join(lines) + "\n")
        self._process = subprocess.Popen(
            [binary, "-d", "-c", str(configuration)],
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

    @property
    def url(self) -> str:
        """Without credentials."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url_with_credentials(self) -> str:
        assert self._credentials is not None
        return "http://{}:{}@127.0.0.1:{}".format(*self._credentials, self.port)

    def requests(self) -> list[str]:
        """The request lines that it was given, CONNECT among them."""
        log = self._log.read_text(errors="replace")
        return [line.partition("): ")[2] for line in log.splitlines() if " Request (" in line]

    def stop(self) -> None:
        """Stop tinyproxy, close its connections and remove its folder."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_START_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self._folder / "tinyproxy.log"

    def _await_start(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"tinyproxy ended with {self._process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise TimeoutError("tinyproxy does not listen") from None
                time.sleep(0.02)
