"""Beam's Flink job server: takes portable pipelines and runs them on Flink."""

from __future__ import annotations

import os
from pathlib import Path

from engines import install, tools
from engines.engine import Engine
from engines.ports import accepts, free_ports
from engines.workers import LOOPBACK

LOGGING = Path(__file__).resolve().parent / "log4j2.properties"


class FlinkJobServer(Engine):
    """A job server on 127.0.0.1; ``endpoint`` is what ``--job_endpoint`` takes.

    ``master`` is ``[local]`` for a Flink inside the job server's process, or ``host:port`` of a
    cluster's REST address. The workers of ``options`` are in the process that submits: right for the
    Flink inside, and for a cluster of one task manager; FlinkCluster has worker processes.
    """

    def __init__(self, folder: Path, *, master: str = "[local]", parallelism: int = 2) -> None:
        super().__init__(folder)
        self._master = master
        self._parallelism = parallelism
        self._job_port, self._artifact_port, self._expansion_port = free_ports(3)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._job_port}"

    @property
    def options(self) -> list[str]:
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={self.endpoint}",
            f"--parallelism={self._parallelism}",
            *LOOPBACK,
        ]

    def _start(self) -> None:
        scratch = self.folder / "job-server"
        scratch.mkdir(exist_ok=True)
        # The job server's dependencies hold slf4j without anything to write with; Flink's jars have it.
        logging_jars = sorted(install.flink().glob("log4j-*.jar"))
        classpath = [f"{install.flink_job_server()}/*", *map(str, logging_jars)]
        process = self._scope.start(
            "job-server",
            [
                tools.java(),
                *(*tools.JAVA_MODULE_OPTIONS, "-Xmx1g", f"-Djava.io.tmpdir={scratch}"),
                *(f"-Dlog4j.configurationFile={LOGGING}", "-cp", os.pathsep.join(classpath)),
                "org.apache.beam.runners.flink.FlinkJobServerDriver",
                *("--job-host=127.0.0.1", f"--job-port={self._job_port}"),
                *(f"--artifact-port={self._artifact_port}", f"--expansion-port={self._expansion_port}"),
                *(f"--artifacts-dir={scratch}", f"--flink-master={self._master}"),
            ],
        )
        self._scope.await_ready("job-server", process, lambda: accepts(self._job_port), within_seconds=60.0)
