"""Runners without a server of their own: Beam's FnApiRunner, and Prism, which the pipeline starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engines import install
from engines.engine import Engine
from engines.workers import LOOPBACK, process_environment_options

Mode = Literal["in_memory", "multi_threading", "multi_processing"]


class DirectRunner(Engine):
    """``FnApiRunner`` by name: ``DirectRunner`` would try to download Prism first."""

    def __init__(self, folder: Path, *, mode: Mode = "in_memory", workers: int = 1) -> None:
        super().__init__(folder)
        self._mode = mode
        self._workers = workers

    @property
    def options(self) -> list[str]:
        return [
            "--runner=FnApiRunner",
            f"--direct_running_mode={self._mode}",
            f"--direct_num_workers={self._workers}",
        ]

    def _start(self) -> None:
        """Nothing to start: the runner is part of the pipeline's process."""


class Prism(Engine):
    """The portable runner that is closest to Dataflow's. ``PrismRunner`` starts the binary and stops it.

    With ``worker_processes`` the DoFns run in a worker process that Beam's boot program starts; without,
    in the process that submits (LOOPBACK).
    """

    def __init__(self, folder: Path, *, worker_processes: bool = False) -> None:
        super().__init__(folder)
        self._worker_processes = worker_processes

    @property
    def options(self) -> list[str]:
        workers = process_environment_options(self.folder) if self._worker_processes else LOOPBACK
        return ["--runner=PrismRunner", f"--prism_location={install.go_programs().prism}", *workers]

    def _start(self) -> None:
        """Nothing to start, but an error here if Prism is not installed."""
        install.go_programs()
