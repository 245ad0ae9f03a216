"""Messages in, a file per window out: digits of an unbounded source, scored as they come.

    python -m pipelines.score_stream --endpoint http://triton:8000 --output out/stream

A message is JSON: ``{"id": "a", "image": [0, 5, ...], "time": 1764278640.5}``. ``time`` is in seconds since
1970; without it, a message has the time of its source. Where no option names a source, the shipped digits
come over and over, for half a minute. Options that are not listed here are Beam's.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.io import fileio
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms import trigger, window
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Timestamp

from beam_triton import TritonInference


class Digit(NamedTuple):
    """What is scored; ``image`` is 8 x 8 pixels from 0 to 16."""

    id: str
    image: Sequence[float]


# Without it the class would be pickled by its name, which workers do not have.
beam.coders.registry.register_coder(Digit, beam.coders.RowCoder)


def periodic(pipeline: beam.Pipeline, every_seconds: float, start: float, stop: float | Timestamp) -> Any:
    """A message every so often: the shipped digits over and over, each with an id of its own."""
    with (Path(__file__).resolve().parent / "data" / "digits.csv").open() as file:
        images = [json.loads(row["image"]) for row in csv.DictReader(file)][:100]

    def message(at: float) -> bytes:
        number = round((float(at) - start) / every_seconds)
        return json.dumps({"id": f"{number:08}", "image": images[number % len(images)]}).encode()

    impulses = pipeline | PeriodicImpulse(start, stop, every_seconds)
    # The source is one element that cannot be split: without Reshuffle one worker would do everything.
    return impulses | beam.Map(message) | beam.Reshuffle()


def files(pipeline: beam.Pipeline, pattern: str, every_seconds: float, stop: float | Timestamp) -> Any:
    """The lines of files that appear, complete, under a pattern; their time is the file's."""

    def lines(file: fileio.ReadableFile) -> Iterator[Any]:
        # The time of the poll would be another one when a runner repeats it, and so would be the window.
        at = file.metadata.last_updated_in_seconds
        with file.open() as opened:
            for line in opened:
                yield window.TimestampedValue(line, at)

    return (
        pipeline
        | fileio.MatchContinuously(pattern, every_seconds, stop_timestamp=stop)
        | beam.Reshuffle()
        | fileio.ReadMatches()
        | beam.FlatMap(lines)
    )


def pubsub(pipeline: beam.Pipeline, subscription: str) -> Any:
    """The messages of a Pub/Sub subscription, ``projects/PROJECT/subscriptions/NAME``."""
    return pipeline | beam.io.ReadFromPubSub(subscription=subscription)


def kafka(pipeline: beam.Pipeline, topic: str, servers: str) -> Any:
    """The values of a Kafka topic. Beam reads it in Java, which the pipeline's construction needs."""
    from apache_beam.io.kafka import ReadFromKafka

    # By default a record has the time when it is read, which is another one when it is read again.
    policy = ReadFromKafka.create_time_policy
    records = pipeline | ReadFromKafka({"bootstrap.servers": servers}, [topic], timestamp_policy=policy)
    return records | beam.Values()


def messages(pipeline: beam.Pipeline, options: argparse.Namespace) -> Any:
    """The messages of the source that the options name, as bytes."""
    start = time.time()
    # Beam's own runner writes nothing before a stream ends.
    run_seconds = options.run_seconds if options.run_seconds is not None or options.files else 30
    stop = start + run_seconds if run_seconds else MAX_TIMESTAMP
    if options.files:
        return files(pipeline, options.files, options.poll_seconds, stop)
    if options.subscription:
        return pubsub(pipeline, options.subscription)
    if options.kafka_topic:
        return kafka(pipeline, options.kafka_topic, options.kafka_servers)
    return periodic(pipeline, options.every_seconds, start, stop)


def parse(message: bytes) -> Any:
    """The digit of a message, at the message's time if it names one."""
    fields = json.loads(message)
    digit = Digit(str(fields["id"]), [float(pixel) for pixel in fields["image"]])
    if "time" not in fields:
        return digit
    at = Timestamp.of(float(fields["time"]))
    # Fails here, for this message alone, where it is no date, as with milliseconds; not when its window ends.
    at.to_utc_datetime()
    return window.TimestampedValue(digit, at)


def unreadable(failure: Any) -> tuple[str, dict[str, Any]]:
    """A message that could not be read, as a dead letter."""
    message, (kind, error, _) = failure
    text = message.decode(errors="replace")
    return text, {"message": text, "error_type": kind.__name__, "error_message": error}


