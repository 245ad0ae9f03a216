"""``politeness="background"`` on a real Triton that interactive users share."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from tests.integration.test_server_statistics import keep_busy
from tests.support import faults
from tests.support.answers import Answer, forward_to
from tests.support.executions import port
from tests.support.fault_server import FaultServer
from tests.support.models import sleeping
from tests.support.shared_server import Shares, jobs, load

_INSTANCES = 4
_MODEL_SECONDS = 0.02
_USERS_A_SECOND = 0.2 * _INSTANCES / _MODEL_SECONDS


@pytest.fixture(scope="module")
def shared_triton() -> Iterator[LocalTriton]:
    """A server whose load nobody else changes."""
    with tempfile.TemporaryDirectory() as folder:
        sleeping("sleeping", _MODEL_SECONDS, instances=_INSTANCES).write(Path(folder))
        with LocalTriton(folder) as server:
            load(server.endpoint, "sleeping", _USERS_A_SECOND, 1.0)
            yield server


def users_beside(server: LocalTriton, politeness: str | None) -> Shares:
    """What interactive users see beside a job that has settled."""
    with jobs(server.endpoint, "sleeping", politeness=politeness) as (answered,):
        deadline = time.monotonic() + 60
        while not answered.value and time.monotonic() < deadline:
            time.sleep(0.1)
        load(server.endpoint, "sleeping", _USERS_A_SECOND, 5.0)
        return load(server.endpoint, "sleeping", _USERS_A_SECOND, 8.0)


def test_background_job_leaves_a_part_of_the_server_to_its_users(shared_triton: LocalTriton) -> None:
    """They wait for a fraction of what they wait for beside another job; it gets most of what they leave.

    Half of them are looked at, as machines that run tests are slow now and then.
    """
    alone = load(shared_triton.endpoint, "sleeping", _USERS_A_SECOND, 5.0)
    normal = users_beside(shared_triton, None)
    beside = users_beside(shared_triton, "background")
    usual = alone.percentile(50)
    assert beside.percentile(50) - usual < 0.4 * (normal.percentile(50) - usual)
    assert 0.6 < beside.share_of_rest(_INSTANCES) < 0.88 < normal.share_of_rest(_INSTANCES)


def test_background_job_has_the_lowest_priority_unless_it_is_given_one(triton: LocalTriton) -> None:
    """Where the model has priorities, and only there: Triton's models have none unless they say so."""
    for model, options, expected in (
        ("prioritized", {"politeness": "background"}, 3),
        ("prioritized", {"politeness": "background", "priority": 1}, 1),
        ("prioritized", {}, None),
        ("full_queue", {"politeness": "background"}, None),
    ):
        with FaultServer(forward_to(port(triton))) as proxy:
            with TritonClient(proxy.endpoint, **options) as client:
                client.infer(model, {"x": np.zeros((1, 1), np.float32)})
            (request,) = [each for each in proxy.requests if each.target.endswith("/infer")]
            head, _ = json.JSONDecoder().raw_decode(request.body.decode("latin-1"))
            assert head.get("parameters", {}).get("priority") == expected


def test_background_job_works_where_the_server_has_no_statistics(
    triton: LocalTriton, caplog: pytest.LogCaptureFixture
) -> None:
    """As any other job does, after one line in the log: nobody says whether there are others."""
    with FaultServer(
        forward_to(port(triton)),
        faults.answered(Answer(404, b'{"error": "no such thing"}')),
        when=lambda line: b"/stats" in line,
    ) as proxy:
        done = keep_busy(
            proxy.endpoint, "remote_like", 128, 4.0, politeness="background", batching={"max_batch_size": 1}
        )
    assert done > 2 * 2.0 / 0.02, "more than one request at a time"
    assert sum("politeness='background'" in each.message for each in caplog.records) == 1
