"""Failed elements of the inference as failures of their rows, and how many of them are too many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam

from beam_triton.errors import TritonError
from beam_triton.score.rows import Failure, Row


class TooManyFailuresError(TritonError):
    """More rows failed than the user allows."""


def failure_of_element(failed: tuple[tuple[Row, Any], tuple[Any, str, Any]]) -> Failure:
    """From ``((Row, element), (exception type, message, traceback lines))``."""
    (row, _), (kind, message, _) = failed
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return Failure(row.file, row.number, name, message, row.data())


class LimitFailures(beam.DoFn):
    """Passes failures on, and raises TooManyFailuresError when a worker has seen more than ``maximum``.

    Workers do not know of each other's failures, so a job of many stops at a multiple of the maximum; the
    exact count is to be compared when the job has ended.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._seen = 0

    def process(self, failure: Failure) -> Iterator[Failure]:
        self._seen += 1
        if self._seen > self._maximum:
            place = failure.file if failure.number is None else f"{failure.file}, row {failure.number}"
            raise TooManyFailuresError(
                f"more than {self._maximum} row(s) failed; "
                f"the last: {place}: {failure.error}: {failure.message}"
            )
        yield failure
