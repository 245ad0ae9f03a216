"""The base class of the engines: pipeline options, and processes that end when its context is left."""

from __future__ import annotations

import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from engines.install import REPOSITORY
from engines.processes import EngineError, Scope, tail

Self = TypeVar("Self", bound="Engine")


@dataclass
class PipelineRun:
    """A pipeline's process, started in the repository's folder; its output goes to ``log``."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def finish(self, *, within_seconds: float = 300.0) -> float:
        """Wait until the pipeline succeeds and return the seconds since its start.

        Raises:
            EngineError: the pipeline failed, or still runs after ``within_seconds``.
        """
        try:
            exit_code = self.process.wait(max(0.0, self.started + within_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            outcome = f"the pipeline still runs after {within_seconds:g} s"
            raise EngineError(f"{outcome}\n{tail(self.log)}") from None
        if exit_code != 0:
            raise EngineError(f"the pipeline ended with exit code {exit_code}\n{tail(self.log)}")
        return time.monotonic() - self.started


class Engine(ABC):
    """An engine that logs into ``folder``. Entering its context starts it; leaving ends all its processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scope = Scope(folder)
        self._pipelines = 0
        self._parts = ExitStack()

    @property
    @abstractmethod
    def options(self) -> list[str]:
        """Pipeline options to run on this engine."""

    def start_pipeline(self, script: str | Path, *arguments: str) -> PipelineRun:
        """Start a pipeline's script with this Python; the pipeline ends with the engine at the latest."""
        name = f"pipeline-{self._pipelines}"
        self._pipelines += 1
        command = [sys.executable, str(script), *arguments, *self.options]
        environment = {"PYTHONPATH": str(REPOSITORY)}
        process = self._scope.start(name, command, environment=environment, cwd=REPOSITORY)
        return PipelineRun(process, self._scope.log(name), time.monotonic())

    def run_pipeline(self, script: str | Path, *arguments: str, within_seconds: float = 300.0) -> PipelineRun:
        """Start a pipeline's script and wait until it succeeds. EngineError as in `PipelineRun.finish`."""
        run = self.start_pipeline(script, *arguments)
        run.finish(within_seconds=within_seconds)
        return run

    def members(self) -> list[int]:
        """Ids of this engine's running processes, pipelines and workers included."""
        return self._scope.members()

    @abstractmethod
    def _start(self) -> None:
        """Start the engine's processes and wait until they are ready."""

    def __enter__(self: Self) -> Self:
        self._parts.enter_context(self._scope)
        try:
            self._start()
        except BaseException:
            self._parts.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.close()
