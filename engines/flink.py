"""Flink on this machine: Beam's job server with a Flink inside it, and a standalone cluster behind one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from engines import install, tools
from engines.engine import Engine
from engines.flink_rest import FlinkRest
from engines.processes import accepts, free_ports, kill
from engines.workers import LOOPBACK, process_environment_options

LOGGING = Path(__file__).resolve().parent / "log4j2.properties"

_JAVA_OPENED = (
    "java.lang",
    "java.lang.reflect",
    "java.net",
    "java.io",
    "java.nio",
    "sun.nio.ch",
    "java.text",
    "java.time",
    "java.util",
    "java.util.concurrent",
    "java.util.concurrent.atomic",
    "java.util.concurrent.locks",
)
JAVA_MODULE_OPTIONS = (
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
    "--add-exports=java.rmi/sun.rmi.registry=ALL-UNNAMED",
    *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _JAVA_OPENED),
)
"""Open what Flink needs and Java 17 closes by default; Flink's own start scripts pass the same options."""

_MEBIBYTES = {
    "taskmanager.memory.framework.heap.size": 128,
    "taskmanager.memory.task.heap.size": 384,
    "taskmanager.memory.framework.off-heap.size": 128,
    "taskmanager.memory.task.off-heap.size": 64,
    "taskmanager.memory.network.min": 128,
    "taskmanager.memory.network.max": 128,
    "taskmanager.memory.managed.size": 192,
    "taskmanager.memory.jvm-metaspace.size": 256,
    "taskmanager.memory.jvm-overhead.min": 192,
    "taskmanager.memory.jvm-overhead.max": 192,
}
"""A task manager refuses to start unless every one of these is given. Flink's start scripts compute them,
and the distribution on PyPI has no start scripts."""

_CONFIGURATION = """\
jobmanager:
  rpc: {{address: 127.0.0.1, port: {rpc_port}}}
  bind-host: 127.0.0.1
  memory: {{process: {{size: 1g}}}}
  execution: {{failover-strategy: region}}
taskmanager:
  host: 127.0.0.1
  bind-host: 127.0.0.1
  numberOfTaskSlots: {slots}
  # Spread a job over all task managers even when it needs fewer slots than there are.
  load-balance: {{mode: slots}}
  # The default of 512 buffers for each shuffle of a batch job is more than this task manager has.
  network: {{sort-shuffle: {{min-buffers: 64}}}}
rest:
  address: 127.0.0.1
  bind-address: 127.0.0.1
  port: {rest_port}
blob: {{storage: {{directory: {scratch}}}}}
io: {{tmp: {{dirs: {scratch}}}}}
web: {{tmpdir: {scratch}, submit: {{enable: false}}}}
# Notice a killed task manager after 8 s instead of 50, and restart its job.
heartbeat: {{interval: 2000, timeout: 8000}}
# Of jobs with --checkpointing_interval; the job manager's memory takes 5 MB of state only.
state: {{checkpoints: {{dir: "file://{scratch}/checkpoints"}}}}
restart-strategy: {{type: fixed-delay, fixed-delay: {{attempts: 10, delay: 2 s}}}}
"""


