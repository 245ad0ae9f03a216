"""Flink's own Triton function beside the library: whole pipelines, and the proposal's table of its pool.

Every peer scores on one server. The function sends the names of tensors in capitals, so it has the same
models with tensors ``X`` and ``Y``.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, CaseLeftOut, Scale, take_turns
from benchmarks.cases.engines import score_on
from benchmarks.delay_proxy import delayed
from benchmarks.peers import BEAM_TRITON, WRK
from benchmarks.peers.flink_function import FlinkFunction, OkHttp
from benchmarks.peers.peer import Peer, PeerMissing
from benchmarks.process import MeasurementError, run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO, REMOTE_LIKE
from benchmarks.workload import Target, Throughput, Workload
from engines import FlinkJobServer, install, tools
from engines.processes import EngineError
from tests.support.models import CATALOGUE, Tensor

_ROWS_PER_SECOND, _CPU = "rows/s", "client CPU s/1,000 rows"
_RELEASED, _UNLIMITED = "Flink's function", "Flink's function, OkHttp's limit lifted"
_ONE, _BATCHES = "beam_triton, one row a request", "beam_triton, batches of 64"
_BATCH_SIZE = 64
_CONNECTIONS = 32
_TITLES = {ECHO: "costs nothing", REMOTE_LIKE: "20 ms, 16 at a time"}

_HUNDRED = "hundred_milliseconds"
_WORKERS = 10
_ROUND_TRIP_SECONDS = 0.02


@dataclass(frozen=True)
class _Server:
    """A Triton with each model twice, by its name and as Flink's function can call it."""

    triton: LocalTriton

    def target(self, model_name: str, *, flink: bool = False) -> Target:
        name = _in_capitals(model_name) if flink else model_name
        return Target(self.triton.endpoint, self.triton.grpc_endpoint, name)


def _in_capitals(model_name: str) -> str:
    return f"{model_name}_in_capitals"


@contextmanager
def _server(model_names: Sequence[str]) -> Iterator[_Server]:
    hundred = replace(CATALOGUE[REMOTE_LIKE], name=_HUNDRED, parameters={"sleep_seconds": "0.1"})
    models = {**CATALOGUE, _HUNDRED: hundred}
    with tempfile.TemporaryDirectory(prefix="beam_triton_flink_function_") as folder:
        for name in model_names:
            models[name].write(Path(folder))
            replace(
                models[name],
                name=_in_capitals(name),
                inputs=(Tensor("X", "FP32", (128,)),),
                outputs=(Tensor("Y", "FP32", (128,)),),
            ).write(Path(folder))
        with LocalTriton(folder, grpc=True) as triton:
            server = _Server(triton)
            for name in model_names:
                for flink in (False, True):
                    # An instance's first request takes many times as long as its next.
                    _pace_of_clients(server.target(name, flink=flink), {}, 4 * _CONNECTIONS, _CONNECTIONS)
            yield server


