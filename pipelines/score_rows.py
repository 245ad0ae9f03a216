"""Rows in, rows out: digits from a CSV file to Parquet, with how many of each were read right.

    python -m pipelines.score_rows http://triton:8000 pipelines/data/digits.csv out/digits

What follows are options of Beam.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from beam_triton import TritonInference


class Digit(NamedTuple):
    """A row of the file; ``image`` is 8 x 8 pixels from 0 to 16."""

    id: str
    digit: int
    image: Sequence[float]


def read_digits(path: str) -> Iterator[Digit]:
    """The rows of a CSV file."""
    with FileSystems.open(path) as file:
        for row in csv.DictReader(line.decode() for line in file):
            yield Digit(row["id"], int(row["digit"]), json.loads(row["image"]))


def build(pipeline: beam.Pipeline, endpoint: str, path: str, output: str) -> None:
    """Score the digits of a file; rows, failures and a summary go to files that begin with ``output``."""
    digits = pipeline | beam.Create([path]) | beam.FlatMap(read_digits).with_output_types(Digit)
    scored, failed = digits | TritonInference(endpoint, "digits", output="row").with_exception_handling()

    # Columns: id, digit, probabilities and label. Their types come from Digit and from the model.
    _ = scored | beam.io.WriteToParquet(f"{output}-scored", file_name_suffix=".parquet")
    _ = failed | beam.io.WriteToJson(f"{output}-failed.jsonl")
    _ = (
        scored
        | beam.GroupBy("digit")
        .aggregate_field(lambda row: row.label == row.digit, sum, "right")
        .aggregate_field(lambda row: 1, sum, "all")
        | beam.MapTuple("{},{},{}".format)
        | beam.io.WriteToText(f"{output}-summary", file_name_suffix=".csv", header="digit,right,all")
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("endpoint", "path", "output"):
        parser.add_argument(name)
    known, options = parser.parse_known_args(arguments)
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        build(pipeline, known.endpoint, known.path, known.output)


if __name__ == "__main__":
    main()
