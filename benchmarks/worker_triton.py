"""A Triton on the worker beside the same server elsewhere: ``python -m benchmarks.worker_triton``.

One machine, one server. The way elsewhere is a proxy that hands bytes on after 5 ms each way: it has more
bandwidth than a network, and takes CPU time of this machine, which a network would not.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from beam_triton import TritonClient, TritonInference, WorkerTriton
from benchmarks.delay_proxy import delayed
from tests.support.models import write_models

_ROUND_TRIP_SECONDS = 0.01
_ROUNDS = 5
_BLOCK = 500
_ECHO, _SLOW = "echo", "slow"


class Work(NamedTuple):
    """So many elements of a length, on a model."""

    text: str
    model: str
    length: int
    elements: int


_WORK = (
    Work("64 x 128 FP32, echo", _ECHO, 128, 40_000),
    Work("64 x 3072 FP32, echo", _ECHO, 3072, 10_000),
    Work("64 x 128 FP32, 20 ms, 8 instances", _SLOW, 128, 40_000),
)


def _elements(block: int, length: int) -> Iterator[Any]:
    return iter(np.full((_BLOCK, length), block, np.float32))


def _rate(endpoint: str | WorkerTriton, work: Work) -> float:
    """Elements a second through a pipeline in this process."""
    started = time.monotonic()
    with beam.Pipeline("FnApiRunner") as pipeline:
        _ = (
            pipeline
            | beam.Create(range(work.elements // _BLOCK))
            | beam.FlatMap(_elements, work.length)
            | TritonInference(endpoint, work.model)
            | beam.combiners.Count.Globally()
        )
    return work.elements / (time.monotonic() - started)


def _milliseconds(endpoint: str | WorkerTriton, work: Work) -> float:
    """Of a request of 64 elements, one at a time; the median."""
    batch = {"x": np.ones((64, work.length), np.float32)}
    seconds = []
    with TritonClient(endpoint) as client:
        for _ in range(100):
            started = time.monotonic()
            client.infer(work.model, batch)
            seconds.append(time.monotonic() - started)
    return statistics.median(seconds) * 1e3


def _shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"


def main() -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        write_models(repository, ["echo_variable"], name=_ECHO, instances=2, max_batch_size=64)
        slow = {"instances": 8, "max_batch_size": 64, "parameters": {"sleep_seconds": "0.02"}}
        write_models(repository, ["echo_variable"], name=_SLOW, **slow)
        worker = WorkerTriton(str(repository), linger_seconds=0)
        started = time.monotonic()
        with TritonClient(worker), delayed(worker.url, _ROUND_TRIP_SECONDS) as away:
            print(f"the server was ready after {time.monotonic() - started:.1f} s", file=sys.stderr)
            print("| | | on the worker | 10 ms away |\n|---|---|--:|--:|")
            for work in _WORK:
                for what, measure in (("elements a second", _rate), ("ms a request", _milliseconds)):
                    rounds = [(measure(worker, work), measure(away, work)) for _ in range(_ROUNDS)]
                    here, there = map(statistics.median, zip(*rounds, strict=True))
                    print(f"| {work.text} | {what} | {_shown(here)} | {_shown(there)} |", flush=True)


if __name__ == "__main__":
    main()
