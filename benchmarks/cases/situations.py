"""What situations of the field cost with default options: slow servers, silent networks, short memory."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.transforms.window import GlobalWindows

from beam_triton import TritonClient, TritonInference, TritonInferenceDoFn
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, CaseLeftOut, Scale, take_turns
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Relation, Row
from tests.support.certificates import Certificates
from tests.support.connection_proxy import ConnectionProxy
from tests.support.models import Model, sleeping, write_models
from tests.support.nginx import Nginx, nginx_binary
from tests.support.numbered_run import Run, kill_and_restart, repeat_during_run, run_numbered

_LOST, _WALL, _REQUESTS = "lost", "wall / work", "requests / needed"
_SHORT_OF_MEMORY = "short_of_memory"
"""Takes batches of 64 by its configuration, and raises above 32; 20 ms a request, one instance."""


_SLOW, _SLOWER = sleeping("slow", 0.3, max_batch_size=100), sleeping("slower", 2.0, max_batch_size=100)
_REMOTE = sleeping("remote", 0.02, instances=4)


@contextmanager
def _server() -> Iterator[LocalTriton]:
    """A Triton of its own, as one situation kills it."""
    with tempfile.TemporaryDirectory(prefix="beam_triton_situations_") as folder:
        repository = write_models(Path(folder), [_SHORT_OF_MEMORY, "echo_variable"])
        for model in (_SLOW, _SLOWER, _REMOTE):
            model.write(repository)
        with LocalTriton(repository) as server:
            with TritonClient(server.endpoint) as client:
                for name in (_SLOW.name, _SLOWER.name, _REMOTE.name, _SHORT_OF_MEMORY):
                    client.infer(name, {"x": np.zeros((1, 1), np.float32)})
            yield server


def _situations(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Each run compares every answer and counts every element; what it costs is set against the work alone.

    The work is the model's time for the batches needed; a run's time is taken without what a pipeline of one
    batch takes.
    """
    if nginx_binary() is None:
        raise CaseLeftOut("nginx is not installed (Debian: apt-get install nginx-light)")
    with _server() as server, tempfile.TemporaryDirectory() as folder:
        port = int(server.endpoint.rpartition(":")[2])
        start_seconds = run_numbered(TritonInference(server.endpoint, "echo_variable"), 500).seconds
        certificates = Certificates(Path(folder))

        def slow(model: Model, batches: int) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                transform = TritonInference(server.endpoint, model.name, timeout_seconds=3.0)
                run = run_numbered(transform, batches * model.max_batch_size)
                return _cost(run, start_seconds, model, batches)

            return measure

        def remote(
            disturb: Callable[[ConnectionProxy], None] | None = None, *, tls: bool = False
        ) -> Callable[[], dict[str, float]]:
            """20 ms a request; ``disturb`` happens twice."""
            batches = scale.count(2_000, least=100) // 25 * 25

            def measure() -> dict[str, float]:
                elements = batches * _REMOTE.max_batch_size
                options: dict[str, Any] = {"tls": {"ca_bundle": str(certificates.ca)}} if tls else {}
                with (
                    Nginx([port], certificate=certificates.good) as nginx,
                    ConnectionProxy(nginx.port if tls else port) as proxy,
                ):
                    transform = TritonInference(
                        f"http{'s' if tls else ''}://127.0.0.1:{proxy.port}", _REMOTE.name, **options
                    )
                    meanwhile = disturb and repeat_during_run(2, elements, partial(disturb, proxy))
                    run = run_numbered(transform, elements, meanwhile=meanwhile)
                return _cost(run, start_seconds, _REMOTE, batches)

            return measure

        def short_of_memory() -> dict[str, float]:
            """The work is a run with the batch size that fits."""
            elements = scale.count(12_800, least=1_000) // 500 * 500
            fits = TritonInference(server.endpoint, _SHORT_OF_MEMORY, batching={"max_batch_size": 32})
            fitting = run_numbered(fits, elements)
            run = run_numbered(TritonInference(server.endpoint, _SHORT_OF_MEMORY), elements)
            return {
                _LOST: float(run.counters.get("failures", 0)),
                _WALL: (run.seconds - start_seconds) / (fitting.seconds - start_seconds),
                _REQUESTS: run.counters["requests"] / fitting.counters["requests"],
            }

        taken = take_turns(
            rounds,
            {
                "nothing: 20 ms a batch, 4 instances": remote(),
                "all its connections go silent, twice": remote(ConnectionProxy.hole),
                "the same through nginx with TLS": remote(ConnectionProxy.hole, tls=True),
                "the server is killed and down for 0.5 s, twice": remote(
                    lambda _: kill_and_restart(server)()
                ),
                "0.3 s a batch, one instance, deadline 3 s": slow(_SLOW, scale.count(40, least=5)),
                "2 s a batch, one instance, deadline 3 s": slow(_SLOWER, scale.count(20, least=5)),
                "short of memory: fails above 32 of 64 rows": short_of_memory,
            },
        )
    rows = [
        Row.of(name, {quantity: [run[quantity] for run in runs] for quantity in (_LOST, _WALL, _REQUESTS)})
        for name, runs in taken.items()
    ]
    figures = []
    for name, runs in taken.items():
        if "one instance" in name:
            figures.append(Figure.of_rounds(f"{name}: {_WALL}", "at most", 1.15, [r[_WALL] for r in runs]))
            requests = [run[_REQUESTS] for run in runs]
            figures.append(Figure.of_rounds(f"{name}: {_REQUESTS}", "at most", 1.05, requests))
    return CaseResult(SITUATIONS_CASE.name, SITUATIONS_CASE.title, rows, figures, rounds=rounds)


