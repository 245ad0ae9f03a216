"""``pipelines/score_stream.py`` on Prism and on a Flink cluster: every id once, whatever fails on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import FlinkCluster, Prism
from engines.digits_job import MODELS
from engines.install import REPOSITORY
from tests.engines.processes_and_connections import wait_until

pytestmark = pytest.mark.timeout(600)

SCORE_STREAM = REPOSITORY / "pipelines" / "score_stream.py"
DIGITS = REPOSITORY / "pipelines" / "data" / "digits.csv"

EXACTLY_ONCE = ["--checkpointing_interval=2000", "--finish_bundle_before_checkpointing"]
"""Without the second, Beam's Flink runner keeps what a bundle gives at a checkpoint until the step gets one
more element; a source that begins with one element gets no other."""


@pytest.fixture
def server() -> Iterator[LocalTriton]:
    """A server of the test's own, which it may kill."""
    with LocalTriton(MODELS, stop_timeout_seconds=0.1) as server:
        yield server


def ids_by_window(folder: Path) -> dict[tuple[str, str], list[int]]:
    """The ids in the files of each window, ascending: doubled where a file or two files double them."""
    found: dict[tuple[str, str], list[int]] = {}
    for file in folder.glob("out-scored-*.jsonl"):
        start, end = file.name.removeprefix("out-scored-").split("-")[:2]
        found.setdefault((start, end), []).extend(int(json.loads(line)["id"]) for line in file.open())
    return {window: sorted(ids) for window, ids in found.items()}


def ids_of(folder: Path) -> list[int]:
    return sorted(number for ids in ids_by_window(folder).values() for number in ids)


def messages(first: int, count: int) -> str:
    image = json.dumps([0.0] * 64)
    return "".join(f'{{"id": {number}, "image": {image}}}\n' for number in range(first, first + count))


def put(folder: Path, name: str, text: str) -> None:
    """A file that appears complete."""
    (folder / f"{name}.unfinished").write_text(text)
    (folder / f"{name}.unfinished").rename(folder / f"{name}.jsonl")


def test_an_endless_stream_on_prism_writes_each_window_when_it_ends(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """Windows follow one another without a gap and each has its twenty digits."""
    arguments = [f"--endpoint={triton.endpoint}", f"--output={tmp_path}/out", "--window_seconds=2"]
    with Prism(tmp_path / "prism") as prism:
        prism.start_pipeline(SCORE_STREAM, *arguments)
        wait_until(lambda: len(ids_by_window(tmp_path)) >= 4, within_seconds=60)
    windows = sorted(ids_by_window(tmp_path).items())
    assert [end for (_, end), _ in windows[:3]] == [start for (start, _), _ in windows[1:4]]
    assert {len(ids) for _, ids in windows[1:4]} == {20}
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
    for ids in ids_by_window(tmp_path).values():
        assert ids == list(range(ids[0], ids[-1] + 1))


def test_flink_writes_every_id_once_through_a_killed_task_manager_and_a_restarted_triton(
    server: LocalTriton, tmp_path: Path
) -> None:
    """100 digits a second for 70 seconds. What was under way comes again; the files have every id once."""
    arguments = [
        "--run_seconds=70",
        "--every_seconds=0.01",
        "--window_seconds=5",
        "--shards=2",
        *EXACTLY_ONCE,
    ]
    with FlinkCluster(tmp_path / "cluster", parallelism=2) as cluster:
        cluster.start_pipeline(
            SCORE_STREAM, f"--endpoint={server.endpoint}", f"--output={tmp_path}/out", *arguments
        )
        wait_until(lambda: len(ids_by_window(tmp_path)) >= 4, within_seconds=120)
        cluster.kill_task_manager(0)
        written = len(ids_by_window(tmp_path))
        wait_until(lambda: len(ids_by_window(tmp_path)) >= written + 2, within_seconds=120)
        assert cluster.rest.task_managers() == 1
        server.kill()
        time.sleep(3.0)
        server.start()
        wait_until(lambda: len(ids_of(tmp_path)) >= 7_000, within_seconds=120)
        (job,) = cluster.rest.running_jobs()
        assert cluster.rest.restored_checkpoints(job) > 0, "the job began anew: no checkpoint was restored"
        cluster.rest.cancel(job)
    assert ids_of(tmp_path) == list(range(7_000))
    assert not list(tmp_path.glob("out-failed-*"))


def test_flink_reads_files_that_appear_once_through_a_killed_task_manager(
    server: LocalTriton, tmp_path: Path
) -> None:
    """The windows of rows are those of their file's time, which is the same when the file is read again."""
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = [f"--files={folder}/*.jsonl", "--poll_seconds=1", "--window_seconds=5", *EXACTLY_ONCE]
    with FlinkCluster(tmp_path / "cluster", parallelism=2) as cluster:
        cluster.start_pipeline(
            SCORE_STREAM, f"--endpoint={server.endpoint}", f"--output={tmp_path}/out", *arguments
        )
        is_killed = False
        for number in range(120):
            put(folder, str(number), messages(number * 50, 50))
            time.sleep(0.5)
            if not is_killed and len(ids_by_window(tmp_path)) >= 3:
                cluster.kill_task_manager(0)
                is_killed = True
        wait_until(lambda: len(ids_of(tmp_path)) >= 6_000, within_seconds=120)
        (job,) = cluster.rest.running_jobs()
        assert is_killed
        assert cluster.rest.restored_checkpoints(job) > 0, "the job began anew: no checkpoint was restored"
        cluster.rest.cancel(job)
    assert ids_of(tmp_path) == list(range(6_000))
