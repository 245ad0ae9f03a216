"""A Flink cluster: a job manager, two task managers, and workers that have to install the library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from engines import FlinkCluster
from engines.digits_job import score_digits
from tests.engines.engines_table import record
from tests.engines.numbers_job import SLOW_NUMBERS, scored_numbers, start_numbers, write_numbers
from tests.engines.processes_and_connections import check_counts, count_on, wait_until
from tests.engines.worker_triton_job import DIGITS, one_server, scored_digits, start_job

pytestmark = pytest.mark.timeout(900)

ELEMENTS = 20_000
ROWS = 20_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkCluster]:
    with FlinkCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def scored_so_far(endpoint: str) -> int:
    """The number of elements that the server has scored on the slow model."""
    with TritonClient(endpoint) as client:
        statistics = client.statistics(SLOW_NUMBERS)
    return int(statistics["model_stats"][0]["inference_count"])


def test_score_files_gives_the_same_results(
    cluster: FlinkCluster, triton: LocalTriton, digits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """The main job installs its package on bare workers and gives the DirectRunner's results."""
    assert score_digits(cluster, triton.endpoint, tmp_path / "results.jsonl") == digits


def test_processes_and_connections(cluster: FlinkCluster, triton: LocalTriton, tmp_path: Path) -> None:
    """Each task manager has one worker process with one session, and nothing is left at the end."""
    before = set(cluster.members())
    counts = count_on(cluster, triton.endpoint, tmp_path, elements=ELEMENTS)
    check_counts(counts, elements=ELEMENTS)
    assert len(counts.dofns.processes) == 2
    assert counts.dofns.instances == 8
    wait_until(lambda: set(cluster.members()) <= before, within_seconds=30)
    record("Flink cluster, batch", counts.figures())


def test_its_workers_share_a_triton_of_their_machine(cluster: FlinkCluster, tmp_path: Path) -> None:
    """Each of the two task managers has a worker process of its own."""
    with one_server() as server:
        start_job(cluster, tmp_path / "output").finish()
    assert len(scored_digits(tmp_path / "output")) == DIGITS
    assert len(server.users) >= 1 + 2


def test_a_killed_task_manager_causes_no_lost_or_repeated_row(model_repository: Path, tmp_path: Path) -> None:
    """The tasks of a task manager that is killed during the job run again; the output has every row once."""
    files = write_numbers(tmp_path / "rows", ROWS)
    output = tmp_path / "results.jsonl"
    with (
        LocalTriton(model_repository, stop_timeout_seconds=2) as triton,
        FlinkCluster(tmp_path / "cluster", parallelism=2) as cluster,
    ):
        run = start_numbers(cluster, triton.endpoint, files=files, output=output)
        wait_until(lambda: scored_so_far(triton.endpoint) >= ROWS // 5, within_seconds=180)
        scored_at_kill = scored_so_far(triton.endpoint)
        cluster.kill_task_manager(0)
        run.finish(within_seconds=400)
        assert cluster.rest.task_managers() == 1
        scored = scored_so_far(triton.endpoint)
    assert scored_at_kill < ROWS * 4 // 5, "the job had almost ended, so nothing was disturbed"
    assert scored > ROWS, "nothing ran again, so the task manager had no part in the job"
    assert scored_numbers(output) == list(range(ROWS))
    record("Flink cluster, batch", {"rows_scored_again_after_kill": scored - ROWS})


def test_a_triton_restart_causes_no_lost_or_repeated_row(
    cluster: FlinkCluster, model_repository: Path, tmp_path: Path
) -> None:
    """The server is killed during the job and restarts after three seconds; the output has every row once."""
    files = write_numbers(tmp_path / "rows", ROWS)
    output = tmp_path / "results.jsonl"
    with LocalTriton(model_repository, stop_timeout_seconds=2) as triton:
        run = start_numbers(cluster, triton.endpoint, files=files, output=output)
        wait_until(lambda: scored_so_far(triton.endpoint) >= ROWS // 5, within_seconds=180)
        scored_at_kill = scored_so_far(triton.endpoint)
        triton.kill()
        time.sleep(3.0)
        triton.start()
        run.finish(within_seconds=400)
    assert scored_at_kill < ROWS * 4 // 5, "the job had almost ended, so nothing was disturbed"
    assert scored_numbers(output) == list(range(ROWS))
