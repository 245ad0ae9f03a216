"""How far the pipeline of this process is: plain counts, read by a line on the terminal.

Beam's metrics of a bundle are seen when the bundle ends, and a local runner may read a whole file in one
bundle. These counts are seen at once, but only by the process that works. They are for showing: threads may
lose an increment to each other, so nothing is decided by them.
"""

from __future__ import annotations


class Progress:
    """``bytes_read`` counts a file's bytes as stored, so that it is comparable to the file's size."""

    __slots__ = ("bytes_read", "failures", "results", "rows")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.bytes_read = 0
        self.rows = 0
        self.results = 0
        self.failures = 0


PROGRESS = Progress()
