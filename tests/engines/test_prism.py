"""Prism: the DoFns in the process that submits, and in a worker process of its own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import Prism
from engines.digits_job import score_digits
from tests.engines.engines_table import record
from tests.engines.processes_and_connections import check_counts, count_on
from tests.engines.worker_triton_job import DIGITS, one_server, scored_digits, start_job

ELEMENTS = 20_000

KINDS = pytest.mark.parametrize("worker_processes", [False, True], ids=["loopback", "worker process"])


@KINDS
def test_score_files_gives_the_same_results(
    worker_processes: bool, triton: LocalTriton, digits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """The main job, unchanged, gives the DirectRunner's results."""
    with Prism(tmp_path, worker_processes=worker_processes) as prism:
        assert score_digits(prism, triton.endpoint, tmp_path / "results.jsonl") == digits


@KINDS
def test_processes_and_connections(worker_processes: bool, triton: LocalTriton, tmp_path: Path) -> None:
    """One process has one session, whose connections stay within max_total and end with the job."""
    with Prism(tmp_path, worker_processes=worker_processes) as prism:
        counts = count_on(prism, triton.endpoint, tmp_path / "observed", elements=ELEMENTS)
        assert prism.members() == []
    check_counts(counts, elements=ELEMENTS)
    record("Prism, worker process" if worker_processes else "Prism, LOOPBACK", counts.figures())


def test_worker_processes_of_two_jobs_share_a_triton_of_their_machine(tmp_path: Path) -> None:
    """Each job has a worker process of its own, with the package installed; one server scores for both."""
    outputs = [tmp_path / "first", tmp_path / "second"]
    with one_server() as server, ExitStack() as engines:
        prisms = [engines.enter_context(Prism(tmp_path / name, worker_processes=True)) for name in ("a", "b")]
        for run in [start_job(prism, output) for prism, output in zip(prisms, outputs, strict=True)]:
            run.finish()
    results = [scored_digits(output) for output in outputs]
    assert len(results[0]) == DIGITS
    assert results[0] == results[1]
    assert len(server.users) == 1 + 2
