"""A standalone Flink cluster on this machine: a job manager, task managers, and Beam's job server."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from engines import install, tools
from engines.engine import Engine
from engines.flink_job_server import LOGGING, FlinkJobServer
from engines.flink_rest import FlinkRest, Overview
from engines.ports import free_ports
from engines.processes import kill
from engines.workers import process_environment_options

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
"""A task manager takes every figure as given, and refuses to start where one is missing: Flink's start
scripts compute them, and the distribution on PyPI has no start scripts."""

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
  # A job of less parallelism than there are slots uses all task managers all the same.
  load-balance: {{mode: slots}}
  # A batch job's shuffles take 512 buffers each otherwise: more than a task manager of this size has.
  network: {{sort-shuffle: {{min-buffers: 64}}}}
rest:
  address: 127.0.0.1
  bind-address: 127.0.0.1
  port: {rest_port}
blob: {{storage: {{directory: {scratch}}}}}
io: {{tmp: {{dirs: {scratch}}}}}
web: {{tmpdir: {scratch}, submit: {{enable: false}}}}
# A killed task manager is noticed within seconds rather than Flink's 50, and its job starts again.
heartbeat: {{interval: 2000, timeout: 8000}}
restart-strategy: {{type: fixed-delay, fixed-delay: {{attempts: 10, delay: 2 s}}}}
"""


class FlinkCluster(Engine):
    """Task managers of ``slots`` slots each, a job manager and a job server, all on 127.0.0.1.

    The DoFns run in worker processes that Beam's boot program starts in bare environments: one a task
    manager in streaming, one a task manager and stage in batch. Ready in about 15 s; a task manager takes
    1.4 GB. ``parallelism`` defaults to all slots; less leaves slots for what a killed task manager ran.
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
    def rest_url(self) -> str:
        """The job manager's web page and REST API."""
        return self.rest.url

    @property
    def options(self) -> list[str]:
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={self._job_server.endpoint}",
            f"--parallelism={self._parallelism}",
            *process_environment_options(self.folder),
        ]

    def overview(self) -> Overview:
        """How many task managers, slots and jobs the job manager knows of."""
        return self.rest.overview()

    def cancel(self, job: str, *, within_seconds: float = 60.0) -> None:
        """Cancel a job, and wait until it has ended."""
        self.rest.cancel(job)
        self.rest.await_end(job, within_seconds=within_seconds)

    def kill_task_manager(self, index: int) -> None:
        """``kill -9`` a task manager, as the out-of-memory killer would: its workers are left alone."""
        process = self._task_managers[index]
        kill(process.pid, signal.SIGKILL)
        process.wait()

    def start_task_manager(self) -> int:
        """Start one more task manager, without waiting for it; return its index."""
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
        self._scope.await_ready("job-manager", manager, self._complete, within_seconds=120.0)
        self._parts.enter_context(self._job_server)

    @property
    def _configuration(self) -> Path:
        return self.folder / "configuration"

    def _complete(self) -> bool | None:
        overview = self.rest.overview_if_up()
        return (overview is not None and overview.task_managers == self._count) or None

    def _java(
        self, name: str, memory: list[str], main_class: str, arguments: list[str] | None = None
    ) -> subprocess.Popen[bytes]:
        return self._scope.start(
            name,
            [
                tools.java(),
                *(*tools.JAVA_MODULE_OPTIONS, *memory, f"-Dlog4j.configurationFile={LOGGING}"),
                *("-cp", f"{install.flink()}/*", main_class),
                *("--configDir", str(self._configuration), *(arguments or [])),
            ],
            cwd=self.folder,
        )
