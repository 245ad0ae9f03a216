"""The benchmark of engines on a worker that has the library but not the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from benchmarks.cases.engines import score_on
from benchmarks.peers import BEAM_TRITON
from benchmarks.server import REMOTE_LIKE, target
from engines import Prism
from tests.support.models import write_models

ELEMENTS = 1_000


@pytest.fixture(scope="module")
def remote_like(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    repository = write_models(tmp_path_factory.mktemp("models"), [REMOTE_LIKE])
    with LocalTriton(repository, grpc=True, stop_timeout_seconds=2) as server:
        yield server


def test_the_benchmark_runs_on_a_worker_without_its_modules(remote_like: LocalTriton, tmp_path: Path) -> None:
    """The pipeline carries the benchmark's modules by value, and every element is scored."""
    with Prism(tmp_path, worker_processes=True) as engine:
        run = score_on(engine, BEAM_TRITON, target(remote_like, REMOTE_LIKE), ELEMENTS)
    assert run.throughput.elements == ELEMENTS
    assert run.requests >= ELEMENTS / 64