def _flink_function(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The function as released and without OkHttp's limit; the library, here and on a Flink of Beam's."""
    _install_function()
    with _server([ECHO, REMOTE_LIKE]) as server:
        measured: dict[str, list[Throughput]] = {}
        notes = [
            "Flink's function: the last nine tenths of a job's rows, in a JVM that has scored others before",
            "client CPU: of the whole process, Flink or Beam included",
        ]
        for model_name in (REMOTE_LIKE, ECHO):
            measured |= _in_pipelines(server, model_name, rounds, scale, notes)
        measured |= _on_flink(server, rounds, scale, notes)
    rows = [_throughput_row(name, runs) for name, runs in measured.items()]
    return CaseResult(
        FLINK_FUNCTION.name, FLINK_FUNCTION.title, rows, _figures(measured), notes=notes, rounds=rounds
    )


def _in_pipelines(
    server: _Server, model_name: str, rounds: int, scale: Scale, notes: list[str]
) -> dict[str, list[Throughput]]:
    """Peers and load generator on one model, in turns."""
    slow = model_name == REMOTE_LIKE
    few = scale.count(1_000 if slow else 10_000, least=100)
    more = scale.count(4_000 if slow else 10_000, least=100)
    many = scale.count(200_000, least=2_000)
    target, of_flink = server.target(model_name), server.target(model_name, flink=True)
    # A slow model alone would leave the JVM cold for as long as a run takes.
    warm_up = (_in_capitals(ECHO), scale.count(20_000, least=100))
    load = Workload(target, 1, load_connections=_CONNECTIONS, load_seconds=scale.seconds(4))
    works: dict[str, tuple[Peer, Workload]] = {
        _RELEASED: (FlinkFunction("released", warm_up=warm_up), Workload(of_flink, few)),
        _UNLIMITED: (FlinkFunction("unlimited", warm_up=warm_up), Workload(of_flink, more)),
        _ONE: (BEAM_TRITON, Workload(target, more, batch_size=1)),
        _BATCHES: (BEAM_TRITON, Workload(target, many, batch_size=_BATCH_SIZE)),
        f"wrk -c{_CONNECTIONS}, one row a request": (WRK, replace(load, batch_size=1)),
        f"wrk -c{_CONNECTIONS}, batches of 64": (WRK, replace(load, batch_size=_BATCH_SIZE)),
    }
    measures: dict[str, Callable[[], Throughput]] = {}
    for name, (peer, work) in works.items():
        try:
            peer.check_installed()
        except PeerMissing as missing:
            notes.append(f"left out: {missing}")
            continue
        measures[_row_name(model_name, name)] = partial(run_in_fresh_process, peer.score, work)
    return take_turns(rounds, measures)


def _on_flink(server: _Server, rounds: int, scale: Scale, notes: list[str]) -> dict[str, list[Throughput]]:
    """The library on Beam's embedded Flink, where that is installed; its CPU time is not known."""
    try:
        install.require_all()
    except (tools.MissingToolsError, install.NotInstalledError) as missing:
        notes.append(f"left out: {missing}")
        return {}
    elements = {
        (REMOTE_LIKE, 1): scale.count(5_000, least=1_000),
        (REMOTE_LIKE, _BATCH_SIZE): scale.count(200_000, least=2_000),
        (ECHO, 1): scale.count(20_000, least=1_000),
        (ECHO, _BATCH_SIZE): scale.count(200_000, least=2_000),
    }

    def score(model_name: str, batch_size: int, count: int) -> Throughput:
        served = server.target(model_name)
        return score_on(engine, BEAM_TRITON, served, count, batch_size=batch_size).throughput

    with tempfile.TemporaryDirectory(prefix="beam_triton_engine_") as folder:
        try:
            with FlinkJobServer(Path(folder)) as engine:
                measures = {
                    _row_name(model_name, f"{_ONE if size == 1 else _BATCHES}, on Flink"): partial(
                        score, model_name, size, count
                    )
                    for (model_name, size), count in elements.items()
                }
                return take_turns(rounds, measures)
        except EngineError as error:
            raise MeasurementError(str(error)) from error


def _figures(measured: Mapping[str, Sequence[Throughput]]) -> list[Figure]:
    """One row a request beside the function without its limit, and batches beside the function as it is."""
    figures = []
    for model_name, least_batches in ((REMOTE_LIKE, 100.0), (ECHO, 10.0)):
        for ours, theirs, least in ((_ONE, _UNLIMITED, 0.95), (_BATCHES, _RELEASED, least_batches)):
            above, below = (
                [run.elements_per_second for run in measured[_row_name(model_name, name)]]
                for name in (ours, theirs)
            )
            text = f"rows/s of {ours}, relative to {theirs}: {_TITLES[model_name]}"
            figures.append(Figure.of_rounds(text, "at least", least, ratios(above, below)))
    return figures


def _row_name(model_name: str, name: str) -> str:
    return f"{_TITLES[model_name]}: {name}"


def _throughput_row(name: str, runs: Sequence[Throughput]) -> Row:
    measured = {_ROWS_PER_SECOND: [run.elements_per_second for run in runs]}
    # The process of wrk, and those of a Flink, are not measured.
    if "wrk" not in name and all(run.cpu_seconds for run in runs):
        measured[_CPU] = [1000 * run.cpu_seconds / run.elements for run in runs]
    return Row.of(name, measured)


@dataclass(frozen=True)
class _Pace:
    """Rows a second, and how long the requests took in ms: quantiles, where that is known."""

    rows_per_second: float
    p50_ms: float | None = None
    p99_ms: float | None = None


_NO_POOL, _DEFAULT, _TUNED = "no pool", "default pool", "tuned pool"
_CLAIMS = {_NO_POOL: (45.0, 350.0), _DEFAULT: (95.0, 180.0), _TUNED: (120.0, 150.0)}
"""Requests a second and p99 in ms, as the proposal has them."""
_POOLS: Mapping[str, tuple[OkHttp, Mapping[str, Any]]] = {
    _NO_POOL: ("not_reused", {"reuse_enabled": False}),
    _DEFAULT: ("pooled", {}),
    _TUNED: ("tuned", {"max_idle": 50, "max_total": 200, "keep_alive_seconds": 600}),
}


def _proposal(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Ten workers with a request each, 100 ms of model and 20 ms of network; then a pipeline by defaults."""
    _install_function()
    requests = scale.count(300, least=2 * _WORKERS)
    with _server([_HUNDRED]) as server, delayed(server.triton.endpoint, _ROUND_TRIP_SECONDS) as endpoint:
        far = replace(server.target(_HUNDRED), endpoint=endpoint)
        of_flink = replace(server.target(_HUNDRED, flink=True), endpoint=endpoint)
        measures = {"Flink's function, as released": partial(_pace_of_flink, "released", of_flink, requests)}
        for name, (client, pool) in _POOLS.items():
            measures[f"Flink's function, {name}"] = partial(_pace_of_flink, client, of_flink, requests)
            measures[f"beam_triton, {name}"] = partial(
                run_in_fresh_process, _pace_of_clients, far, {"pool": pool}, requests, _WORKERS
            )
        for name, size, elements in (
            ("one row a request", 1, 2 * requests),
            ("batches of 64", _BATCH_SIZE, _BATCH_SIZE * requests),
        ):
            work = Workload(far, elements, batch_size=size)
            measures[f"beam_triton, one pipeline, {name}"] = partial(
                run_in_fresh_process, _pace_of_pipeline, work
            )
        paces = take_turns(rounds, measures)
    rows = [_pace_row(name, runs) for name, runs in paces.items()]
    return CaseResult(PROPOSAL.name, PROPOSAL.title, rows, _pool_figures(paces), rounds=rounds)


def _pace_of_flink(client: OkHttp, target: Target, rows: int) -> _Pace:
    run = FlinkFunction(client, parallelism=_WORKERS, in_flight=1).run(target, rows)
    return _Pace(run.rows / run.seconds, 1000 * run.p50_seconds, 1000 * run.p99_seconds)


def _pace_of_clients(target: Target, options: Mapping[str, Any], requests: int, workers: int) -> _Pace:
    """Threads with one request at a time each, which share the connections of their process.

    The first tenth is left out, as it is of Flink's rows.
    """
    x = Workload(target, 1).pattern(1)
    each = requests // workers
    begun_at: list[float] = []
    times_ms: list[float] = []
    all_are_warm = threading.Barrier(workers, lambda: begun_at.append(time.perf_counter()), 60)

    def send_some() -> None:
        with TritonClient(target.endpoint, **options) as client:
            (name,) = (tensor.name for tensor in client.model_spec(target.model_name).inputs)

            def send() -> float:
                before = time.perf_counter()
                (answer,) = client.infer(target.model_name, {name: x}).outputs.values()
                if not np.array_equal(answer, x):
                    raise AssertionError("an answer differs from what the request sent")
                return 1000 * (time.perf_counter() - before)

            for _ in range(max(1, each // 10)):
                send()
            all_are_warm.wait()
            times_ms.extend([send() for _ in range(each - each // 10)])

    with ThreadPoolExecutor(workers) as threads:
        for done in [threads.submit(send_some) for _ in range(workers)]:
            done.result()
    seconds = time.perf_counter() - begun_at[0]
    hundredths = statistics.quantiles(times_ms, n=100, method="inclusive")
    return _Pace(len(times_ms) / seconds, hundredths[49], hundredths[98])


def _pace_of_pipeline(work: Workload) -> _Pace:
    return _Pace(BEAM_TRITON.score(work).elements_per_second)


def _pace_row(name: str, runs: Sequence[_Pace]) -> Row:
    measured = {_ROWS_PER_SECOND: [run.rows_per_second for run in runs]}
    for quantity, values in (
        ("p50 ms", [run.p50_ms for run in runs]),
        ("p99 ms", [run.p99_ms for run in runs]),
    ):
        known = [value for value in values if value is not None]
        measured |= {quantity: known} if known else {}
    for pool, (claimed_rate, claimed_ms) in _CLAIMS.items():
        if name.endswith(pool):
            measured |= {"claimed requests/s": [claimed_rate], "claimed p99 ms": [claimed_ms]}
    return Row.of(name, measured)


def _pool_figures(paces: Mapping[str, Sequence[_Pace]]) -> list[Figure]:
    def rates(name: str) -> list[float]:
        return [run.rows_per_second for run in paces[name]]

    return [
        Figure.of_rounds(
            f"rows/s of ten workers relative to Flink's function, {pool}",
            "at least",
            0.95,
            ratios(rates(f"beam_triton, {pool}"), rates(f"Flink's function, {pool}")),
        )
        for pool in _POOLS
    ]


def _install_function() -> None:
    try:
        install.install_flink_function()
    except tools.MissingToolsError as missing:
        raise CaseLeftOut(str(missing)) from None
    except install.InstallError as error:
        raise MeasurementError(str(error)) from error


FLINK_FUNCTION = Case(
    "flink_function", "Flink's own Triton function beside the library; rows of 128 FP32", _flink_function
)
PROPOSAL = Case(
    "proposal", "The proposal's table: ten workers, a model of 100 ms, 20 ms of network", _proposal
)
