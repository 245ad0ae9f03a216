"""A real nginx, from the machine's own package, in front of servers on 127.0.0.1."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.certificates import CertificateFiles
from tests.support.local_process import START_SECONDS, LocalProcess, find_binary


def nginx_binary() -> str | None:
    return find_binary(Nginx.name)


@dataclass(frozen=True)
class LoggedAnswer:
    """A line of the access log: when the answer was complete, how long the request took, its ``X-Sender``."""

    status: int
    at: float
    seconds: float
    sender: str


class Nginx(LocalProcess):
    """A context manager that runs nginx.

    ``upstream_ports`` are the servers that nginx spreads requests over. ``certificate`` switches TLS on, and
    ``client_ca`` then requires a client certificate of that authority (without one nginx answers 400).
    ``keep_alive_seconds`` is how long an idle client connection stays open; ``requests_per_connection`` is
    after how many requests nginx closes it. ``read_timeout_seconds`` is how long a server may take to answer
    before nginx answers 504. Failures of a dead server reach the client (``proxy_next_upstream off``) unless
    ``fails_over``. ``access_log`` records every answer for `answers` and `statuses`. ``listen`` is a further
    address to listen at. ``redirects_to`` answers every request with a 308 to the same path there.
    ``directives`` are further lines of the location.
    """

    name = "nginx"
    package = "nginx-light"

    def __init__(
        self,
        upstream_ports: Sequence[int],
        *,
        certificate: CertificateFiles | None = None,
        client_ca: Path | None = None,
        keep_alive_seconds: float = 75.0,
        requests_per_connection: int = 100_000,
        read_timeout_seconds: float = 60.0,
        fails_over: bool = False,
        max_body: str = "0",
        access_log: bool = False,
        listen: str | None = None,
        redirects_to: str | None = None,
        directives: str = "",
    ) -> None:
        self.upstream_ports = tuple(upstream_ports)
        self._certificate = certificate
        self._client_ca = client_ca
        self._keep_alive_seconds = keep_alive_seconds
        self._requests_per_connection = requests_per_connection
        self._read_timeout_seconds = read_timeout_seconds
        self._fails_over = fails_over
        self._max_body = max_body
        self._access_log = access_log
        self._listen = listen
        self._redirects_to = redirects_to
        self._directives = directives
        self._always_answers: int | None = None

    def _arguments(self) -> list[str]:
        self._write_configuration()
        return ["-p", str(self._folder), "-c", str(self._configuration), "-e", str(self._error_log)]

    @property
    def endpoint(self) -> str:
        scheme = "https" if self._certificate else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def workers(self) -> set[int]:
        """Process ids of the workers that accept new connections or still serve old ones."""
        return {pid for pid in _process_ids() if _parent(pid) == self._process.pid}

    def answers(self) -> list[LoggedAnswer]:
        """The answers to infer requests so far; needs ``access_log``."""
        lines = [line.split() for line in self._access_log_file.read_text().splitlines() if "/infer" in line]
        return [
            LoggedAnswer(int(status), float(at), float(seconds), sender)
            for status, at, seconds, sender, _ in lines
        ]

    def statuses(self) -> Counter[int]:
        """The number of infer requests by the status of their answer."""
        return Counter(answer.status for answer in self.answers())

    def error_log(self) -> str:
        return self._error_log.read_text(errors="replace") if self._error_log.exists() else ""

    def reload(self, upstream_ports: Sequence[int] | None = None) -> None:
        """Reload nginx, with other servers if given; returns when old workers accept no new connections."""
        if upstream_ports is not None:
            self.upstream_ports = tuple(upstream_ports)
            self._write_configuration()
        self._reload()

    def answer_always(self, status: int | None) -> None:
        """Reload nginx to answer every request with this status; None forwards to the servers again."""
        self._always_answers = status
        self._write_configuration()
        self._reload()

    def _reload(self) -> None:
        before = self.workers
        self._process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + START_SECONDS
        while not self.workers - before or any(_accepts(pid) for pid in before):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nginx did not reload:\n{self.error_log()}")
            time.sleep(0.02)

    @property
    def _configuration(self) -> Path:
        return self._folder / "nginx.conf"

    @property
    def _access_log_file(self) -> Path:
        return self._folder / "access.log"

    @property
    def _error_log(self) -> Path:
        return self._folder / "error.log"

    def _write_configuration(self) -> None:
        servers = "\n".join(f"server 127.0.0.1:{port} max_fails=0;" for port in self.upstream_ports)
        temporary = "\n".join(
            f"{kind}_temp_path {self._folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # A master that runs as root would start its workers as a user that may not read the folder.
        user = "user root;" if os.geteuid() == 0 else ""
        self._configuration.write_text(
            f"""
{user}
daemon off;
worker_processes 1;
pid {self._folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
  log_format answers '$status $msec $request_time $http_x_sender $request_uri';
  access_log {f"{self._access_log_file} answers" if self._access_log else "off"};
  {temporary}
  client_max_body_size {self._max_body};
  keepalive_timeout {int(self._keep_alive_seconds * 1000)}ms;
  keepalive_requests {self._requests_per_connection};
  upstream triton {{
    {servers}
    keepalive 32;
  }}
  server {{
    listen 127.0.0.1:{self.port} {"ssl" if self._certificate else ""};
    {f"listen {self._listen};" if self._listen else ""}
    {self._tls_directives()}
    location / {{
      {f"return {self._always_answers};" if self._always_answers else ""}
      {f"return 308 {self._redirects_to}$request_uri;" if self._redirects_to else ""}
      {self._directives}
      proxy_pass http://triton;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_connect_timeout 2s;
      proxy_read_timeout {int(self._read_timeout_seconds * 1000)}ms;
      proxy_next_upstream {"error timeout" if self._fails_over else "off"};
    }}
  }}
}}
"""
        )

    def _tls_directives(self) -> str:
        if self._certificate is None:
            return ""
        directives = [
            f"ssl_certificate {self._certificate.certificate};",
            f"ssl_certificate_key {self._certificate.key};",
        ]
        if self._client_ca is not None:
            directives += [f"ssl_client_certificate {self._client_ca};", "ssl_verify_client on;"]
        return "\n".join(directives)


def _process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _accepts(worker: int) -> bool:
    """Whether a worker accepts connections; nginx changes the title of a worker that is shutting down."""
    try:
        return b"shutting down" not in Path(f"/proc/{worker}/cmdline").read_bytes()
    except OSError:
        return False


def _parent(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may contain spaces.
    return int(status.rpartition(")")[2].split()[1])
