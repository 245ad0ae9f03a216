"""Interactive users of a model beside a job, which gives way to them or not."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale, take_turns
from benchmarks.results import CaseResult, Figure, Row, ratios
from tests.support.models import sleeping
from tests.support.shared_server import Shares, jobs, load

_MODEL_SECONDS = 0.02
_LOAD = 0.2
_PRIORITIES = "dynamic_batching { priority_levels: 2 default_priority_level: 1 }"
_SERVERS = {
    "16 instances": (16, ""),
    "16 instances, priorities": (16, _PRIORITIES),
    "4 instances, priorities": (4, _PRIORITIES),
}
# Where the figures asked for can be had; for fewer instances docs/tuning.md has the arithmetic.
_REQUIRED = ("16 instances", "16 instances, priorities")
_MOST_SLOWER, _LEAST_SHARE = 1.25, 0.7
_ALONE, _NORMAL, _BACKGROUND = "users alone", "beside a job", "beside a background job"
_P50, _P99 = "users' p50 ms", "users' p99 ms"
_SHARE = "job's share of the rest"


def _polite(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Users send at random times, 20 % of what the model can do; all measures take turns."""
    seconds = scale.seconds(8.0, least=1.0)
    rows: list[Row] = []
    figures: list[Figure] = []
    for name, (instances, settings) in _SERVERS.items() if scale.factor else list(_SERVERS.items())[-1:]:
        with tempfile.TemporaryDirectory() as folder:
            sleeping("shared", _MODEL_SECONDS, instances=instances, settings=settings).write(Path(folder))
            with LocalTriton(folder) as server:
                users = partial(load, server.endpoint, "shared", _LOAD * instances / _MODEL_SECONDS)
                users(min(seconds, 3.0))
                # Few instances have few users: more time for as many requests.
                users = partial(users, seconds * max(1.0, 8 / instances))
                settle = partial(time.sleep, scale.seconds(6.0, least=1.0))
                job = partial(jobs, server.endpoint, "shared")
                measures: dict[str, Callable[[], Shares]] = {
                    _ALONE: users,
                    _NORMAL: partial(_beside, job, settle, users),
                    _BACKGROUND: partial(_beside, partial(job, politeness="background"), settle, users),
                }
                taken = take_turns(rounds, measures)
                if not rows:
                    figures.append(_full_rate(job, settle, rounds, seconds))
        for kind, runs in taken.items():
            measured = {
                _P50: [1000 * run.percentile(50) for run in runs],
                _P99: [1000 * run.percentile(99) for run in runs],
            }
            if kind != _ALONE:
                measured[_SHARE] = [run.share_of_rest(instances) for run in runs]
            rows.append(Row.of(f"{name}: {kind}", measured))
        slower = ratios(*([run.percentile(99) for run in taken[kind]] for kind in (_BACKGROUND, _ALONE)))
        shares = [run.share_of_rest(instances) for run in taken[_BACKGROUND]]
        if name in _REQUIRED or not scale.factor:
            figures += [
                Figure.of_rounds(f"users' p99 relative to alone, {name}", "at most", _MOST_SLOWER, slower),
                Figure.of_rounds(f"job's share of the rest, {name}", "at least", _LEAST_SHARE, shares),
            ]
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


def _full_rate(job: Callable[..., Any], settle: Callable[[], None], rounds: int, seconds: float) -> Figure:
    """A background job has nobody to give way to."""

    def elements_a_second(politeness: str | None) -> float:
        with job(politeness=politeness) as (answered,):
            _begun(answered)
            settle()
            before, started = answered.value, time.perf_counter()
            time.sleep(seconds)
            return float(answered.value - before) / (time.perf_counter() - started)

    rates = take_turns(rounds, {str(each): partial(elements_a_second, each) for each in ("background", None)})
    relative = ratios(rates["background"], rates["None"])
    return Figure.of_rounds(
        "elements/s of a job alone, background relative to normal", "at least", 0.95, relative
    )


def _beside(job: Callable[[], Any], settle: Callable[[], None], users: Callable[[], Shares]) -> Shares:
    """What users see beside a job that has settled, with them."""
    with job() as (answered,):
        _begun(answered)
        settle()
        return users()


def _begun(answered: Any) -> None:
    give_up_at = time.monotonic() + 120
    while not answered.value:
        assert time.monotonic() < give_up_at, "the job has not begun"
        time.sleep(0.1)


CASE = Case("polite", "Interactive users beside a background job", _polite)
