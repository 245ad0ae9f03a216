"""wrk, a load generator in C: the server's own limit for the same request."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.peer import Peer, PeerMissing
from benchmarks.workload import Target, Throughput, Workload

_SCRIPT = Path(__file__).with_name("post_body.lua")
_MARK = "RESULT "
_BINARY = "wrk"
_THREADS = 2


@dataclass(frozen=True)
class Load:
    """What wrk measured; the latency is the median."""

    requests: int
    seconds: float
    latency_seconds: float


class Wrk(Peer):
    name = "wrk"

    def check_installed(self) -> None:
        if shutil.which(_BINARY) is None:
            raise PeerMissing("wrk is not installed (Debian: apt-get install wrk)")

    def score(self, workload: Workload) -> Throughput:
        """Post batches of the workload's elements for ``load_seconds`` over ``load_connections``."""
        batch_size = workload.request_elements
        load = post_for(
            workload.load_seconds,
            workload.target,
            batch_size=batch_size,
            width=workload.width,
            connections=workload.load_connections,
        )
        return Throughput(load.requests * batch_size, load.seconds)


def post_for(seconds: float, target: Target, *, batch_size: int, width: int, connections: int) -> Load:
    """Post the same batch over and over.

    Raises:
        AssertionError: an answer was not 200, or a connection failed.
    """
    body, header_bytes = _request_body(target, batch_size, width)
    with tempfile.NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        done = subprocess.run(
            [
                _BINARY,
                f"-t{min(_THREADS, connections)}",
                f"-c{connections}",
                f"-d{max(1, round(seconds))}s",
                "--timeout=30s",
                f"--script={_SCRIPT}",
                target.infer_url,
                "--",
                file.name,
                str(header_bytes),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    marked = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    reported = json.loads(marked[0].removeprefix(_MARK))
    if reported["errors"] or not reported["requests"]:
        raise AssertionError(f"wrk reported errors: {done.stdout}")
    return Load(
        reported["requests"], reported["duration_microseconds"] / 1e6, reported["latency_microseconds"] / 1e6
    )


def _request_body(target: Target, batch_size: int, width: int) -> tuple[bytes, int]:
    """A request's body as NVIDIA's client encodes it, and the length of its JSON."""
    import tritonclient.http as tritonclient

    rows = Workload(target, batch_size, width).pattern(batch_size)
    x = tritonclient.InferInput("x", list(rows.shape), "FP32")
    x.set_data_from_numpy(rows, binary_data=True)
    body, header_bytes = tritonclient.InferenceServerClient.generate_request_body(
        [x], outputs=[tritonclient.InferRequestedOutput("y", binary_data=True)]
    )
    return bytes(body), header_bytes
