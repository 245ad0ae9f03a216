"""Name the types of files by their content, whatever their names say.

    python -m pipelines.file_types --files 'gs://bucket/uploads/**' --output types.jsonl \
        --endpoint http://triton:8000

The model is Magika's, in ``pipelines/model_repository_file_types``; without ``--endpoint`` it is served on
this machine. A line of the output is a file, its type and the model's score.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io import fileio
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.options.pipeline_options import PipelineOptions

from beam_triton import TritonInference
from beam_triton.testing import LocalTriton

MODEL_REPOSITORY = Path(__file__).resolve().parent / "model_repository_file_types"
PACKAGES = (MODEL_REPOSITORY / "magika" / "requirements.txt").read_text().split()

# The model looks at no more of a file.
BLOCK_BYTES = 4096


def path_and_ends(file: fileio.ReadableFile) -> tuple[str, bytes]:
    """A file's path, and all of it or its two ends."""
    with file.open() as opened:
        size = file.metadata.size_in_bytes
        if size <= 2 * BLOCK_BYTES:
            return file.metadata.path, opened.read()
        beginning = opened.read(BLOCK_BYTES)
        opened.seek(size - BLOCK_BYTES)
        return file.metadata.path, beginning + opened.read()


def to_line(keyed: tuple[str, PredictionResult]) -> str:
    """A result as a line of JSON."""
    path, result = keyed
    answer: Any = result.inference
    (kind,), (score,) = answer["type"], answer["score"]
    return json.dumps({"file": path, "type": kind.decode(), "score": round(float(score), 4)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; further arguments are Beam's. The exit code."""
    parser = argparse.ArgumentParser(prog="file_types", description=__doc__.partition("\n")[0])
    parser.add_argument("--files", required=True, help="pattern of the files")
    parser.add_argument("--output", required=True, help="JSON Lines to write")
    parser.add_argument(
        "--endpoint", help="URL of a Triton that has the model; without it one is started here"
    )
    given, beam_arguments = parser.parse_known_args(arguments)
    with ExitStack() as stack:
        endpoint = given.endpoint
        if endpoint is None:
            endpoint = stack.enter_context(LocalTriton(MODEL_REPOSITORY, packages=PACKAGES)).endpoint
        with beam.Pipeline(options=PipelineOptions(beam_arguments)) as p:
            _ = (
                p
                | fileio.MatchFiles(given.files)
                | fileio.ReadMatches(compression="uncompressed")
                | beam.Map(path_and_ends)
                | TritonInference(endpoint, "magika")
                | beam.Map(to_line)
                | beam.io.WriteToText(given.output, shard_name_template="")
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