class FlinkJobServer(Engine):
    """Beam's Flink job server on 127.0.0.1; ``endpoint`` is the value of ``--job_endpoint``.

    ``master`` is ``[local]`` for a Flink inside the job server's process, or ``host:port`` of a
    cluster's REST address. ``options`` put the workers into the process that submits, which works for
    the Flink inside and for a cluster of one task manager; `FlinkCluster` has worker processes.
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
        # The job server depends on slf4j but on no logging backend; Flink's own jars include one.
        logging_jars = sorted(install.flink().glob("log4j-*.jar"))
        classpath = [f"{install.beam_java()}/*", *map(str, logging_jars)]
        process = self._scope.start(
            "job-server",
            [
                tools.java(),
                *(*JAVA_MODULE_OPTIONS, "-Xmx1g", f"-Djava.io.tmpdir={scratch}"),
                *(f"-Dlog4j.configurationFile={LOGGING}", "-cp", os.pathsep.join(classpath)),
                "org.apache.beam.runners.flink.FlinkJobServerDriver",
                *("--job-host=127.0.0.1", f"--job-port={self._job_port}"),
                *(f"--artifact-port={self._artifact_port}", f"--expansion-port={self._expansion_port}"),
                *(f"--artifacts-dir={scratch}", f"--flink-master={self._master}"),
            ],
        )
        self._scope.await_ready("job-server", process, lambda: accepts(self._job_port), within_seconds=60.0)


class FlinkCluster(Engine):
    """Task managers of ``slots`` slots each, a job manager and a job server, all on 127.0.0.1.

    The DoFns run in worker processes that Beam's boot program starts in bare environments: one for each
    task manager in streaming, one for each task manager and stage in batch. The cluster is ready in about
    15 s; a task manager takes 1.4 GB. ``parallelism`` defaults to all slots; a lower value leaves free
    slots for the tasks of a killed task manager.
    """

    def __init__(
        self, folder: Path, *, task_managers: int = 2, slots: int = 2, parallelism: int | None = None
    ) -> None:
        super().__init__(folder)
        self._count = task_managers
        self._slots = slots
        self._parallelism = parallelism or task_managers * slots
        self._task_managers: list[subprocess.Popen[bytes]] = []
        self._rpc_port, rest_port = free_ports(2)
        self.rest = FlinkRest(f"http://127.0.0.1:{rest_port}")
        self._rest_port = rest_port
        self._job_server = FlinkJobServer(
            folder / "submission", master=f"127.0.0.1:{rest_port}", parallelism=self._parallelism
        )

    @property
    def options(self) -> list[str]:
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={self._job_server.endpoint}",
            f"--parallelism={self._parallelism}",
            *process_environment_options(self.folder),
        ]

    def kill_task_manager(self, index: int) -> None:
        """``kill -9`` a task manager, as the out-of-memory killer would; its workers keep running."""
        process = self._task_managers[index]
        kill(process.pid, signal.SIGKILL)
        process.wait()

    def start_task_manager(self) -> int:
        """Start one more task manager and return its index, without waiting until it is ready."""
        index = len(self._task_managers)
        heap = sum(size for name, size in _MEBIBYTES.items() if ".heap." in name)
        direct = sum(
            size for name, size in _MEBIBYTES.items() if ".off-heap." in name or name.endswith("network.max")
        )
        figures = [word for name, size in _MEBIBYTES.items() for word in ("-D", f"{name}={size}m")]
        self._task_managers.append(
            self._java(
                f"task-manager-{index}",
                [
                    *(f"-Xms{heap // 2}m", f"-Xmx{heap}m", f"-XX:MaxDirectMemorySize={direct}m"),
                    f"-XX:MaxMetaspaceSize={_MEBIBYTES['taskmanager.memory.jvm-metaspace.size']}m",
                ],
                "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
                [*figures, "-D", f"taskmanager.cpu.cores={self._slots}.0"],
            )
        )
        return index

    def _start(self) -> None:
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        self._configuration.mkdir(exist_ok=True)
        (self._configuration / "config.yaml").write_text(
            _CONFIGURATION.format(
                rpc_port=self._rpc_port, rest_port=self._rest_port, slots=self._slots, scratch=scratch
            )
        )
        manager = self._java(
            "job-manager",
            ["-Xmx512m"],
            "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint",
        )
        for _ in range(self._count):
            self.start_task_manager()
        self._scope.await_ready("job-manager", manager, self._is_complete, within_seconds=120.0)
        self._parts.enter_context(self._job_server)

    @property
    def _configuration(self) -> Path:
        return self.folder / "configuration"

    def _is_complete(self) -> bool | None:
        try:
            return self.rest.task_managers() == self._count or None
        except (OSError, KeyError):  # the job manager is still starting
            return None

    def _java(
        self, name: str, memory: list[str], main_class: str, arguments: list[str] | None = None
    ) -> subprocess.Popen[bytes]:
        return self._scope.start(
            name,
            [
                tools.java(),
                *(*JAVA_MODULE_OPTIONS, *memory, f"-Dlog4j.configurationFile={LOGGING}"),
                *("-cp", f"{install.flink()}/*", main_class),
                *("--configDir", str(self._configuration), *(arguments or [])),
            ],
            cwd=self.folder,
        )