class WriteWindows(beam.PTransform[Any, Any]):
    """Write named rows, ``(str, dict)``, as lines of JSON into a file per window and shard.

    A pane holds all that has come for its window, and its file replaces that of the pane before it: what a
    runner repeats after a failure writes the same file once more. For that the shard depends on the name
    alone: the last digits of a score may be others the second time.
    """

    def __init__(self, prefix: str, shards: int) -> None:
        super().__init__()
        self._prefix = prefix
        self._shards = shards

    def expand(self, rows: Any) -> Any:
        """Give back the names of the files."""
        prefix, shards = self._prefix, self._shards

        def write(group: tuple[int, Iterable[str]], window: Any = beam.DoFn.WindowParam) -> Iterator[str]:
            shard, lines = group[0], list(group[1])
            start, end = (f"{at.to_utc_datetime():%Y%m%dT%H%M%S}" for at in (window.start, window.end))
            name = f"{prefix}-{start}-{end}-{shard:03}-of-{shards:03}.jsonl"
            # Flink adds an empty pane where the watermark passes a window and its lateness at once.
            if lines:
                unfinished = f"{name}.{uuid.uuid4().hex}.unfinished"
                with FileSystems.create(unfinished) as file:
                    file.writelines(f"{line}\n".encode() for line in lines)
                FileSystems.rename([unfinished], [name])
                yield name

        return (
            rows
            | "Shard"
            >> beam.MapTuple(lambda name, row: (zlib.crc32(name.encode()) % shards, json.dumps(row)))
            | beam.GroupByKey()
            | "Write" >> beam.FlatMap(write)
        )


def build(messages: Any, options: argparse.Namespace) -> Any:
    """Score messages. Gives the names of the files of results and of dead letters."""
    size, period = options.window_seconds, options.slide_seconds
    into_windows = beam.WindowInto(
        window.SlidingWindows(size, period) if period else window.FixedWindows(size),
        trigger=trigger.AfterWatermark(
            early=trigger.AfterProcessingTime(options.early_seconds) if options.early_seconds else None,
            late=trigger.AfterProcessingTime(options.late_seconds),
        ),
        allowed_lateness=options.allowed_lateness_seconds,
        accumulation_mode=trigger.AccumulationMode.ACCUMULATING,
    )
    digits, no_digits = messages | beam.Map(parse).with_output_types(Digit).with_exception_handling()
    scored, failed = (
        digits
        | "Windows" >> into_windows
        | TritonInference(options.endpoint, "digits", output="row").with_exception_handling()
    )
    results = scored | "Result" >> beam.Map(lambda row: (row.id, row._asdict()))
    dead_letters = (
        failed | "Failure" >> beam.Map(lambda row: (row.id, row._asdict())),
        no_digits | "Unreadable" >> beam.Map(unreadable) | "Windows of unreadable" >> into_windows,
    ) | "Dead letters" >> beam.Flatten()
    return (
        results | "Write results" >> WriteWindows(f"{options.output}-scored", options.shards),
        dead_letters | "Write dead letters" >> WriteWindows(f"{options.output}-failed", options.shards),
    ) | "Files" >> beam.Flatten()


def parser() -> argparse.ArgumentParser:
    """The options beside Beam's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--endpoint", default="http://localhost:8000", help="(%(default)s)")
    parser.add_argument(
        "--output", default="out/stream", help="the beginning of all file names (%(default)s)"
    )
    parser.add_argument(
        "--run_seconds", type=float, help="end digits (30) or files (0) after this long; 0: never"
    )
    sources = parser.add_argument_group("source")
    source = sources.add_mutually_exclusive_group()
    source.add_argument("--files", metavar="PATTERN", help="files of messages, one a line, as they appear")
    source.add_argument("--subscription", metavar="projects/...", help="a subscription of Pub/Sub")
    source.add_argument("--kafka_topic", metavar="TOPIC")
    sources.add_argument(
        "--kafka_servers", metavar="HOST:PORT", default="localhost:9092", help="(%(default)s)"
    )
    sources.add_argument("--every_seconds", type=float, default=0.1, help="between two digits (%(default)s)")
    sources.add_argument(
        "--poll_seconds", type=float, default=10, help="between looks for files (%(default)s)"
    )
    windows = parser.add_argument_group("windows")
    windows.add_argument("--window_seconds", type=int, default=10, help="how long each is (%(default)s)")
    windows.add_argument("--slide_seconds", type=int, help="one begins this often (when the last one ends)")
    windows.add_argument("--allowed_lateness_seconds", type=int, default=60, help="(%(default)s)")
    windows.add_argument("--early_seconds", type=int, help="write unfinished windows this often (never)")
    windows.add_argument("--late_seconds", type=int, default=5, help="late rows wait for more (%(default)s)")
    windows.add_argument("--shards", type=int, default=1, help="files of a window (%(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options, of_beam = parser().parse_known_args(arguments)
    with beam.Pipeline(options=PipelineOptions(of_beam, streaming=True)) as pipeline:
        build(messages(pipeline, options), options)


if __name__ == "__main__":
    main()
