"""What ``tune`` finds, and how long it takes, beside a sweep over every batch size and number in flight."""

from __future__ import annotations

import io
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

from beam_triton.cli.load import Load, Measurement
from beam_triton.cli.main import main
from beam_triton.cli.sample import Sample
from beam_triton.cli.search import Goal
from beam_triton.client import TritonClient
from beam_triton.options import InferenceOptions
from beam_triton.testing import LocalTriton
from beam_triton.transport.config import ConnectionPoolConfig
from benchmarks.cases.case import Case, Scale, take_turns
from benchmarks.process import MeasurementError
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO, REMOTE_LIKE
from tests.support.models import Model, sleeping, write_models

_MOST_IN_FLIGHT = 64
_LEAST_SHARE_OF_BEST, _MOST_SHARE_OF_TIME = 0.9, 0.1
_RECOMMENDED = re.compile(r'"max_batch_size": (\d+)\},\s+max_concurrent_requests=(\d+)')


class Subject(NamedTuple):
    """A model to tune, within a limit of the p99 or without."""

    name: str
    model_name: str
    largest_batch: int
    p99_milliseconds: int | None = None


SUBJECTS = (
    Subject("echo, 2 instances", ECHO, 1024),
    Subject("20 ms, 16 instances", REMOTE_LIKE, 64),
    Subject("20 ms, 16 instances, p99 below 50 ms", REMOTE_LIKE, 64, 50),
    Subject("20 ms, one instance", "one", 64),
    Subject("20 ms, dynamic batching", "dynamic", 64),
    Subject("2 ms + 1 ms an element, 4 instances", "by_element", 64),
    Subject("2 ms + 1 ms an element, p99 below 50 ms", "by_element", 64, 50),
)
_STAGED: Sequence[Model] = (
    sleeping("one", 0.02, max_batch_size=64),
    sleeping("dynamic", 0.02, max_batch_size=64, settings="dynamic_batching { }"),
    sleeping("by_element", 0.002, seconds_a_row=0.001, instances=4, max_batch_size=64),
)


def _tune(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    rows: list[Row] = []
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        repository = write_models(Path(folder), [ECHO, REMOTE_LIKE])
        for model in _STAGED:
            model.write(repository)
        with LocalTriton(repository) as server:
            sweeps: dict[str, tuple[Sequence[Measurement], float]] = {}
            for subject in scale.points(SUBJECTS):
                row, of_subject = compared(server, subject, rounds, scale, sweeps)
                rows.append(row)
                figures += of_subject
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


def compared(
    server: LocalTriton,
    subject: Subject,
    rounds: int,
    scale: Scale,
    sweeps: dict[str, tuple[Sequence[Measurement], float]],
) -> tuple[Row, list[Figure]]:
    """The sweep's best and what ``tune`` recommends, measured again in turns; a model is swept once."""
    options = InferenceOptions.from_options(
        {
            "endpoint": server.endpoint,
            "retry": {"max_retries": 0},
            "circuit_breaker": None,
            "pool": ConnectionPoolConfig.for_requests(_MOST_IN_FLIGHT, 30.0),
        }
    )
    with TritonClient.from_inference_options(options) as client:
        model = client.open_model(subject.model_name)
        try:
            load = Load(options, model, Sample({}), lambda: None)
            load.measure(subject.largest_batch, _MOST_IN_FLIGHT, scale.seconds(2.0))
            if subject.model_name not in sweeps:
                sweeps[subject.model_name] = _sweep(load, subject.largest_batch, scale)
            swept, sweep_seconds = sweeps[subject.model_name]
            limit_seconds = (subject.p99_milliseconds or float("inf")) / 1000
            best = max(swept, key=Goal(limit_seconds).value)
            size, in_flight, tune_seconds = _tuned(server, subject, scale)
            again = partial(load.measure, seconds=scale.seconds(1.5))
            taken = take_turns(
                rounds,
                {
                    "best": partial(again, best.batch_size, best.in_flight),
                    "tuned": partial(again, size, in_flight),
                },
            )
        finally:
            model.close()
    best_rates, tuned_rates = ([each.elements_per_second for each in taken[name]] for name in taken)
    row = Row.of(
        subject.name,
        {
            "sweep's best: batch": [best.batch_size],
            "in flight": [best.in_flight],
            "elements/s": best_rates,
            "sweep s": [sweep_seconds],
            "tune: batch": [size],
            "tune: in flight": [in_flight],
            "tune: elements/s": tuned_rates,
            "tune: p99 ms": [1000 * each.latency_seconds(0.99) for each in taken["tuned"]],
            "tune s": [tune_seconds],
        },
    )
    figures = [
        Figure.of_rounds(
            f"elements/s relative to the best of a sweep, {subject.name}",
            "at least",
            _LEAST_SHARE_OF_BEST,
            ratios(tuned_rates, best_rates),
        ),
        Figure(
            f"time relative to a sweep's, {subject.name}",
            "at most",
            _MOST_SHARE_OF_TIME,
            tune_seconds / sweep_seconds,
        ),
    ]
    return row, figures


def _sweep(load: Load, largest_batch: int, scale: Scale) -> tuple[Sequence[Measurement], float]:
    """Every power of two of both, a second each; and how long that took."""
    started = time.monotonic()
    sizes = [1 << power for power in range(largest_batch.bit_length())]
    counts = [1 << power for power in range(_MOST_IN_FLIGHT.bit_length())]
    swept = []
    for size in scale.points(sizes):
        print(f"  sweep: batches of {size}", file=sys.stderr, flush=True)
        swept += [load.measure(size, count, scale.seconds(1.0)) for count in scale.points(counts)]
    return swept, time.monotonic() - started


def _tuned(server: LocalTriton, subject: Subject, scale: Scale) -> tuple[int, int, float]:
    """What the command recommends, and how long it took, without the start of Python."""
    arguments = ["tune", server.endpoint, "--model", subject.model_name]
    arguments += ["--seconds", f"{scale.seconds(20.0, least=2.0):g}"]
    if subject.p99_milliseconds is not None:
        arguments += ["--p99", f"{subject.p99_milliseconds}ms"]
    printed = io.StringIO()
    started = time.monotonic()
    with redirect_stdout(printed):
        main(arguments)
    seconds = time.monotonic() - started
    found = _RECOMMENDED.search(printed.getvalue())
    if found is None:
        raise MeasurementError(f"tune recommended nothing: {printed.getvalue()}")
    return int(found[1]), int(found[2]), seconds


CASE = Case("tune", "What tune finds, beside a sweep", _tune)
