"""The parts of a Flink job manager's REST API that the engines and their tests need."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

ENDED = frozenset({"FINISHED", "CANCELED", "FAILED"})
"""States that a job does not leave."""


@dataclass(frozen=True)
class Overview:
    """``GET /overview``."""

    task_managers: int
    slots: int
    free_slots: int
    running: int


class FlinkRest:
    """A job manager at ``url``, such as ``http://127.0.0.1:8081``."""

    def __init__(self, url: str) -> None:
        self.url = url

    def overview(self) -> Overview:
        """How many task managers, slots and running jobs there are. OSError where nothing answers."""
        answer = self._ask("GET", "/overview")
        return Overview(
            answer["taskmanagers"], answer["slots-total"], answer["slots-available"], answer["jobs-running"]
        )

    def overview_if_up(self) -> Overview | None:
        """The same, or None where the job manager does not answer or is still starting."""
        try:
            return self.overview()
        except (OSError, KeyError):
            return None

    def states(self) -> dict[str, str]:
        """The state of every job that the job manager remembers, by id."""
        return {job["id"]: job["status"] for job in self._ask("GET", "/jobs")["jobs"]}

    def running(self) -> list[str]:
        """Ids of the jobs that are in state RUNNING."""
        return [job for job, state in self.states().items() if state == "RUNNING"]

    def cancel(self, job: str) -> None:
        """Ask for a job's end; returns at once."""
        self._ask("PATCH", f"/jobs/{job}?mode=cancel")

    def await_end(self, job: str, *, within_seconds: float) -> str:
        """The state that the job ended in. TimeoutError where it still runs after ``within_seconds``."""
        deadline = time.monotonic() + within_seconds
        while (state := self.states()[job]) not in ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Flink job {job} is {state} after {within_seconds:g} s")
            time.sleep(0.3)
        return state

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, method=method)
        with urllib.request.urlopen(request, timeout=10.0) as response:
            answer: dict[str, Any] = json.loads(response.read() or b"{}")
        return answer
