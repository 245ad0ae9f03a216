"""Flink inside the job server's process, with the DoFns in the process that submits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import FlinkJobServer
from engines.digits_job import score_digits
from tests.engines.engines_table import record
from tests.engines.processes_and_connections import check_counts, count_on

ELEMENTS = 20_000


@pytest.fixture(scope="module")
def flink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkJobServer]:
    with FlinkJobServer(tmp_path_factory.mktemp("flink")) as server:
        yield server


def test_score_files_gives_the_same_results(
    flink: FlinkJobServer, triton: LocalTriton, digits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """The main job, unchanged, gives the DirectRunner's results."""
    assert score_digits(flink, triton.endpoint, tmp_path / "results.jsonl") == digits


def test_processes_and_connections(flink: FlinkJobServer, triton: LocalTriton, tmp_path: Path) -> None:
    """Two DoFns for each of two models share one session with at most max_total connections."""
    counts = count_on(flink, triton.endpoint, tmp_path, elements=ELEMENTS)
    check_counts(counts, elements=ELEMENTS)
    assert counts.dofns.instances == 4
    record("Flink, embedded", counts.figures())
