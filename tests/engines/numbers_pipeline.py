"""A pipeline of numbers whose DoFns write down the process they run in, for tests that count processes.

Every number goes through all models in turn. The models share one pool, and each may have as many requests
in flight as the pool has connections, so only ``max_total`` limits the number of connections.

It runs as a script: Beam pickles what ``__main__`` defines by value, so it also runs on workers that have
the library but not the tests. With ``--streaming`` the numbers come from ``PeriodicImpulse`` in fixed
windows and each window becomes one file; otherwise they come from ``Create``.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.transforms.window import FixedWindows

from beam_triton import TritonInferenceDoFn
from beam_triton.transport import session

BLOCK = 500
IMPULSE_SECONDS = 0.01
WINDOW_SECONDS = 2


class NotingDoFn(TritonInferenceDoFn):
    """Appends a line to its process's file at every setup and teardown."""

    def __init__(self, notes: str, endpoint: str, model_name: str, **options: Any) -> None:
        super().__init__(endpoint, model_name, **options)
        self._notes = notes
        self._instance = ""

    def setup(self) -> None:
        super().setup()
        self._instance = uuid.uuid4().hex
        self._note("setup")

    def teardown(self) -> None:
        super().teardown()
        self._note("teardown")

    def _note(self, event: str) -> None:
        note = {
            "event": event,
            "process": os.getpid(),
            "instance": self._instance,
            "thread": threading.current_thread().name,
            # Through the module: a reference to SESSIONS itself would be pickled as a copy.
            "sessions": len(session.SESSIONS),
        }
        with (Path(self._notes) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")


class WriteWindow(beam.DoFn):
    """Writes the numbers of a window into a file of its own, whose name begins with the window's start."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def process(self, element: tuple[None, Iterable[int]], window: Any = beam.DoFn.WindowParam) -> None:
        name = f"{float(window.start):.0f}-{uuid.uuid4().hex}.txt"
        (Path(self._folder) / name).write_text("".join(f"{number}\n" for number in element[1]))


def block(number: int) -> Iterator[int]:
    return iter(range(number * BLOCK, (number + 1) * BLOCK))


def as_element(number: int) -> npt.NDArray[np.float32]:
    return np.array([number], np.float32)


def as_number(result: PredictionResult) -> int:
    inference: Any = result.inference
    return int(inference["y"][0])


def bounded(pipeline: beam.Pipeline, elements: int) -> Any:
    blocks = pipeline | beam.Create(range(elements // BLOCK), reshuffle=True)
    return blocks | beam.FlatMap(block)


def periodic(pipeline: beam.Pipeline, elements: int, start: float) -> Any:
    impulses = pipeline | PeriodicImpulse(start, start + elements * IMPULSE_SECONDS, IMPULSE_SECONDS)
    return (
        impulses
        | "Number" >> beam.Map(lambda at: round((float(at) - start) / IMPULSE_SECONDS))
        | beam.WindowInto(FixedWindows(WINDOW_SECONDS))
        # The source is a single element that cannot be split; without this, one worker would do it all.
        | beam.Reshuffle()
    )


def summary(result: beam.runners.runner.PipelineResult) -> dict[str, Any]:
    """The library's metrics by name, summed over all steps: counters as int, distributions as dict."""
    found = result.metrics().query(MetricsFilter().with_namespace("beam_triton"))
    numbers: dict[str, Any] = {}
    for counter in found["counters"]:
        name = counter.key.metric.name
        numbers[name] = numbers.get(name, 0) + counter.result
    for distribution in found["distributions"]:
        value = distribution.result
        if not value.count:
            continue
        of_all = numbers.setdefault(distribution.key.metric.name, {"count": 0, "sum": 0, "max": value.max})
        of_all["count"] += value.count
        of_all["sum"] += value.sum
        of_all["max"] = max(of_all["max"], value.max)
        of_all["mean"] = of_all["sum"] / of_all["count"]
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--models", required=True, nargs="+")
    parser.add_argument("--elements", type=int, default=20_000, help="whole blocks of 500")
    parser.add_argument("--folder", required=True, help="an existing folder for notes, output and summary")
    parser.add_argument("--max_total", type=int, default=8)
    parser.add_argument("--start", type=float, default=time.time(), help="timestamp of the first number")
    arguments, of_beam = parser.parse_known_args()
    folder = Path(arguments.folder)
    for name in ("notes", "output"):
        (folder / name).mkdir(exist_ok=True)
    options = PipelineOptions(of_beam)
    is_streaming = options.view_as(StandardOptions).streaming
    pipeline = beam.Pipeline(options=options)
    numbers = (
        periodic(pipeline, arguments.elements, arguments.start)
        if is_streaming
        else bounded(pipeline, arguments.elements)
    )
    for model in arguments.models:
        scoring = NotingDoFn(
            str(folder / "notes"),
            arguments.endpoint,
            model,
            max_concurrent_requests=arguments.max_total,
            pool={"max_total": arguments.max_total, "max_idle": arguments.max_total},
        )
        numbers = (
            numbers
            | f"Element of {model}" >> beam.Map(as_element)
            | f"Score on {model}" >> beam.ParDo(scoring)
            | f"Number of {model}" >> beam.Map(as_number)
        )
    output = folder / "output"
    if is_streaming:
        _ = numbers | beam.WithKeys(None) | beam.GroupByKey() | beam.ParDo(WriteWindow(str(output)))
    else:
        _ = numbers | beam.io.WriteToText(str(output / "numbers"), file_name_suffix=".txt")
    started = time.monotonic()
    result = pipeline.run()
    result.wait_until_finish()
    seconds = time.monotonic() - started
    (folder / "summary.json").write_text(json.dumps({"seconds": seconds, **summary(result)}))


if __name__ == "__main__":
    main()
