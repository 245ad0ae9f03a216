"""Scores the digits with one peer on any engine: the script that the case ``engines`` runs.

Workers have Beam and what ``--setup_file`` stages, but not the benchmarks, which are pickled by value like
the functions of a script. The summary's seconds run from the first element made to the last bundle of
results, on any worker. They leave out the start of workers, the installation of the package and ``setup``.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.internal.cloudpickle import cloudpickle
from apache_beam.metrics import Metrics
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions

import benchmarks
from benchmarks.peers import BEAM_TRITON, TRITONCLIENT_HTTP
from benchmarks.peers.peer import Client
from benchmarks.peers.tritonclient_peers import run_inference
from benchmarks.workload import Array, Check, Target, Workload, counted, expected_count
from pipelines.train_digits import DATA, read_digits

_CLOCK = "clock_milliseconds"
_NAMESPACE = "engines"
_SITE_PACKAGES = sysconfig.get_paths()["purelib"]


class GenerateDigits(beam.DoFn):
    """Turns the first number of a block into its digits: FP32 pixels, padded with zeros for the model."""

    def __init__(self, images: npt.NDArray[np.uint8], width: int, elements: int, block_elements: int) -> None:
        self._images = images
        self._width = width
        self._elements = elements
        self._block_elements = block_elements

    def setup(self) -> None:
        rows, pixels = self._images.shape
        self._rows = np.zeros((rows, self._width), np.float32)
        self._rows[:, :pixels] = self._images

    def process(self, first: int) -> Iterator[Array]:
        record_time()
        for number in range(first, min(first + self._block_elements, self._elements)):
            yield self._rows[number % len(self._rows)]


class TimedCheck(Check):
    """Counts and compares results, and records when a bundle of them ends."""

    def finish_bundle(self) -> None:
        super().finish_bundle()
        record_time()


class ClientOfEachThread:
    """One tritonclient per thread: it is not thread-safe, and worker threads share RunInference's model."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._own = threading.local()

    def infer(self, batch: Array) -> Array:
        if not hasattr(self._own, "client"):
            self._own.client = TRITONCLIENT_HTTP.open_client(self._target)
        client: Client = self._own.client
        return client.infer(batch)

    def close(self) -> None:
        """Nothing to do: the threads that own the clients end with the process."""


def open_tritonclient(target: Target) -> ClientOfEachThread:
    """The client, imported from the environment that submits where the worker has none."""
    if _SITE_PACKAGES not in sys.path:
        sys.path.append(_SITE_PACKAGES)
    return ClientOfEachThread(target)


def record_time() -> None:
    Metrics.distribution(_NAMESPACE, _CLOCK).update(round(time.time() * 1000))


def transform(peer: str, work: Workload) -> beam.PTransform[Any, Any]:
    """The peer of this name."""
    if peer == BEAM_TRITON.name:
        return BEAM_TRITON.transform(work)
    return run_inference(open_tritonclient, work)


def seconds_between(outcome: Any) -> float:
    """The time from the first recorded time to the last."""
    noted = outcome.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))["distributions"]
    first = min(each.result.min for each in noted)
    last = max(each.result.max for each in noted)
    return float(last - first) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    peers = (BEAM_TRITON.name, TRITONCLIENT_HTTP.name)
    parser.add_argument("--peer", choices=peers, required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--elements", type=int, required=True)
    parser.add_argument(
        "--block_elements",
        type=int,
        default=100,
        help="elements made from one element of the source: few spread evenly but cost the runner more",
    )
    parser.add_argument("--summary", type=Path, required=True, help="the JSON file to write")
    given, of_beam = parser.parse_known_args()
    cloudpickle.register_pickle_by_value(benchmarks)
    # Digits hold no row numbers, so their sum cannot be checked.
    work = Workload(
        Target(given.endpoint, "", given.model), given.elements, batch_size=given.batch_size, check_every=10
    )
    images = np.concatenate([read_digits(DATA, split).images for split in ("train", "test")])
    pipeline = beam.Pipeline(options=PipelineOptions(of_beam))
    _ = (
        pipeline
        | beam.Create(range(0, work.elements, given.block_elements), reshuffle=True)
        | beam.ParDo(GenerateDigits(images, work.width, work.elements, given.block_elements))
        | transform(given.peer, work)
        | beam.ParDo(TimedCheck(work))
    )
    outcome = pipeline.run()
    outcome.wait_until_finish()
    found, expected = counted(outcome), expected_count(work, sums_numbers=False)
    if found != expected:
        sys.exit(f"the results are {found} instead of {expected}")
    given.summary.write_text(json.dumps({"seconds": seconds_between(outcome)}))


if __name__ == "__main__":
    main()
