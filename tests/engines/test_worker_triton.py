"""``pipelines/worker_triton.py`` on Prism and on a Flink cluster: its worker processes share one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton import TritonClient, WorkerTriton
from engines import FlinkCluster, Prism
from engines.digits_job import MODELS
from engines.install import REPOSITORY
from tests.support.server_users import SharingWatch, processes_of, wait_until

_PIPELINE = REPOSITORY / "pipelines" / "worker_triton.py"
_DIGITS = 1797

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def shared() -> Iterator[SharingWatch]:
    """The server of the pipeline's workers, which this process uses as well, so that it lasts for two jobs."""
    config = WorkerTriton(str(MODELS), linger_seconds=0)
    with SharingWatch(config) as watch:
        with TritonClient(config):
            yield watch
        assert len(watch.servers) == 1
    wait_until(lambda: not processes_of(config.folder))


def lines_of(output: Path) -> list[str]:
    return sorted(line for file in output.parent.glob("digits*.csv") for line in file.read_text().split())


def test_worker_processes_of_two_jobs_on_prism_share_one_server(shared: SharingWatch, tmp_path: Path) -> None:
    """Each job has a worker process that Beam's boot program starts, with the package installed."""
    with (
        Prism(tmp_path / "one", worker_processes=True) as one,
        Prism(tmp_path / "two", worker_processes=True) as two,
    ):
        outputs = [start(engine, tmp_path / f"output-{number}") for number, engine in enumerate((one, two))]
        runs = [
            engine.start_pipeline(_PIPELINE, f"--output={output}")
            for engine, output in zip((one, two), outputs, strict=True)
        ]
        for run in runs:
            run.finish()
    results = [lines_of(output) for output in outputs]
    assert len(results[0]) == _DIGITS
    assert results[0] == results[1]
    assert len(shared.users) == 1 + 2


def test_workers_of_a_flink_cluster_share_one_server(shared: SharingWatch, tmp_path: Path) -> None:
    """Each of the two task managers has a worker process."""
    with FlinkCluster(tmp_path / "cluster", parallelism=2) as cluster:
        output = tmp_path / "digits"
        cluster.run_pipeline(_PIPELINE, f"--output={output}")
    assert len(lines_of(output)) == _DIGITS
    assert len(shared.users) >= 1 + 2
