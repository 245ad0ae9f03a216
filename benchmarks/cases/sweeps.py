"""Sweeps: elements a second as one quantity grows, and whether the defaults are near the best setting.

In three of the sweeps the quantity is no setting, and at each of its values the defaults run beside other
settings. In the other two it is a setting, and the defaults are one point of each curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from beam_triton.options import DEFAULT_MAX_CONCURRENT_REQUESTS
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import ELEMENTS_PER_SECOND, Case, Scale, take_turns, throughput_row
from benchmarks.peers import BEAM_TRITON
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Curves, Figure, Point
from benchmarks.server import ECHO, ECHO_VARIABLE, REMOTE_LIKE, SLOW, target
from benchmarks.workload import Workload

DEFAULTS = "defaults"

_WITHIN_OF_BEST = 0.8
_MAX_ROUNDS = 3
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class _Run:
    """A point to measure: ``work`` gives the rate at ``x`` of a curve."""

    curve: str
    x: float
    work: Workload
    is_default: bool


def _in_flight(*numbers: int) -> dict[str, Mapping[str, Any]]:
    return {f"{number} in flight": {"max_concurrent_requests": number} for number in numbers}


def _beside_defaults(x: float, work: Workload, settings: Mapping[str, Mapping[str, Any]]) -> list[_Run]:
    return [
        _Run(DEFAULTS, x, work, True),
        *(_Run(name, x, replace(work, options=options), False) for name, options in settings.items()),
    ]


def _element_sizes(server: LocalTriton, scale: Scale) -> list[_Run]:
    settings = {
        **_in_flight(4, 64),
        "batches of 64": {"batching": {"max_batch_size": 64}},
        "batches of 1 MiB": {"batching": {"max_batch_bytes": _MIB}},
        "batches of 16 MiB": {"batching": {"max_batch_bytes": 16 * _MIB}},
    }
    runs = []
    for size in scale.points([64, _KIB, 16 * _KIB, 256 * _KIB, _MIB, 4 * _MIB, 16 * _MIB]):
        elements = scale.count(min(200_000, _GIB // size), least=min(1_000, max(2, 2 * _MIB // size)))
        work = Workload(target(server, ECHO_VARIABLE), elements, size // 4, batch_size=None, check_every=10)
        runs += _beside_defaults(size, work, settings)
    return runs


def _model_latencies(server: LocalTriton, scale: Scale) -> list[_Run]:
    runs = []
    for milliseconds in scale.points([0, 5, 20, 50, 100, 200]):
        # About three seconds of work for 16 instances with batches of 32.
        elements = min(150_000, 3 * 16 * 32 * 1000 // max(milliseconds, 10))
        work = Workload(
            target(server, SLOW),
            scale.count(elements, least=64),
            width=1,
            batch_size=None,
            constant=milliseconds / 1000,
        )
        runs += _beside_defaults(milliseconds, work, _in_flight(8, 16, 64))
    return runs


def _instances(server: LocalTriton, scale: Scale) -> list[_Run]:
    runs = []
    for workers in scale.points([1, 2, 4, 16, 64]):
        work = Workload(
            target(server, REMOTE_LIKE),
            scale.count(100_000, least=64 * workers),
            batch_size=None,
            workers=workers,
        )
        runs += _beside_defaults(workers, work, _in_flight(8, 16, 64))
    return runs


def _batch_sizes(server: LocalTriton, scale: Scale) -> list[_Run]:
    runs = []
    for model_name, limit, most in ((ECHO, 1024, 200_000), (REMOTE_LIKE, 64, 100_000)):
        for size in scale.points([size for size in (1024, 256, 64, 16, 4, 1) if size <= limit]):
            elements = scale.count(min(most, most // 16 * size), least=100)
            # The default is the model's own limit.
            batch_size = None if size == limit else size
            work = Workload(target(server, model_name), elements, batch_size=batch_size)
            runs.append(_Run(model_name, size, work, batch_size is None))
    return runs


def _requests_in_flight(server: LocalTriton, scale: Scale) -> list[_Run]:
    runs = []
    for model_name in (ECHO, REMOTE_LIKE):
        for number in scale.points([DEFAULT_MAX_CONCURRENT_REQUESTS, 1, 2, 4, 8, 16, 64]):
            is_default = number == DEFAULT_MAX_CONCURRENT_REQUESTS
            most = 200_000 if model_name == ECHO else min(200_000, 10_000 * number)
            work = Workload(
                target(server, model_name),
                scale.count(most, least=200),
                options={} if is_default else {"max_concurrent_requests": number},
            )
            runs.append(_Run(model_name, number, work, is_default))
    return runs


def _case(
    name: str,
    title: str,
    x_label: str,
    plan: Callable[[LocalTriton, Scale], list[_Run]],
    *,
    logarithmic_x: bool = True,
) -> Case:
    def measure(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
        rounds = min(rounds, _MAX_ROUNDS)
        runs = plan(server, scale)
        names = [f"{run.curve}, {x_label} {run.x:,.0f}" for run in runs]
        scores = [partial(run_in_fresh_process, BEAM_TRITON.score, run.work) for run in runs]
        taken = take_turns(rounds, dict(zip(names, scores, strict=True)))
        rows = [throughput_row(name, taken[name]) for name in names]
        points = [
            Point(run.x, run.curve, row.measured[ELEMENTS_PER_SECOND].median, run.is_default)
            for run, row in zip(runs, rows, strict=True)
        ]
        points.sort(key=lambda point: point.x)
        curves = Curves(name, title, x_label, ELEMENTS_PER_SECOND, points, logarithmic_x)
        figures = _figures(points, x_label)
        return CaseResult(name, title, rows, figures, curves=[curves], rounds=rounds)

    return Case(name, title, measure)


def _figures(points: Sequence[Point], x_label: str) -> list[Figure]:
    """The defaults' rate over the best: at each ``x``, or along the curve that they are a point of."""
    figures = []
    for default in points:
        if not default.is_default:
            continue
        if default.setting == DEFAULTS:
            where = f"{x_label} {default.x:,.0f}"
            rivals = [point.y for point in points if point.x == default.x]
        else:
            where = f"model {default.setting}"
            rivals = [point.y for point in points if point.setting == default.setting]
        text = f"the defaults' {ELEMENTS_PER_SECOND} relative to the best, {where}"
        figures.append(Figure(text, "at least", _WITHIN_OF_BEST, default.y / max(rivals)))
    return figures


CASES = (
    _case("element_size", "As elements grow", "bytes an element", _element_sizes),
    _case("batch_size", "As batches grow", "elements a batch", _batch_sizes),
    _case("in_flight", "As more requests are in flight", "requests in flight", _requests_in_flight),
    _case(
        "model_latency",
        "As the model takes longer",
        "milliseconds a request",
        _model_latencies,
        logarithmic_x=False,
    ),
    _case("instances", "As DoFn instances are added", "DoFn instances", _instances),
)
