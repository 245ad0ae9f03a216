"""The few calls of a Flink job manager's REST API that the engines and their tests make."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

_FINAL_STATES = frozenset({"FINISHED", "CANCELED", "FAILED"})


class FlinkRest:
    """A job manager at ``url``, such as ``http://127.0.0.1:8081``.

    Every call raises OSError where the job manager does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def task_managers(self) -> int:
        """The number of task managers that are connected to the job manager."""
        return int(self._request("GET", "/overview")["taskmanagers"])

    def job_states(self) -> dict[str, str]:
        """The state of every job that the job manager knows, by id."""
        return {job["id"]: job["status"] for job in self._request("GET", "/jobs")["jobs"]}

    def running_jobs(self) -> list[str]:
        """Ids of the jobs in state RUNNING."""
        return [job for job, state in self.job_states().items() if state == "RUNNING"]

    def checkpoints(self, job: str) -> dict[str, int]:
        """How many checkpoints of a job were ``completed``, ``failed``, ``restored`` and so on."""
        counts: dict[str, int] = self._request("GET", f"/jobs/{job}/checkpoints")["counts"]
        return counts

    def cancel(self, job: str, *, within_seconds: float = 60.0) -> str:
        """Cancel a job and return its final state. TimeoutError if it has none after ``within_seconds``."""
        self._request("PATCH", f"/jobs/{job}?mode=cancel")
        deadline = time.monotonic() + within_seconds
        while (state := self.job_states()[job]) not in _FINAL_STATES:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Flink job {job} is {state} after {within_seconds:g} s")
            time.sleep(0.3)
        return state

    def _request(self, method: str, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, method=method)
        with urllib.request.urlopen(request, timeout=10.0) as response:
            answer: dict[str, Any] = json.loads(response.read() or b"{}")
        return answer
