"""Bundles of one to four elements on sixteen threads of one process, as streaming runners hand them out."""

from __future__ import annotations

import pickle
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from apache_beam.transforms.window import GlobalWindows

from beam_triton import TritonInferenceDoFn
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import ELEMENTS_PER_SECOND, Case, Scale, take_turns
from benchmarks.peers import BEAM_TRITON, TRITONCLIENT_HTTP
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import execution_count
from benchmarks.workload import Target
from tests.support.models import sleeping

_MODEL_SECONDS = 0.02
_THREADS = 16
_LARGEST_BUNDLE = 4
_ELEMENTS_A_REQUEST, _P50, _P99 = "elements a request", "bundle p50 ms", "bundle p99 ms"

Score = Callable[[list[Any]], list[float]]
Prepare = Callable[[str, str], Callable[[], Score]]


class _Run(NamedTuple):
    elements_per_second: float
    elements_a_request: float
    bundle_seconds: list[float]


def _tiny_bundles(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The model is busy all the time: who sends a request for each bundle has no more than its rate."""
    seconds = scale.seconds(8.0, least=0.5)
    models = {f"sleeping_{count}": count for count in (1, 4)}
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, count in models.items():
            sleeping(name, _MODEL_SECONDS, instances=count, max_batch_size=64).write(Path(folder))
        with LocalTriton(Path(folder)) as server:
            for model, instances in models.items():
                measures = {
                    name: partial(run_in_fresh_process, _measure, prepare, server.endpoint, model, seconds)
                    for name, prepare in _PEERS.items()
                }
                runs = take_turns(rounds, measures)
                of = f", {instances} instance{'s' if instances > 1 else ''}"
                rows += [
                    Row.of(
                        name + of,
                        {
                            ELEMENTS_PER_SECOND: [run.elements_per_second for run in taken],
                            _ELEMENTS_A_REQUEST: [run.elements_a_request for run in taken],
                            _P50: [1000 * statistics.median(run.bundle_seconds) for run in taken],
                            _P99: [
                                1000 * statistics.quantiles(run.bundle_seconds, n=100)[98] for run in taken
                            ],
                        },
                    )
                    for name, taken in runs.items()
                ]
                ours, theirs = runs.values()
                for quantity, least, of_run in (
                    (ELEMENTS_PER_SECOND, 4, lambda run: run.elements_per_second),
                    (_ELEMENTS_A_REQUEST, 8, lambda run: run.elements_a_request),
                ):
                    reached = ratios(list(map(of_run, ours)), list(map(of_run, theirs)))
                    text = f"{quantity} relative to {TRITONCLIENT_HTTP.name_in_pipelines}{of}"
                    figures.append(Figure.of_rounds(text, "at least", least, reached))
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


def _measure(prepare: Prepare, endpoint: str, model: str, seconds: float) -> _Run:
    """Score bundles on every thread for so long.

    Raises:
        AssertionError: a result was lost, or is another element's.
    """
    new_score = prepare(endpoint, model)
    taken: list[tuple[int, float]] = []
    failed: list[BaseException] = []
    end_at = time.perf_counter() + seconds

    def work(seed: int) -> None:
        sizes, score, number = random.Random(seed), new_score(), 0
        try:
            while time.perf_counter() < end_at:
                size = sizes.randint(1, _LARGEST_BUNDLE)
                values = [float(seed + _THREADS * (number + each)) for each in range(size)]
                number += size
                started = time.perf_counter()
                assert score([np.array([value], np.float32) for value in values]) == values
                taken.append((size, time.perf_counter() - started))
        except BaseException as error:
            failed.append(error)

    before, started = execution_count(endpoint, model), time.perf_counter()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    elements = sum(size for size, _ in taken)
    return _Run(
        elements / (time.perf_counter() - started),
        elements / (execution_count(endpoint, model) - before),
        [each for _, each in taken],
    )


def _by_transform(endpoint: str, model: str) -> Callable[[], Score]:
    pickled = pickle.dumps(TritonInferenceDoFn(endpoint, model))

    def new_score() -> Score:
        dofn = pickle.loads(pickled)
        dofn.setup()

        def score(elements: list[Any]) -> list[float]:
            dofn.start_bundle()
            outputs: list[Any] = []
            for element in elements:
                outputs += dofn.process(element, GlobalWindows.windowed_value(element))
            outputs += dofn.finish_bundle()
            return [output.value.inference["y"].item() for output in outputs]

        return score

    return new_score


def _by_client(endpoint: str, model: str) -> Callable[[], Score]:
    """What ``RunInference`` sends at best: a bundle in one request; a client for each thread."""

    def new_score() -> Score:
        client = TRITONCLIENT_HTTP.open_client(Target(endpoint, "", model))
        return lambda elements: client.infer(np.stack(elements))[:, 0].tolist()

    return new_score


_PEERS = {BEAM_TRITON.name: _by_transform, TRITONCLIENT_HTTP.name_in_pipelines: _by_client}

CASE = Case(
    "tiny_bundles",
    f"Bundles of 1 to {_LARGEST_BUNDLE} elements on {_THREADS} threads, a model of 20 ms",
    _tiny_bundles,
)