def _cost(run: Run, start_seconds: float, model: Model, batches: int) -> dict[str, float]:
    work_seconds = batches * float(model.parameters["sleep_seconds"]) / model.instances
    return {
        _LOST: float(run.counters.get("failures", 0)),
        _WALL: (run.seconds - start_seconds) / work_seconds,
        _REQUESTS: run.counters["requests"] / batches,
    }


_PROCESSES = (1, 4, 16)
_INSTANCES = 16
_BUSY = sleeping("busy", 0.2, instances=_INSTANCES)
SENDER = "X-Sender"
"""The header by which nginx tells processes apart."""
_RATE, _P99, _LEAST, _MOST = "rate / best", "p99 / model's time", "least share", "most share"
_REQUIRED: tuple[tuple[str, Relation, float], ...] = (
    (_RATE, "at least", 0.95),
    (_P99, "at most", 3.0),
    (_LEAST, "at least", 0.8),
    (_MOST, "at most", 1.2),
)


def _processes(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Independent processes with default options at one server, started over ten seconds.

    An nginx between them writes down when it got each request, how long its answer took and who sent it.
    What counts is the last two thirds of the time in which all processes run.
    """
    if nginx_binary() is None:
        raise CaseLeftOut("nginx is not installed (Debian: apt-get install nginx-light)")
    seconds = scale.seconds(45, least=8.0)
    with tempfile.TemporaryDirectory(prefix="beam_triton_processes_") as folder:
        _BUSY.write(Path(folder))
        with LocalTriton(Path(folder)) as server:
            measures = {
                f"{count} at {_INSTANCES} instances": partial(_share, server, count, seconds)
                for count in scale.points(_PROCESSES)
            }
            taken = take_turns(rounds, measures)
    rows = [
        Row.of(name, {quantity: [run[quantity] for run in runs] for quantity in (_RATE, _P99, _LEAST, _MOST)})
        for name, runs in taken.items()
    ]
    figures = [
        Figure.of_rounds(f"{name}: {quantity}", relation, required, [run[quantity] for run in runs])
        for name, runs in taken.items()
        for quantity, relation, required in _REQUIRED
    ]
    return CaseResult(PROCESSES_CASE.name, PROCESSES_CASE.title, rows, figures, rounds=rounds)


def _share(server: LocalTriton, count: int, seconds: float) -> dict[str, float]:
    with Nginx([int(server.endpoint.rpartition(":")[2])], access_log=True) as nginx:
        apart_seconds = min(10.0, seconds / 4) / count
        with ThreadPoolExecutor(count) as threads:
            runs = []
            for number in range(count):
                end = time.time() + seconds
                busy = partial(keep_busy, nginx.endpoint, _BUSY.name, str(number), end)
                runs.append(threads.submit(run_in_fresh_process, busy))
                time.sleep(apart_seconds)
            for run in runs:
                run.result()
        answers = nginx.answers()
    first_end = min(max(answer.at for answer in answers if answer.sender == str(n)) for n in range(count))
    last_start = max(min(answer.at for answer in answers if answer.sender == str(n)) for n in range(count))
    begin = last_start + (first_end - last_start) / 3
    counted = [answer for answer in answers if begin <= answer.at <= first_end]
    shares = Counter(answer.sender for answer in counted)
    best = _INSTANCES / float(_BUSY.parameters["sleep_seconds"])
    fair = len(counted) / count
    return {
        _RATE: len(counted) / (first_end - begin) / best,
        _P99: float(np.quantile([answer.seconds for answer in counted], 0.99))
        / float(_BUSY.parameters["sleep_seconds"]),
        _LEAST: min(shares.values()) / fair,
        _MOST: max(shares.values()) / fair,
    }


def keep_busy(
    endpoint: str | Sequence[str], model_name: str, sender: str, end: float, **options: Any
) -> None:
    """Score one bundle until a time, in seconds since the epoch.

    Raises:
        AssertionError: an element gets no answer, or another's.
    """
    dofn = TritonInferenceDoFn(endpoint, model_name, headers={SENDER: sender}, **options)
    dofn.setup()
    try:
        dofn.start_bundle()
        outputs: list[Any] = []
        for number in itertools.count():
            element = np.array([number], np.float32)
            outputs += dofn.process(element, GlobalWindows.windowed_value(element)) or ()
            if time.time() > end:
                break
        outputs += dofn.finish_bundle()
    finally:
        dofn.teardown()
    assert len(outputs) == number + 1
    assert all(output.value.inference["y"] == output.value.example for output in outputs)


SITUATIONS_CASE = Case("situations", "What situations of the field cost, with default options", _situations)
PROCESSES_CASE = Case("processes", "Processes that share a server, with default options", _processes)
