"""Sequences of an unbounded source: numbers of many keys, mixed up, whose running sums a model keeps.

The numbers 1, 2, … of a key are a step of event time apart, the first one a step after the start of the epoch
or later. Each comes up to two steps before its time: those of a key come out of order, and none is late.

It runs as a script: Beam pickles what ``__main__`` defines by value, so it also runs on workers that have the
library but not the tests. Each window has one file a shard, which one written again replaces.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Tuple
from apache_beam.utils.timestamp import Duration, Timestamp

from beam_triton import TritonSequenceInference

CHUNK_SECONDS = 1.0
"""Of event time, which the source gives at a time. On Flink its bundles take a second each."""

PAUSE_SECONDS = 0.5

SHARDS = 4


def schedule(keys: int, length: int, seconds: float) -> list[list[tuple[int, int, float]]]:
    """Key, number and event time, in seconds, of what comes with each chunk."""
    randoms = random.Random(5)
    step = seconds / (length + 2)
    found: list[list[tuple[int, int, float]]] = [[] for _ in range(round(seconds / CHUNK_SECONDS))]
    for key in range(keys):
        phase = randoms.random()
        for number in range(1, length + 1):
            at = round((number + phase) * step, 3)
            comes = max(0.0, at - randoms.random() * 2 * step)
            found[int(comes / CHUNK_SECONDS)].append((key, number, at))
    for each in found:
        randoms.shuffle(each)
    return found


def timestamped(number: tuple[int, int, float]) -> Any:
    key, value, at = number
    return TimestampedValue((f"key-{key}", np.array([value], np.int32)), at)


def all_numbers(_: int, keys: int, length: int, seconds: float) -> Iterator[Any]:
    for chunk in schedule(keys, length, seconds):
        yield from map(timestamped, chunk)


class Chunks(RestrictionProvider):
    """The chunks that are still to come; the element says how many there are."""

    def initial_restriction(self, element: int) -> OffsetRange:
        return OffsetRange(0, element)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return OffsetRestrictionTracker(restriction)

    def restriction_size(self, element: int, restriction: OffsetRange) -> int:
        return int(restriction.size())


REST = beam.DoFn.RestrictionParam(Chunks())
WATERMARK = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider())


class Numbers(beam.DoFn):
    """Gives the numbers of a chunk, and goes on after a pause."""

    def __init__(self, keys: int, length: int, seconds: float) -> None:
        self._arguments = keys, length, seconds

    def setup(self) -> None:
        self._schedule = schedule(*self._arguments)

    @beam.DoFn.unbounded_per_element()  # type: ignore[untyped-decorator]
    def process(
        self,
        element: int,
        chunks: Any = REST,
        watermark: Any = WATERMARK,
    ) -> Iterator[Any]:
        chunk = chunks.current_restriction().start
        watermark.set_watermark(Timestamp(chunk * CHUNK_SECONDS))
        if chunks.try_claim(chunk):
            yield from map(timestamped, self._schedule[chunk])
            chunks.defer_remainder(Duration(PAUSE_SECONDS))


def scored(keyed: Any, timestamp: Any = beam.DoFn.TimestampParam) -> tuple[int, Any]:
    key, result = keyed
    shard = int(key.removeprefix("key-")) % SHARDS
    return shard, (key, timestamp.micros, int(result.example[0]), int(result.inference["y"][0]))


class WriteShard(beam.DoFn):
    """Writes a shard of a window into the file that belongs to it, at once."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def process(self, shard: tuple[int, Iterable[Any]], window: Any = beam.DoFn.WindowParam) -> None:
        name = f"{float(window.start):g}-{shard[0]}"
        unfinished = Path(self._folder) / f"{name}.{uuid.uuid4().hex}"
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in shard[1]))
        unfinished.rename(Path(self._folder) / f"{name}.jsonl")
        with (Path(self._folder) / "written.log").open("a") as file:
            file.write(f"{name} {os.getpid()}\n")


class WriteFailure(beam.DoFn):
    def __init__(self, folder: str) -> None:
        self._folder = folder

    def process(self, failure: Any) -> None:
        (Path(self._folder) / f"{uuid.uuid4().hex}.failed").write_text(repr(failure)[:2000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoints", required=True, nargs="+")
    parser.add_argument("--model", default="running_sum_oldest")
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="numbers of a key")
    parser.add_argument("--seconds", type=float, required=True, help="that the input lasts")
    parser.add_argument("--window_seconds", type=float, required=True)
    parser.add_argument("--bounded", action="store_true", help="give all at once instead, and end")
    parser.add_argument("--folder", required=True, help="an existing folder for output and summary")
    arguments, of_beam = parser.parse_known_args()
    folder = Path(arguments.folder)
    (folder / "output").mkdir(exist_ok=True)
    output = str(folder / "output")
    pipeline = beam.Pipeline(options=PipelineOptions(of_beam, streaming=not arguments.bounded))
    size = arguments.keys, arguments.length, arguments.seconds
    chunks = pipeline | beam.Create([round(arguments.seconds / CHUNK_SECONDS)], reshuffle=False)
    elements = (
        chunks
        | (
            beam.FlatMap(all_numbers, *size) if arguments.bounded else beam.ParDo(Numbers(*size))
        ).with_output_types(Tuple[str, AnyType])
        | beam.WindowInto(FixedWindows(arguments.window_seconds))
    )
    assert elements.is_bounded == arguments.bounded
    results, failures = (
        elements | TritonSequenceInference(arguments.endpoints, arguments.model).with_exception_handling()
    )
    _ = (
        results
        | beam.Map(scored).with_output_types(Tuple[int, AnyType])
        | beam.GroupByKey()
        | beam.ParDo(WriteShard(output))
    )
    _ = failures | beam.ParDo(WriteFailure(output))
    started = time.monotonic()
    result = pipeline.run()
    result.wait_until_finish()
    elapsed = time.monotonic() - started
    found = result.metrics().query(MetricsFilter().with_namespace("beam_triton"))
    counters: dict[str, int] = defaultdict(int)
    for counter in found["counters"]:
        counters[counter.key.metric.name] += counter.result
    (folder / "summary.json").write_text(json.dumps({"seconds": elapsed, **counters}))


if __name__ == "__main__":
    main()
