"""What is said while a job works."""

from __future__ import annotations

import io
import time

from beam_triton.score import PROGRESS
from pipelines.progress_line import ProgressLine


def test_lines_say_how_far_the_job_is() -> None:
    """Rows done, their rate, the share of the bytes, and failures once there are some."""
    stream = io.StringIO()
    with ProgressLine(0.02, total_bytes=1000, stream=stream) as line:
        assert "failed" not in line.text(1.0, 10.0)
        PROGRESS.results, PROGRESS.failures, PROGRESS.bytes_read = 1200, 3, 250
        assert line.text(12.0, 100.4) == "   12 s        1,203 rows done        100/s   25% read  3 failed"
        deadline = time.monotonic() + 10
        while "rows done" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    written = stream.getvalue()
    assert "1,203 rows done" in written
    time.sleep(0.1)
    assert stream.getvalue() == written


def test_counts_of_other_processes_are_not_made_up() -> None:
    """Zero rows done would be a lie."""
    assert "rows" not in ProgressLine(1, 1000, counts_here=False).text(3.0, 0.0)


def test_an_interval_of_zero_is_silent() -> None:
    """Nothing is written, and no thread runs."""
    stream = io.StringIO()
    with ProgressLine(0, total_bytes=1000, stream=stream):
        time.sleep(0.05)
    assert stream.getvalue() == ""
