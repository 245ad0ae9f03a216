"""The main job and the library's promises in the three running modes of Beam's direct runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from beam_triton.testing import LocalTriton
from engines import DirectRunner
from engines.digits_job import accuracy, score_digits
from tests.engines.engines_table import record
from tests.engines.numbers_job import write_repository
from tests.engines.processes_and_connections import check_counts, count_on

ELEMENTS = 10_000
WORKERS = 2

Mode = Literal["in_memory", "multi_threading", "multi_processing"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    with LocalTriton(write_repository(tmp_path_factory.mktemp("models")), stop_timeout_seconds=2) as server:
        yield server


@pytest.fixture(scope="module")
def digits(served: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """The results of the simplest mode, which the other modes have to reproduce."""
    folder = tmp_path_factory.mktemp("in_memory")
    with DirectRunner(folder) as runner:
        return score_digits(runner, served.endpoint, folder / "results.jsonl")


def test_in_memory_scores_every_digit(digits: dict[str, tuple[int, int]]) -> None:
    """All 898 held-out digits come out, at least 95 % of them recognized."""
    assert len(digits) == 898
    assert accuracy(digits) >= 0.95


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_score_files_results_do_not_depend_on_the_running_mode(
    mode: Mode, served: LocalTriton, digits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """With several workers the main job gives the same results, each once."""
    with DirectRunner(tmp_path, mode=mode, workers=WORKERS) as runner:
        assert score_digits(runner, served.endpoint, tmp_path / "results.jsonl") == digits


@pytest.mark.parametrize(
    ("mode", "workers", "processes"),
    [("in_memory", 1, 1), ("multi_threading", WORKERS, 1), ("multi_processing", WORKERS, WORKERS)],
)
def test_each_process_has_one_session_and_bounded_connections(
    mode: Mode, workers: int, processes: int, served: LocalTriton, tmp_path: Path
) -> None:
    """One session and max_total connections per process, every DoFn torn down, no connection left."""
    with DirectRunner(tmp_path, mode=mode, workers=workers) as runner:
        counts = count_on(runner, served.endpoint, tmp_path / "observed", elements=ELEMENTS)
        assert runner.members() == []
    check_counts(counts, elements=ELEMENTS)
    assert len(counts.dofns.processes) == processes
    assert counts.dofns.instances_torn_down == counts.dofns.instances
    record(f"DirectRunner, {mode}" + (f" x {workers}" if workers > 1 else ""), counts.figures())
