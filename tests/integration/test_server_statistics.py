"""What a real Triton says of its queue, and servers that do not say it."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from apache_beam.transforms.window import GlobalWindows

from beam_triton import TritonInferenceDoFn
from beam_triton.testing import LocalTriton
from tests.support import faults
from tests.support.answers import Answer, forward_to
from tests.support.executions import port
from tests.support.fault_server import FaultServer

STATISTICS = "/stats"


def keep_busy(endpoint: str, model: str, width: int, seconds: float, **options: Any) -> int:
    """Score a bundle for so long, and return how many elements were answered in the second half."""
    dofn = TritonInferenceDoFn(endpoint, model, **options)
    dofn.setup()
    try:
        dofn.start_bundle()
        element = np.ones(width, np.float32)
        end = time.monotonic() + seconds
        in_second_half = 0
        while time.monotonic() < end:
            answered = len(list(dofn.process(element, GlobalWindows.windowed_value(element)) or ()))
            if time.monotonic() > end - seconds / 2:
                in_second_half += answered
        list(dofn.finish_bundle())
    finally:
        dofn.teardown()
    return in_second_half


def questions(proxy: FaultServer) -> int:
    return sum(request.target.endswith(STATISTICS) for request in proxy.requests)


def test_busy_server_is_asked_about_once_a_second(triton: LocalTriton) -> None:
    with FaultServer(forward_to(port(triton))) as proxy:
        keep_busy(
            proxy.endpoint,
            "remote_like",
            128,
            4.0,
            batching={"max_batch_size": 1},
            max_concurrent_requests=4,
        )
        assert 3 <= questions(proxy) <= 7


def test_idle_server_is_not_asked(triton: LocalTriton) -> None:
    """One request at a time, where more are allowed: nothing is to be known of the queue."""
    with FaultServer(forward_to(port(triton))) as proxy:
        dofn = TritonInferenceDoFn(proxy.endpoint, "remote_like")
        dofn.setup()
        try:
            for _ in range(30):
                element = np.ones(128, np.float32)
                dofn.start_bundle()
                dofn.process(element, GlobalWindows.windowed_value(element))
                list(dofn.finish_bundle())
                time.sleep(0.1)
        finally:
            dofn.teardown()
        assert questions(proxy) <= 2


@pytest.mark.parametrize(
    "answer",
    [
        Answer(404, b'{"error": "no such thing"}'),
        Answer(403, b"<html>forbidden</html>"),
        Answer(200, b"[]"),
        Answer(200, json.dumps({"model_stats": [{"name": "model"}]}).encode()),
        Answer(501, b""),
    ],
    ids=["404", "403", "other JSON", "other statistics", "501"],
)
def test_server_without_statistics_is_asked_once(triton: LocalTriton, answer: Answer) -> None:
    with FaultServer(
        forward_to(port(triton)),
        faults.answered(answer),
        when=lambda line: STATISTICS.encode() in line,
    ) as proxy:
        assert keep_busy(proxy.endpoint, "remote_like", 128, 2.0) > 0
        assert questions(proxy) == 1


def test_job_that_comes_late_to_a_busy_server_gets_its_share(triton: LocalTriton) -> None:
    """It has never seen the server without a queue. Different deadlines keep the jobs' limits apart."""
    answered = [0, 0, 0]

    def run(number: int) -> None:
        time.sleep(number)
        answered[number] = keep_busy(
            triton.endpoint,
            "remote_like",
            128,
            14.0 - number,
            timeout_seconds=30.0 + number,
            batching={"max_batch_size": 16},
        )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rates = [count / (7.0 - number / 2) for number, count in enumerate(answered)]
    assert max(rates) < 1.4 * min(rates)
