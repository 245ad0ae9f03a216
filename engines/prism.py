"""Prism, the portable runner that is closest to Dataflow's."""

from __future__ import annotations

from pathlib import Path

from engines import install
from engines.engine import Engine
from engines.workers import LOOPBACK, process_environment_options


class Prism(Engine):
    """Prism as a pipeline starts it: ``PrismRunner`` runs the binary, and stops it when its process ends.

    ``worker_processes`` chooses where the DoFns run: in the process that submits (LOOPBACK), or in a
    worker process that Beam's boot program starts.
    """

    def __init__(self, folder: Path, *, worker_processes: bool = False) -> None:
        super().__init__(folder)
        self._worker_processes = worker_processes

    @property
    def options(self) -> list[str]:
        workers = process_environment_options(self.folder) if self._worker_processes else LOOPBACK
        return ["--runner=PrismRunner", f"--prism_location={install.go_programs().prism}", *workers]

    def _start(self) -> None:
        install.go_programs()
