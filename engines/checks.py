"""What holds on every engine."""

from __future__ import annotations

import time
from collections.abc import Callable

from engines.observation import Observation


def check_promises(observation: Observation, *, elements: int) -> None:
    """Every element once, one session a process, ``max_total`` per process, nothing left at the server."""
    assert observation.numbers == list(range(elements))
    assert observation.dofns.sessions_in_a_process == 1
    assert observation.connections_by_process.keys() <= observation.dofns.processes
    assert 0 < max(observation.connections_by_process.values()) <= observation.max_total
    assert observation.connections_at_server <= observation.max_total * len(observation.dofns.processes)
    assert observation.connection_waits > 0, "no more was in flight than max_total: it limited nothing"
    assert observation.connections_left == 0


def wait_until(reached: Callable[[], bool], *, within_seconds: float) -> None:
    """Look five times a second until it is so. AssertionError where it takes longer."""
    deadline = time.monotonic() + within_seconds
    while not reached():
        assert time.monotonic() < deadline, f"not reached within {within_seconds:g} s"
        time.sleep(0.2)
