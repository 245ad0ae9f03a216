"""What every engine is: a context manager with pipeline options, whose processes end with it."""

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
from engines.processes import EngineError, Scope

Self = TypeVar("Self", bound="Engine")


@dataclass
class PipelineRun:
    """A pipeline's process, started in the repository's folder; what it says goes to ``log``."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def finish(self, *, within_seconds: float = 300.0) -> float:
        """Wait for a successful end; return the seconds since the start. EngineError for any other end."""
        try:
            exit_code = self.process.wait(max(0.0, self.started + within_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise EngineError(f"the pipeline still runs after {within_seconds:g} s\n{self._tail()}") from None
        if exit_code != 0:
            raise EngineError(f"the pipeline ended with exit code {exit_code}\n{self._tail()}")
        return time.monotonic() - self.started

    def _tail(self) -> str:
        return f"{self.log}:\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


class Engine(ABC):
    """An engine whose logs go to ``folder``; ``with`` starts it, and ends whatever belongs to it."""

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
        """Run a pipeline's script on this engine, with this Python; it ends with the engine at the latest."""
        name = f"pipeline-{self._pipelines}"
        self._pipelines += 1
        command = [sys.executable, str(script), *arguments, *self.options]
        path = {"PYTHONPATH": str(REPOSITORY)}
        process = self._scope.start(name, command, environment=path, cwd=REPOSITORY)
        return PipelineRun(process, self._scope.log(name), time.monotonic())

    def run_pipeline(self, script: str | Path, *arguments: str, within_seconds: float = 300.0) -> PipelineRun:
        """The same, and wait for its end. EngineError where it fails, or takes longer."""
        run = self.start_pipeline(script, *arguments)
        run.finish(within_seconds=within_seconds)
        return run

    def members(self) -> list[int]:
        """Ids of the running processes that belong to this engine, pipelines and workers included."""
        return self._scope.members()

    @abstractmethod
    def _start(self) -> None:
        """Start the processes, and wait until they are ready."""

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
