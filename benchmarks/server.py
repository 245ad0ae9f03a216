"""The Triton server of all measurements."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from benchmarks.workload import Target
from tests.support.models import write_models

ECHO = "echo"
"""Returns [128] FP32 unchanged, at most 1,024 a batch, as fast as the server can."""
ECHO_VARIABLE = "echo_variable"
"""Returns FP32 of any length unchanged."""
REMOTE_LIKE = "remote_like"
"""Returns [128] FP32 unchanged, at most 64 a batch, 20 ms a request, 16 at a time: a busy remote GPU."""
ATTEND = "attend"
"""Takes INT64 token ids of any length and their mask, at most 64 a batch, and does next to nothing."""
SLOW = "slow"
"""Takes [1] FP32 and sleeps for the batch's largest value, in seconds; 16 requests at a time."""

_WARM_UP_THREADS = 32
_WARM_UP_REQUESTS = 200


@contextmanager
def benchmark_server() -> Iterator[LocalTriton]:
    """A Triton with these models, warmed up, over HTTP and gRPC."""
    with tempfile.TemporaryDirectory(prefix="beam_triton_benchmarks_") as folder:
        repository = write_models(Path(folder), [ECHO, ECHO_VARIABLE, REMOTE_LIKE, ATTEND])
        write_models(repository, [SLOW], instances=16)
        with LocalTriton(repository, grpc=True) as server:
            _warm_up(server)
            yield server


def _warm_up(server: LocalTriton) -> None:
    """Send a request to every instance: an instance's first takes many times as long as its next."""
    shapes = {ECHO: 128, ECHO_VARIABLE: 128, REMOTE_LIKE: 128, SLOW: 1}
    with TritonClient(server.endpoint) as client, ThreadPoolExecutor(_WARM_UP_THREADS) as threads:
        for model_name, width in shapes.items():
            x = np.zeros((1, width), np.float32)
            asked = [threads.submit(client.infer, model_name, {"x": x}) for _ in range(_WARM_UP_REQUESTS)]
            for answer in asked:
                answer.result()


def execution_count(endpoint: str, model_name: str) -> int:
    """How many batches the model has executed."""
    with TritonClient(endpoint) as client:
        return int(client.statistics(model_name)["model_stats"][0]["execution_count"])


def target(server: LocalTriton, model_name: str) -> Target:
    """A model of the server."""
    return Target(server.endpoint, server.grpc_endpoint, model_name)
