"""The digits through one peer, on whatever engine: the script that the case ``engines`` runs.

Workers hold Beam and what ``--setup_file`` stages, and none of the benchmarks: these travel by value, as a
script's own functions do. The summary's seconds are those between the first element made and the last bundle
of results, on any worker; starting workers, installing the package and ``setup`` are not in them.
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
    """First numbers of blocks to digits, as FP32 as the model takes them: the pixels, then zeros."""

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
        note_time()
        for number in range(first, min(first + self._block_elements, self._elements)):
            yield self._rows[number % len(self._rows)]


class TimedCheck(Check):
    """Counts and compares results, and notes when a bundle of them has ended."""

    def finish_bundle(self) -> None:
        super().finish_bundle()
        note_time()


class ClientOfEachThread:
    """A tritonclient is for one thread; worker threads of one process share RunInference's model."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._own = threading.local()

    def infer(self, batch: Array) -> Array:
        if not hasattr(self._own, "client"):
            self._own.client = TRITONCLIENT_HTTP.open_client(self._target)
        client: Client = self._own.client
        return client.infer(batch)

    def close(self) -> None:
        """The threads, which own the clients, end with the process."""


def open_tritonclient(target: Target) -> ClientOfEachThread:
    """The client, also where a worker's environment does not hold it: out of the one that submits."""
    if _SITE_PACKAGES not in sys.path:
        sys.path.append(_SITE_PACKAGES)
    return ClientOfEachThread(target)


def note_time() -> None:
    Metrics.distribution(_NAMESPACE, _CLOCK).update(round(time.time() * 1000))


def transform(peer: str, work: Workload) -> beam.PTransform[Any, Any]:
    """The peer of this name."""
    if peer == BEAM_TRITON.name:
        return BEAM_TRITON.transform(work)
    return run_inference(open_tritonclient, work)


def seconds_between(outcome: Any) -> float:
    """From the first time noted to the last."""
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
        help="elements made out of one that the runner deals out: few spread evenly, and leave it more to do",
    )
    parser.add_argument("--summary", type=Path, required=True, help="the file to write it to, as JSON")
    given, of_beam = parser.parse_known_args()
    cloudpickle.register_pickle_by_value(benchmarks)
    # Digits, not numbered rows: what there is to add up is not in them.
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
        sys.exit(f"what came out is {found} instead of {expected}")
    given.summary.write_text(json.dumps({"seconds": seconds_between(outcome)}))


if __name__ == "__main__":
    main()
