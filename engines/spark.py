"""Spark on this machine: Beam's portable job server with a Spark of some threads inside it."""

from __future__ import annotations

from pathlib import Path

from engines import install, tools
from engines.engine import Engine
from engines.flink import JAVA_MODULE_OPTIONS, LOGGING
from engines.processes import accepts, free_ports
from engines.workers import LOOPBACK, process_environment_options

_JAVA_OPENED_FOR_SPARK = ("java.lang.invoke", "sun.nio.cs", "sun.security.action", "sun.util.calendar")


class SparkJobServer(Engine):
    """Beam's Spark job server on 127.0.0.1.

    ``master`` is a Spark master's URL; ``local[2]`` is a Spark of two threads inside the job server. With
    ``worker_processes`` the DoFns run in worker processes that Beam's boot program starts; without, in the
    process that submits (LOOPBACK).
    """

    def __init__(self, folder: Path, *, master: str = "local[2]", worker_processes: bool = False) -> None:
        super().__init__(folder)
        self._master = master
        self._worker_processes = worker_processes
        self._job_port, self._artifact_port, self._expansion_port = free_ports(3)

    @property
    def options(self) -> list[str]:
        workers = process_environment_options(self.folder) if self._worker_processes else LOOPBACK
        return ["--runner=PortableRunner", f"--job_endpoint=127.0.0.1:{self._job_port}", *workers]

    def _start(self) -> None:
        scratch = self.folder / "job-server"
        scratch.mkdir(exist_ok=True)
        opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _JAVA_OPENED_FOR_SPARK]
        process = self._scope.start(
            "job-server",
            [
                tools.java(),
                *(*JAVA_MODULE_OPTIONS, *opened, "-Xmx1g", f"-Djava.io.tmpdir={scratch}"),
                *(f"-Dlog4j.configurationFile={LOGGING}", "-cp", f"{install.beam_spark()}/*"),
                # Spark's web page would take a port of its own.
                *("-Dspark.ui.enabled=false", "-Dspark.driver.bindAddress=127.0.0.1"),
                "org.apache.beam.runners.spark.SparkJobServerDriver",
                *("--job-host=127.0.0.1", f"--job-port={self._job_port}"),
                *(f"--artifact-port={self._artifact_port}", f"--expansion-port={self._expansion_port}"),
                *(f"--artifacts-dir={scratch}", f"--spark-master-url={self._master}"),
            ],
        )
        self._scope.await_ready("job-server", process, lambda: accepts(self._job_port), within_seconds=60.0)
