"""A real forward proxy, tinyproxy from the machine's own package, on 127.0.0.1."""

from __future__ import annotations

from pathlib import Path

from tests.support.local_process import LocalProcess, find_binary


def tinyproxy_binary() -> str | None:
    return find_binary(Tinyproxy.name)


class Tinyproxy(LocalProcess):
    """A context manager that runs tinyproxy.

    ``credentials``, user name and password, are what it asks its clients for. Without ``allows_tunnels`` it
    refuses every CONNECT.
    """

    name = package = "tinyproxy"

    def __init__(self, *, credentials: tuple[str, str] | None = None, allows_tunnels: bool = True) -> None:
        self._credentials = credentials
        self._allows_tunnels = allows_tunnels

    def _arguments(self) -> list[str]:
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
        return ["-d", "-c", str(configuration)]

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

    def error_log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def _log(self) -> Path:
        return self._folder / "tinyproxy.log"
