"""A Flink cluster in streaming mode: an unbounded source, fixed windows, and a job that is cancelled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import FlinkCluster
from tests.engines.engines_table import record
from tests.engines.numbers_pipeline import IMPULSE_SECONDS, WINDOW_SECONDS
from tests.engines.processes_and_connections import (
    NUMBERS_PIPELINE,
    ConnectionWatch,
    DoFnNotes,
    check_counts,
    count_on,
    output_numbers,
    output_windows,
    pipeline_arguments,
    port_of,
    wait_until,
)
from tests.support.sockets import established

pytestmark = pytest.mark.timeout(900)

ELEMENTS = 3_000
"""At 100 a second: 30 seconds, fifteen windows of two seconds."""

LATE_SECONDS = 20
"""This much is due when the job starts, as after a failure, and exceeds the limit of requests in flight."""

ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkCluster]:
    with FlinkCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def test_every_window_has_each_of_its_elements_once(
    cluster: FlinkCluster, triton: LocalTriton, tmp_path: Path
) -> None:
    """Each window of a periodic source has one output, with exactly the numbers that belong to it."""
    # Half an impulse after a full second, so that no timestamp is on the border of two windows.
    start = int(time.time()) - LATE_SECONDS + IMPULSE_SECONDS / 2
    options = ["--streaming", f"--start={start}"]
    counts = count_on(cluster, triton.endpoint, tmp_path, elements=ELEMENTS, options=options)
    check_counts(counts, elements=ELEMENTS)
    numbers_of: dict[int, list[int]] = {}
    for number in range(ELEMENTS):
        second = int(start + number * IMPULSE_SECONDS)
        numbers_of.setdefault(second - second % WINDOW_SECONDS, []).append(number)
    assert output_windows(tmp_path) == sorted(numbers_of.items())
    record("Flink cluster, streaming", counts.figures())


def test_a_cancelled_job_leaves_no_connection_and_no_process(
    cluster: FlinkCluster, triton: LocalTriton, tmp_path: Path
) -> None:
    """A job that is cancelled with open connections ends its workers and all its connections."""
    port = port_of(triton.endpoint)
    before = set(cluster.members())
    arguments = pipeline_arguments(triton.endpoint, tmp_path, elements=ENDLESS, max_total=8)
    with ConnectionWatch(port, cluster) as watch:
        run = cluster.start_pipeline(NUMBERS_PIPELINE, *arguments, "--streaming")
        wait_until(lambda: len(output_numbers(tmp_path)) > 100, within_seconds=180)
        assert established(port) > 0
        (job,) = cluster.rest.running_jobs()
        cluster.rest.cancel(job)
    run.process.wait(timeout=60)
    wait_until(lambda: established(port) == 0, within_seconds=30)
    wait_until(lambda: set(cluster.members()) <= before, within_seconds=60)
    numbers = output_numbers(tmp_path)
    assert numbers == list(range(len(numbers)))
    dofns = DoFnNotes.read(tmp_path)
    assert 0 < max(watch.by_process.values()) <= 8
    record(
        "Flink cluster, streaming",
        {"torn_down_on_cancel": f"{dofns.instances_torn_down} of {dofns.instances}"},
    )
