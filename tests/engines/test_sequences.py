"""Sequences of an unbounded source on Prism and on a Flink cluster: running sums, wrong if anything is."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from beam_triton.testing import LocalTriton
from engines import FlinkCluster, Prism
from tests.engines.processes_and_connections import wait_until
from tests.engines.sequences_pipeline import SHARDS, schedule
from tests.support.executions import inferred
from tests.support.models import throwaway_triton, write_models

pytestmark = pytest.mark.timeout(900)

PIPELINE = Path(__file__).resolve().parent / "sequences_pipeline.py"
MODEL = "running_sum_oldest"

EXACTLY_ONCE = ["--checkpointing_interval=2000", "--finish_bundle_before_checkpointing"]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[list[LocalTriton]]:
    """Two servers of the test's own, which it may kill."""
    repository = write_models(tmp_path / "models", [MODEL])
    with throwaway_triton(repository) as first, throwaway_triton(repository) as second:
        yield [first, second]


def arguments_of(
    fleet: list[LocalTriton], folder: Path, *, keys: int, length: int, seconds: float, window_seconds: float
) -> list[str]:
    return [
        "--endpoints",
        *(server.endpoint for server in fleet),
        f"--folder={folder}",
        f"--keys={keys}",
        f"--length={length}",
        f"--seconds={seconds}",
        f"--window_seconds={window_seconds}",
    ]


def expected_sums(
    *, keys: int, length: int, seconds: float, window_seconds: float
) -> dict[tuple[int, str], list[int]]:
    """The running sums of each window and key."""
    numbers = defaultdict(list)
    for chunk in schedule(keys, length, seconds):
        for key, number, at in chunk:
            numbers[int(at // window_seconds * window_seconds), f"key-{key}"].append(number)
    return {sequence: list(accumulate(sorted(found))) for sequence, found in numbers.items()}


def written_sums(folder: Path) -> dict[tuple[int, str], list[int]]:
    """The sums in the files of each window and key, in event-time order."""
    rows = defaultdict(list)
    for file in (folder / "output").glob("*.jsonl"):
        for line in file.open():
            key, micros, _, total = json.loads(line)
            rows[int(file.name.partition("-")[0]), key].append((micros, total))
    return {sequence: [total for _, total in sorted(found)] for sequence, found in rows.items()}


def check_sums(folder: Path, expected: dict[tuple[int, str], list[int]]) -> None:
    assert list((folder / "output").glob("*.failed")) == []
    found = written_sums(folder)
    wrong = {
        sequence: found.get(sequence) for sequence, sums in expected.items() if found.get(sequence) != sums
    }
    assert not wrong, (
        f"{len(wrong)} of {len(expected)} sequences are wrong, such as {next(iter(wrong.items()))}"
    )
    assert found.keys() == expected.keys()


def shards_of(folder: Path, start: int) -> int:
    return len(list((folder / "output").glob(f"{start}-*.jsonl")))


@pytest.mark.parametrize(("bounded", "keys"), [(True, 200), (False, 5)], ids=["whole", "growing"])
def test_prism_gives_each_key_its_own_sums(
    fleet: list[LocalTriton], tmp_path: Path, bounded: bool, keys: int
) -> None:
    """Nothing fails, so nothing is sent again.

    Few keys grow: Prism loses or doubles what is in a stateful DoFn's bundle that takes more than 0.2 s
    (github.com/apache/beam/issues/35771).
    """
    size: Any = {"keys": keys, "length": 6, "seconds": 8, "window_seconds": 4}
    with Prism(tmp_path / "prism") as prism:
        prism.run_pipeline(
            PIPELINE, *arguments_of(fleet, tmp_path, **size), *(["--bounded"] if bounded else [])
        )
    expected = expected_sums(**size)
    check_sums(tmp_path, expected)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["sequences"] == len(expected)
    assert summary["elements"] == summary["requests"] == 6 * keys
    assert "replayed_elements" not in summary


def test_flink_gives_right_sums_through_a_killed_server_and_a_killed_task_manager(
    fleet: list[LocalTriton], tmp_path: Path
) -> None:
    """10,000 keys at once, half of whose numbers are in each of two windows; a file holds each sum once.

    The server is lost in the first window, the task manager in the second one: the job goes on from a
    checkpoint in new worker processes, which know the sequences by Beam's state only.
    """
    size: Any = {"keys": 10_000, "length": 6, "seconds": 40, "window_seconds": 20}
    expected = expected_sums(**size)
    in_first = sum(len(sums) for (start, _), sums in expected.items() if start == 0)
    in_second = 60_000 - in_first
    with FlinkCluster(tmp_path / "cluster", parallelism=2) as cluster:
        run = cluster.start_pipeline(PIPELINE, *arguments_of(fleet, tmp_path, **size), *EXACTLY_ONCE)

        def answered() -> int:
            assert run.process.poll() is None, run.log.read_text()[-2000:]
            return sum(inferred(server, MODEL) for server in fleet)

        wait_until(lambda: answered() >= in_first / 3, within_seconds=300)
        assert shards_of(tmp_path, 0) == 0
        fleet[0].kill()
        time.sleep(1.0)
        fleet[0].restart()
        wait_until(lambda: shards_of(tmp_path, 0) == SHARDS, within_seconds=300)
        assert inferred(fleet[0], MODEL) > 0, "the restarted server has no part in the job"
        # The sequences of the first window have ended, and none is lost in between.
        at_window = answered()
        wait_until(lambda: answered() >= at_window + in_second / 4, within_seconds=300)
        assert shards_of(tmp_path, 20) == 0
        cluster.kill_task_manager(0)
        at_kill = answered()
        wait_until(lambda: shards_of(tmp_path, 20) == SHARDS, within_seconds=300)
        again = answered() - at_kill - (in_second - (at_kill - at_window))
        (job,) = cluster.rest.running_jobs()
        assert cluster.rest.checkpoints(job)["restored"] > 0, "the job began anew: no checkpoint was restored"
        cluster.rest.cancel(job)
    assert again > 0, "no sequence was sent again, so the task manager had no part in the job"
    check_sums(tmp_path, expected)
