"""The demo's progress where a server keeps an answer back."""

from __future__ import annotations

from beam_triton import TritonClient
from engines.flink_demo import progress
from engines.flink_rest import FlinkRest
from engines.ports import free_ports


def test_a_job_manager_that_does_not_answer_is_said_in_the_line() -> None:
    """A missed answer is no traceback, and no end of the demo."""
    (port,) = free_ports(1)
    with TritonClient(f"http://127.0.0.1:{port}") as client:
        line = progress(FlinkRest(f"http://127.0.0.1:{port}"), client)
    assert line.startswith("cannot be seen just now: ")
    assert "\n" not in line
