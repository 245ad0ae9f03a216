"""Digits scored by a Triton that each worker machine runs for itself: no server to keep, or to switch off.

    python -m pipelines.worker_triton --output out/digits

The models may be at any URL that Beam reads: ``--model_repository gs://bucket/models``. Options that are not
listed here are Beam's. On Dataflow, ``pipelines/dataflow/worker-triton.Dockerfile`` is the workers' image.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_triton import TritonInference, WorkerTriton

HERE = Path(__file__).resolve().parent


def digits() -> Iterator[tuple[str, list[float]]]:
    """The shipped digits: an id, and 8 x 8 pixels from 0 to 16."""
    with (HERE / "data" / "digits.csv").open() as file:
        for row in csv.DictReader(file):
            yield row["id"], json.loads(row["image"])


def as_line(scored: tuple[str, Any]) -> str:
    name, result = scored
    return f"{name},{int(result.inference['label'][0])}"


def run(arguments: Sequence[str] | None = None) -> None:
    """Score the digits, and wait until the job is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="the beginning of the names of the files to write")
    parser.add_argument(
        "--model_repository", default=str(HERE / "model_repository"), help="a folder of the workers, or a URL"
    )
    parser.add_argument("--binary", help="the program tritonserver of the workers, where they do not find it")
    given, of_beam = parser.parse_known_args(arguments)
    server = WorkerTriton(given.model_repository, binary=given.binary)
    with beam.Pipeline(options=PipelineOptions(of_beam)) as pipeline:
        _ = (
            pipeline
            | beam.Create(digits())
            | TritonInference(server, "digits", outputs=["label"])
            | beam.Map(as_line)
            | beam.io.WriteToText(given.output, file_name_suffix=".csv")
        )


if __name__ == "__main__":
    run()
