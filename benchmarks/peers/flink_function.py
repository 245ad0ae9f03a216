"""Flink's own Triton function: SQL (``ML_PREDICT``) in an embedded Flink, one process a run.

As released the function runs nowhere; ``flink_triton/MendedTriton.java`` works around its two faults. The
rest is the released bytecode.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Literal

from benchmarks.peers.peer import Peer, PeerMissing
from benchmarks.workload import Target, Throughput, Workload
from engines import install, tools
from engines.flink import JAVA_MODULE_OPTIONS

OkHttp = Literal["released", "unlimited", "pooled", "tuned", "not_reused"]

_MARK = "RESULT "
_LONGEST_RUN_SECONDS = 300


@dataclass(frozen=True)
class Rows:
    """What one job measured: the last nine tenths of its rows, and how long their requests took."""

    rows: int
    seconds: float
    cpu_seconds: float
    p50_seconds: float
    p99_seconds: float


class FlinkFunction(Peer):
    """A row a request. ``parallelism`` subtasks have ``in_flight`` requests each at a time.

    ``client`` is the OkHttpClient that sends them: ``released``; ``unlimited``, without OkHttp's limit of
    five requests a host; or one with the pool that a pull request proposes: with its defaults (``pooled``),
    as it advises for high traffic (``tuned``), or switched off (``not_reused``). ``warm_up`` are a model and
    the rows that it scores first; by default half of the rows on the model itself.
    """

    def __init__(
        self,
        client: OkHttp,
        *,
        parallelism: int = 1,
        in_flight: int = 100,
        warm_up: tuple[str, int] | None = None,
    ) -> None:
        self._client = client
        self._parallelism = parallelism
        self._in_flight = in_flight
        self._warm_up = warm_up
        self.name = f"Flink's function, {client}"

    def check_installed(self) -> None:
        try:
            tools.java()
            install.flink_function()
        except (tools.MissingToolsError, install.NotInstalledError) as missing:
            raise PeerMissing(str(missing)) from None

    def score(self, workload: Workload) -> Throughput:
        run = self.run(workload.target, workload.elements)
        return Throughput(run.rows, run.seconds, run.cpu_seconds)

    def run(self, target: Target, rows: int) -> Rows:
        """Score rows of 128 FP32 on a model that returns ``X`` as ``Y``: the function sends no other names.

        A job to warm up comes first, in the same process, which loads and compiles classes.

        Raises:
            AssertionError: the job failed, or a row was lost, repeated or wrong.
        """
        folder = install.flink_function()
        warm_up_model, warm_up_rows = self._warm_up or (target.model_name, max(1, rows // 2))
        arguments = {
            "endpoint": target.endpoint,
            "model": target.model_name,
            "rows": rows,
            "warm_up_model": warm_up_model,
            "warm_up_rows": warm_up_rows,
            "parallelism": self._parallelism,
            "in_flight": self._in_flight,
            "client": self._client.upper(),
        }
        done = subprocess.run(
            [
                *(str(tools.java()), *JAVA_MODULE_OPTIONS, "-Xmx1g"),
                *("-cp", f"{folder}:{folder}/*", "ScoreRows"),
                *(f"{name}={value}" for name, value in arguments.items()),
            ],
            capture_output=True,
            text=True,
            timeout=_LONGEST_RUN_SECONDS,
            check=False,
        )
        marked = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if done.returncode or not marked:
            raise AssertionError(f"{self.name} failed:\n{_causes(done.stderr)}")
        return Rows(**json.loads(marked[0].removeprefix(_MARK)))


def _causes(log: str) -> str:
    """The messages of an exception and its causes, without their stacks."""
    return "\n".join(line for line in log.splitlines() if line and not line.startswith(("\t", "SLF4J")))[
        -3000:
    ]
