"""A Flink cluster in streaming mode: an unbounded source, fixed windows, and a job that is cancelled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import FlinkCluster
from engines.checks import check_promises, wait_until
from engines.findings import record
from engines.observation import (
    OBSERVED_PIPELINE,
    ConnectionWatch,
    Observed,
    observe,
    observed_arguments,
    output_numbers,
    output_windows,
    port_of,
)
from engines.observed_pipeline import IMPULSE_SECONDS, WINDOW_SECONDS
from tests.support.sockets import established

pytestmark = pytest.mark.timeout(900)

ELEMENTS = 3_000
"""At 100 a second: 30 seconds, fifteen windows of two seconds."""

LATE_SECONDS = 20
"""So much is due when the job starts, as after a failure: more than may be in flight."""

ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkCluster]:
    with FlinkCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def test_every_element_of_every_window_comes_out_once(
    cluster: FlinkCluster, triton: LocalTriton, tmp_path: Path
) -> None:
    """Each window of a periodic source is there once, with exactly the numbers whose timestamps lie in it."""
    # Half an impulse after a full second, so that no timestamp is on a window's border.
    start = int(time.time()) - LATE_SECONDS + IMPULSE_SECONDS / 2
    options = ["--streaming", f"--start={start}"]
    observation = observe(cluster, triton.endpoint, tmp_path, elements=ELEMENTS, options=options)
    check_promises(observation, elements=ELEMENTS)
    numbers_of: dict[int, list[int]] = {}
    for number in range(ELEMENTS):
        second = int(start + number * IMPULSE_SECONDS)
        numbers_of.setdefault(second - second % WINDOW_SECONDS, []).append(number)
    assert output_windows(tmp_path) == sorted(numbers_of.items())
    record("Flink cluster, streaming", observation.facts())


def test_a_cancelled_job_leaves_no_socket_and_no_process(
    cluster: FlinkCluster, triton: LocalTriton, tmp_path: Path
) -> None:
    """Cancelled with connections open, the job ends its workers and every connection at the server."""
    port = port_of(triton.endpoint)
    before = set(cluster.members())
    arguments = observed_arguments(triton.endpoint, tmp_path, elements=ENDLESS, max_total=8)
    with ConnectionWatch(port, cluster) as watch:
        run = cluster.start_pipeline(OBSERVED_PIPELINE, *arguments, "--streaming")
        wait_until(lambda: len(output_numbers(tmp_path)) > 100, within_seconds=180)
        assert established(port) > 0
        (job,) = cluster.rest.running()
        cluster.cancel(job)
    run.process.wait(timeout=60)
    wait_until(lambda: established(port) == 0, within_seconds=30)
    wait_until(lambda: set(cluster.members()) <= before, within_seconds=60)
    numbers = output_numbers(tmp_path)
    assert numbers == list(range(len(numbers)))
    dofns = Observed.read(tmp_path)
    assert 0 < max(watch.by_process.values()) <= 8
    record(
        "Flink cluster, streaming",
        {"torn_down_on_cancel": f"{dofns.instances_torn_down} of {dofns.instances}"},
    )
