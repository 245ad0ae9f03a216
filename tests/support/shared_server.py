"""An interactive client and jobs that share a model, each in a process of its own."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import queue
import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from apache_beam.transforms.window import GlobalWindows

from beam_triton import TritonInferenceDoFn

_THREADS = 32
_SPAWN = multiprocessing.get_context("forkserver")


class Shares(NamedTuple):
    """What an interactive client saw in ``seconds``, and what all clients together made the server do."""

    latencies: list[float]
    busy_seconds: float
    requests: int
    seconds: float

    def percentile(self, percent: int) -> float:
        """The latency that so many percent of the requests do not exceed."""
        return sorted(self.latencies)[min(len(self.latencies) - 1, len(self.latencies) * percent // 100)]

    def share_of_rest(self, instances: int) -> float:
        """What the jobs kept busy, of the instances' time that the interactive requests left."""
        interactive_seconds = len(self.latencies) * self.busy_seconds / self.requests
        return (self.busy_seconds - interactive_seconds) / (instances * self.seconds - interactive_seconds)


def load(
    endpoint: str,
    model: str,
    requests_per_second: float,
    seconds: float,
    *,
    seed: int = 1,
    parameters: dict[str, Any] | None = None,
) -> Shares:
    """Requests of one element at random times, whether earlier ones are answered or not (a Poisson process).

    Runs in a process of its own.
    """
    with _SPAWN.Pool(1) as pool:
        return pool.apply(_load, (endpoint, model, requests_per_second, seconds, seed, parameters or {}))


@contextmanager
def jobs(endpoint: str, model: str, count: int = 1, **options: Any) -> Iterator[list[Any]]:
    """Jobs with work without end, each in a process of its own; gives counters of answered elements."""
    with ExitStack() as stack:
        counters = []
        for _ in range(count):
            counter, over = _SPAWN.Value("q", 0), _SPAWN.Event()
            process = _SPAWN.Process(
                target=_score, args=(endpoint, model, options, counter, over), daemon=True
            )
            process.start()
            stack.callback(_end, process, over)
            counters.append(counter)
        yield counters


def _end(process: Any, over: Any) -> None:
    over.set()
    process.join(30)
    if process.is_alive():
        process.kill()
        process.join()


def _score(endpoint: str, model: str, options: dict[str, Any], counter: Any, over: Any) -> None:
    dofn = TritonInferenceDoFn(endpoint, model, **options)
    dofn.setup()
    try:
        element = np.ones(1, np.float32)
        windowed_value = GlobalWindows.windowed_value(element)
        dofn.start_bundle()
        while not over.is_set():
            for _ in range(16):
                counter.value += len(list(dofn.process(element, windowed_value)))
        list(dofn.finish_bundle())
    finally:
        dofn.teardown()


def counted(endpoint: str, model: str) -> tuple[int, int]:
    """The requests that the model has executed, and the nanoseconds of its instances."""
    with urllib.request.urlopen(f"{endpoint}/v2/models/{model}/stats") as answer:
        statistics = json.load(answer)["model_stats"][0]
    return (
        statistics["inference_stats"]["success"]["count"],
        sum(
            each[f"compute_{step}"]["ns"]
            for each in statistics["batch_stats"]
            for step in ("input", "infer", "output")
        ),
    )


def _load(
    endpoint: str, model: str, rate: float, seconds: float, seed: int, parameters: dict[str, Any]
) -> Shares:
    body = json.dumps(
        {
            "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}],
            "parameters": parameters,
        }
    ).encode()
    arrivals: queue.SimpleQueue[float | None] = queue.SimpleQueue()
    latencies: list[float] = []
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
            while (arrived_at := arrivals.get()) is not None:
                connection.request("POST", f"/v2/models/{model}/infer", body)
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
                answer.read()
                latencies.append(time.perf_counter() - arrived_at)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    generator = random.Random(seed)
    requests, busy_ns = counted(endpoint, model)
    next_at = started = time.perf_counter()
    while (next_at := next_at + generator.expovariate(rate)) < started + seconds:
        time.sleep(max(0.0, next_at - time.perf_counter()))
        arrivals.put(time.perf_counter())
    took = time.perf_counter() - started
    requests_after, busy_ns_after = counted(endpoint, model)
    for _ in threads:
        arrivals.put(None)
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return Shares(latencies, (busy_ns_after - busy_ns) / 1e9, requests_after - requests, took)
