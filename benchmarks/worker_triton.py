"""A Triton on the worker beside the same server elsewhere: ``python -m benchmarks.worker_triton``.

One machine, one server, an echo model. The way elsewhere is a proxy that hands bytes on after 5 ms each way,
and has all the bandwidth of this machine: what is left out makes the way elsewhere look better than it is.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from beam_triton import TritonClient, TritonInference, WorkerTriton
from tests.support.models import write_models

_ONE_WAY_SECONDS = 0.005
_ROUNDS = 5
_MODEL = "echo_variable"
_LENGTHS = {128: 40_000, 3072: 10_000}
_BLOCK = 500


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while data := await reader.read(1 << 20):
        loop.call_later(_ONE_WAY_SECONDS, writer.write, data)
    loop.call_later(_ONE_WAY_SECONDS, writer.close)


async def _proxy(path: str, told: Connection) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(_hand_on(reader, there_writer), _hand_on(there_reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    told.send(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()


def _run_proxy(path: str, told: Connection) -> None:
    asyncio.run(_proxy(path, told))


@contextmanager
def _elsewhere(config: WorkerTriton) -> Iterator[str]:
    """The endpoint of the same server, 10 ms away."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_run_proxy, args=(str(config.place), theirs), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}"
    finally:
        process.kill()
        process.join()


def _elements(block: int, length: int) -> Iterator[Any]:
    return iter(np.full((_BLOCK, length), block, np.float32))


def _rate(endpoint: str | WorkerTriton, length: int) -> float:
    """Elements a second through a pipeline in this process."""
    count = _LENGTHS[length]
    started = time.monotonic()
    with beam.Pipeline("FnApiRunner") as pipeline:
        _ = (
            pipeline
            | beam.Create(range(count // _BLOCK))
            | beam.FlatMap(_elements, length)
            | TritonInference(endpoint, _MODEL)
            | beam.combiners.Count.Globally()
        )
    return count / (time.monotonic() - started)


def _latency(endpoint: str | WorkerTriton, length: int) -> float:
    """Seconds of a request of 64 elements, one at a time; the median."""
    batch = {"x": np.ones((64, length), np.float32)}
    seconds = []
    with TritonClient(endpoint) as client:
        for _ in range(100):
            started = time.monotonic()
            client.infer(_MODEL, batch)
            seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def main() -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        repository = write_models(Path(folder), [_MODEL], instances=2, max_batch_size=64)
        worker = WorkerTriton(str(repository), linger_seconds=0)
        started = time.monotonic()
        with TritonClient(worker), _elsewhere(worker) as away:
            print(f"the server was ready after {time.monotonic() - started:.1f} s", file=sys.stderr)
            print("| elements of | | on the worker | 10 ms away |\n|---|---|--:|--:|")
            for length in _LENGTHS:
                for what, measure, unit in (
                    ("elements a second", _rate, 1.0),
                    ("ms a request of 64", _latency, 1e3),
                ):
                    rounds = [(measure(worker, length), measure(away, length)) for _ in range(_ROUNDS)]
                    here, there = (statistics.median(side) * unit for side in zip(*rounds, strict=True))
                    print(f"| {length} FP32 | {what} | {here:,.4g} | {there:,.4g} |", flush=True)


if __name__ == "__main__":
    main()
