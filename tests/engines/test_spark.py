"""Spark inside Beam's portable job server, with the DoFns in the process that submits, or in workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import SparkJobServer
from engines.digits_job import score_digits
from tests.engines.engines_table import record
from tests.engines.processes_and_connections import check_counts, count_on

ELEMENTS = 20_000


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkJobServer]:
    with SparkJobServer(tmp_path_factory.mktemp("spark")) as server:
        yield server


def test_score_files_gives_the_same_results(
    spark: SparkJobServer, triton: LocalTriton, digits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """The main job, unchanged, gives the DirectRunner's results."""
    assert score_digits(spark, triton.endpoint, tmp_path / "results.jsonl") == digits


def test_processes_and_connections(spark: SparkJobServer, triton: LocalTriton, tmp_path: Path) -> None:
    """All DoFns of two models share one session with at most max_total connections."""
    counts = count_on(spark, triton.endpoint, tmp_path, elements=ELEMENTS)
    check_counts(counts, elements=ELEMENTS)
    record("Spark, embedded", counts.figures())


def test_workers_install_the_package(
    triton: LocalTriton, digits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """Worker processes of Beam's boot program give the same results."""
    with SparkJobServer(tmp_path, worker_processes=True) as spark:
        assert score_digits(spark, triton.endpoint, tmp_path / "results.jsonl") == digits
