"""``pipelines/score_stream.py`` on Prism and on a Flink cluster: every id once, whatever fails on the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import FlinkCluster, Prism
from engines.digits_job import MODELS
from engines.install import REPOSITORY
from tests.engines.processes_and_connections import wait_until

pytestmark = pytest.mark.timeout(900)

SCORE_STREAM = REPOSITORY / "pipelines" / "score_stream.py"

EXACTLY_ONCE = ["--checkpointing_interval=2000", "--finish_bundle_before_checkpointing"]
"""Without the second, Beam's Flink runner keeps what a bundle gives at a checkpoint until the step gets one
more element; a source that begins with one element gets no other."""


@pytest.fixture
def server() -> Iterator[LocalTriton]:
    """A server of the test's own, which it may kill."""
    with LocalTriton(MODELS, stop_timeout_seconds=0.1) as server:
        yield server


def ids_by_window(folder: Path) -> list[list[int]]:
    """The ids in the files of each window, ascending: twice where a file or two files have them twice."""
    found: dict[str, list[int]] = {}
    for file in folder.glob("out-scored-*.jsonl"):
        window = file.name[: -len("-000-of-001.jsonl")]
        found.setdefault(window, []).extend(int(json.loads(line)["id"]) for line in file.open())
    return [sorted(ids) for _, ids in sorted(found.items())]


def ids_of(folder: Path) -> list[int]:
    return sorted(number for ids in ids_by_window(folder) for number in ids)


def wait_until_restorable(cluster: FlinkCluster, folder: Path) -> str:
    """Wait until a job has written windows and completed checkpoints; the job."""
    wait_until(lambda: len(ids_by_window(folder)) >= 3, within_seconds=240)
    (job,) = cluster.rest.running_jobs()
    wait_until(lambda: cluster.rest.checkpoints(job)["completed"] >= 2, within_seconds=60)
    return job


def wait_for_windows(folder: Path, count: int) -> None:
    """Wait until so many more windows have files."""
    wanted = len(ids_by_window(folder)) + count
    wait_until(lambda: len(ids_by_window(folder)) >= wanted, within_seconds=240)


class AppearingFiles(threading.Thread):
    """Every half second a file of 50 numbered messages appears, complete."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="appearing files")
        self._folder = folder
        self._over = threading.Event()
        self._rows = 0

    def run(self) -> None:
        image = [0] * 64
        while not self._over.wait(0.5):
            unfinished = self._folder / "unfinished"
            numbers = range(self._rows, self._rows + 50)
            unfinished.write_text("".join(json.dumps({"id": n, "image": image}) + "\n" for n in numbers))
            unfinished.rename(self._folder / f"{self._rows}.jsonl")
            self._rows = numbers.stop

    def stop(self) -> int:
        """End it; the number of messages."""
        self._over.set()
        self.join()
        return self._rows


@contextmanager
def appearing(folder: Path) -> Iterator[AppearingFiles]:
    files = AppearingFiles(folder)
    files.start()
    try:
        yield files
    finally:
        files.stop()


def test_an_endless_stream_on_prism_writes_each_window_when_it_ends(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """Windows follow one another without a gap, and each has its twenty digits."""
    arguments = [f"--endpoint={triton.endpoint}", f"--output={tmp_path}/out", "--window_seconds=2"]
    arguments.append("--run_seconds=0")
    with Prism(tmp_path / "prism") as prism:
        prism.start_pipeline(SCORE_STREAM, *arguments)
        wait_until(lambda: len(ids_by_window(tmp_path)) >= 4, within_seconds=60)
    assert [len(ids) for ids in ids_by_window(tmp_path)[1:4]] == [20, 20, 20]
    assert ids_of(tmp_path) == list(range(len(ids_of(tmp_path))))


def test_a_stream_that_ends_on_prism_has_each_row_in_all_its_windows(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """Worker processes, sliding windows: each of 200 digits in five files."""
    arguments = ["--run_seconds=10", "--every_seconds=0.05", "--window_seconds=5", "--slide_seconds=1"]
    with Prism(tmp_path / "prism", worker_processes=True) as prism:
        prism.run_pipeline(
            SCORE_STREAM, f"--endpoint={triton.endpoint}", f"--output={tmp_path}/out", *arguments
        )
    assert ids_of(tmp_path) == [number for number in range(200) for _ in range(5)]
    for ids in ids_by_window(tmp_path):
        assert ids == list(range(ids[0], ids[-1] + 1))


def test_flink_writes_every_id_once_through_a_killed_task_manager_and_a_restarted_triton(
    server: LocalTriton, tmp_path: Path
) -> None:
    """100 digits a second. What was under way comes again; the files have every id once."""
    # When the workers are ready, the first windows are over, and their lateness too.
    windows = ["--window_seconds=5", "--allowed_lateness_seconds=2"]
    arguments = ["--run_seconds=0", "--every_seconds=0.01", "--shards=2", *windows, *EXACTLY_ONCE]
    with FlinkCluster(tmp_path / "cluster", parallelism=2) as cluster:
        cluster.start_pipeline(
            SCORE_STREAM, f"--endpoint={server.endpoint}", f"--output={tmp_path}/out", *arguments
        )
        job = wait_until_restorable(cluster, tmp_path)
        cluster.kill_task_manager(0)
        wait_for_windows(tmp_path, 4)
        server.kill()
        time.sleep(3.0)
        server.start()
        wait_for_windows(tmp_path, 4)
        assert cluster.rest.task_managers() == 1
        assert cluster.rest.checkpoints(job)["restored"] > 0, "the job began anew from no checkpoint"
        cluster.rest.cancel(job)
    # The last window may have had one of its two files only when the job was cancelled.
    ids = [number for window in ids_by_window(tmp_path)[:-1] for number in window]
    assert ids == list(range(len(ids)))
    assert len(ids) > 4_000
    assert not list(tmp_path.glob("out-failed-*"))


def test_flink_reads_files_that_appear_once_through_a_killed_task_manager(
    server: LocalTriton, tmp_path: Path
) -> None:
    """A file that is read again has the same time, so its rows are in the windows that they were in."""
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = [f"--files={folder}/*.jsonl", "--poll_seconds=1", "--window_seconds=5", *EXACTLY_ONCE]
    with FlinkCluster(tmp_path / "cluster", parallelism=2) as cluster, appearing(folder) as files:
        cluster.start_pipeline(
            SCORE_STREAM, f"--endpoint={server.endpoint}", f"--output={tmp_path}/out", *arguments
        )
        job = wait_until_restorable(cluster, tmp_path)
        cluster.kill_task_manager(0)
        wait_for_windows(tmp_path, 4)
        rows = files.stop()
        wait_until(lambda: len(ids_of(tmp_path)) >= rows, within_seconds=240)
        assert cluster.rest.checkpoints(job)["restored"] > 0, "the job began anew from no checkpoint"
        cluster.rest.cancel(job)
    assert ids_of(tmp_path) == list(range(rows))
