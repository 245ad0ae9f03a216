"""Servers that die, restart, lose a model or have a full queue: every element still comes out once."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_triton import ConnectError, TritonClient, TritonInference, TritonInferenceDoFn
from tests.support.models import throwaway_triton, write_models
from tests.support.numbered_run import MODEL, Progress, kill_and_restart, repeat_during_run, run_numbered

ELEMENTS = 200_000


def scoring(endpoint: str | list[str], model_name: str = MODEL) -> TritonInference:
    return TritonInference(endpoint, model_name, batching={"max_batch_size": 64})


def test_five_server_restarts_lose_nothing(tmp_path: Path) -> None:
    """200,000 elements, five times ``kill -9``: 200,000 results, each once."""
    with throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server:
        run = run_numbered(
            scoring(server.endpoint),
            ELEMENTS,
            meanwhile=repeat_during_run(5, ELEMENTS, kill_and_restart(server)),
        )
    assert run.counters["elements"] == ELEMENTS
    assert run.counters["retries"] > 0
    assert run.counters.get("failures", 0) == 0


def test_outage_longer_than_the_deadline_loses_nothing(tmp_path: Path) -> None:
    """Requests are held while the server is down for twice ``timeout_seconds``: only the breaker gives up."""
    elements = 50_000
    with throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server:
        run = run_numbered(
            TritonInference(
                server.endpoint,
                MODEL,
                timeout_seconds=1.5,
                pool={"connect_timeout_seconds": 0.5},
                batching={"max_batch_size": 64},
            ),
            elements,
            meanwhile=repeat_during_run(1, elements, kill_and_restart(server, down_seconds=3.0)),
        )
    assert run.counters.get("failures", 0) == 0


def test_server_restarts_under_several_threads_lose_nothing(tmp_path: Path) -> None:
    """Several bundles at a time, whose DoFns share connections and the circuit breaker."""
    elements = 60_000
    with throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server:
        run_numbered(
            scoring(server.endpoint),
            elements,
            meanwhile=repeat_during_run(2, elements, kill_and_restart(server)),
            bundles=True,
            options=["--direct_running_mode=multi_threading", "--direct_num_workers=3"],
        )


def test_loss_of_one_of_two_servers_loses_nothing(tmp_path: Path) -> None:
    """The other server scores the rest; nothing waits for the dead one to return."""
    models = write_models(tmp_path / "models", [MODEL])
    with throwaway_triton(models) as surviving, throwaway_triton(models) as dying:
        run = run_numbered(
            scoring([surviving.endpoint, dying.endpoint]),
            ELEMENTS,
            meanwhile=repeat_during_run(1, ELEMENTS, dying.kill),
        )
    assert run.counters["elements"] == ELEMENTS


def test_rolling_restart_loses_nothing(tmp_path: Path) -> None:
    """Each server is down for a while, never both."""
    models = write_models(tmp_path / "models", [MODEL])
    with throwaway_triton(models) as first, throwaway_triton(models) as second:
        rolling = iter([first, second])
        elements = 100_000
        run_numbered(
            scoring([first.endpoint, second.endpoint]),
            elements,
            meanwhile=repeat_during_run(2, elements, lambda: kill_and_restart(next(rolling))()),
            pace_seconds=0.03,
        )


def test_run_waits_for_a_server_that_starts_later(tmp_path: Path) -> None:
    """A run that starts before its server does not fail."""
    with throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server:
        server.kill()

        def meanwhile(progress: Progress) -> None:
            time.sleep(1.0)
            server.start()

        run_numbered(scoring(server.endpoint), 5_000, meanwhile=meanwhile)


def test_setup_in_mid_job_waits_for_a_restarting_server(tmp_path: Path) -> None:
    """A further DoFn waits as requests do; the first of a process waits only for its own deadline."""
    options: dict[str, Any] = {"timeout_seconds": 0.5, "pool": {"connect_timeout_seconds": 0.2}}
    with throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server:
        first, second = (TritonInferenceDoFn(server.endpoint, MODEL, **options) for _ in range(2))
        first.setup()
        server.kill()
        with ThreadPoolExecutor(1) as thread:
            setting_up = thread.submit(second.setup)
            # Long after the second DoFn's own deadline.
            time.sleep(2.0)
            assert not setting_up.done()
            server.start()
            setting_up.result(timeout=30)
        second.teardown()
        first.teardown()
        server.kill()
        first_of_the_process = TritonInferenceDoFn(server.endpoint, MODEL, **options)
        started = time.monotonic()
        with pytest.raises(ConnectError):
            first_of_the_process.setup()
        assert time.monotonic() - started < 2.0


def test_model_reload_loses_nothing(tmp_path: Path) -> None:
    """While the model is unloaded its requests are held, and none of its elements fails."""
    elements = 60_000
    models = write_models(tmp_path / "models", [MODEL])
    with throwaway_triton(models, models_control="explicit", load_models=[MODEL]) as server:

        def reload_model() -> None:
            server.unload_model(MODEL)
            time.sleep(1.0)
            server.load_model(MODEL)

        run = run_numbered(
            scoring(server.endpoint), elements, meanwhile=repeat_during_run(2, elements, reload_model)
        )
    assert run.counters["retries"] > 0
    assert run.counters.get("failures", 0) == 0


def test_full_queue_loses_nothing_and_reports_throttling(tmp_path: Path) -> None:
    """A queue of two under sixteen requests loses nothing, and the time lost is reported as throttling."""
    elements = 500
    with throwaway_triton(write_models(tmp_path / "models", ["full_queue"], instances=2)) as server:
        run = run_numbered(
            TritonInference(server.endpoint, "full_queue", max_concurrent_requests=16), elements
        )
    assert run.counters["elements"] == elements
    assert run.counters["retries"] > 0
    assert run.counters["cumulativeThrottlingSeconds"] > 0
    # 4 rows a batch, 50 ms, two instances: 3.1 s of pure work; pauses must not dominate the run.
    assert run.seconds < 30


def test_full_queue_shared_by_sixteen_workers_loses_nothing(tmp_path: Path) -> None:
    """Sixteen independent clients, two instances, a queue of two: 400 requests are answered."""
    workers, rows = 16, 100

    def score(number: int, endpoint: str) -> int:
        # Clients with equal policies share a limit, as the DoFns of one process do.
        retry = {"initial_backoff_seconds": 0.1 + number / 1e6}
        with TritonClient(endpoint, retry=retry) as client:
            return len(client.infer("full_queue", {"x": np.zeros((rows, 1), np.float32)}).outputs["y"])

    models = write_models(tmp_path / "models", ["full_queue"], instances=2)
    with throwaway_triton(models) as server, ThreadPoolExecutor(workers) as threads:
        scored = threads.map(score, range(workers), [server.endpoint] * workers)
        assert list(scored) == [rows] * workers


def test_requests_to_a_frozen_server_fail_over(tmp_path: Path) -> None:
    """Requests to a server that accepts them and stops answering are taken over by the other one."""
    elements = 50_000
    models = write_models(tmp_path / "models", [MODEL])
    with throwaway_triton(models) as healthy, throwaway_triton(models) as freezing:
        try:
            run = run_numbered(
                TritonInference(
                    [healthy.endpoint, freezing.endpoint],
                    MODEL,
                    timeout_seconds=3.0,
                    pool={"connect_timeout_seconds": 1.0},
                    batching={"max_batch_size": 64},
                ),
                elements,
                meanwhile=repeat_during_run(1, elements, lambda: os.kill(freezing.pid or 0, signal.SIGSTOP)),
            )
        finally:
            os.kill(freezing.pid or 0, signal.SIGCONT)
    assert run.counters["retries"] > 0
    assert run.counters.get("failures", 0) == 0


@pytest.mark.long
def test_twenty_random_restarts_of_two_servers_lose_nothing(tmp_path: Path) -> None:
    """Two million elements; both servers are killed at random moments, sometimes at the same time."""
    elements = 2_000_000
    random = np.random.default_rng(20)
    models = write_models(tmp_path / "models", [MODEL])
    with throwaway_triton(models) as first, throwaway_triton(models) as second:

        def kill_and_restart_at_random() -> None:
            for server in (first, second):
                if random.random() < 0.6:
                    server.kill()
            time.sleep(random.uniform(0.0, 5.0))
            for server in (first, second):
                server.start()

        run_numbered(
            scoring([first.endpoint, second.endpoint]),
            elements,
            meanwhile=repeat_during_run(20, elements, kill_and_restart_at_random),
        )
