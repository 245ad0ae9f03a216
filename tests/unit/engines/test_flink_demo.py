"""The demo's progress line when a server does not answer."""

from __future__ import annotations

from beam_triton import TritonClient
from engines.flink_demo import progress
from engines.flink_rest import FlinkRest
from engines.processes import free_ports


def test_progress_is_unknown_while_the_job_manager_does_not_answer() -> None:
    """A missed answer becomes one line; it neither raises nor ends the demo."""
    (port,) = free_ports(1)
    with TritonClient(f"http://127.0.0.1:{port}") as client:
        line = progress(FlinkRest(f"http://127.0.0.1:{port}"), client)
    assert line.startswith("progress unknown: ")
    assert "\n" not in line
