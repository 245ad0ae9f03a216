"""Beam's own runner in its three modes, behind the same face as the engines that have to be started."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engines.engine import Engine

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
        """Nothing: the pipeline's process is all there is."""
