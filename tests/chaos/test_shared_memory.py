"""Shared memory with a server or a worker that is killed: nothing lost, nothing wrong, nothing left."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from tests.support.executions import port
from tests.support.models import throwaway_triton, write_models
from tests.support.nginx import Nginx
from tests.support.shared_memory import files_of_regions, registered_regions

WIDTH = 40_000


def scored(client: TritonClient, number: int) -> Any:
    x = np.full((1, WIDTH), number, np.float32)
    return client.infer("echo_variable", {"x": x}).outputs["y"]


def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    """Three times ``kill -9`` under eight threads: every result is right, and shared memory is used again."""
    with throwaway_triton(write_models(tmp_path, ["echo_variable"])) as triton:
        with TritonClient(triton.endpoint) as client, ThreadPoolExecutor(8) as threads:
            done = threading.Event()

            def work(thread: int) -> int:
                count = 0
                while not done.is_set():
                    number = thread * 100_000 + count
                    assert (scored(client, number) == number).all()
                    count += 1
                return count

            workers = [threads.submit(work, thread) for thread in range(8)]
            for _ in range(3):
                _wait_for_regions(triton)
                triton.kill()
                time.sleep(0.3)
                triton.restart()
            _wait_for_regions(triton)
            done.set()
            counts = [worker.result(60) for worker in workers]
            assert sum(counts) > 100
        assert registered_regions(triton.endpoint) == []
    assert files_of_regions() == []


def _wait_for_regions(triton: LocalTriton) -> None:
    deadline = time.monotonic() + 30
    while len(registered_regions(triton.endpoint)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _work_without_end(endpoint: str, is_running: Any) -> None:
    with TritonClient(endpoint) as client:
        for number in itertools.count(1):
            assert (scored(client, number) == number).all()
            if number == 30:
                is_running.set()


def test_killed_workers_leave_nothing(tmp_path: Path) -> None:
    """Twenty times ``kill -9``: no file in /dev/shm, and the next worker unregisters what each has left."""
    context = multiprocessing.get_context("fork")
    with throwaway_triton(write_models(tmp_path, ["echo_variable"])) as triton:
        for _ in range(5):
            running = [context.Event() for _ in range(4)]
            workers = [
                context.Process(target=_work_without_end, args=(triton.endpoint, is_running))
                for is_running in running
            ]
            for worker in workers:
                worker.start()
            assert all(is_running.wait(60) for is_running in running)
            assert len(registered_regions(triton.endpoint)) >= 4
            for worker in workers:
                worker.kill()
                worker.join()
            assert files_of_regions() == []
        with TritonClient(triton.endpoint) as client:
            deadline = time.monotonic() + 30
            while len(registered_regions(triton.endpoint)) > 2:
                assert time.monotonic() < deadline
                assert (scored(client, 7) == 7).all()
                time.sleep(0.05)
        assert registered_regions(triton.endpoint) == []


@pytest.mark.nginx
def test_a_load_balancer_on_this_machine_costs_little(tmp_path: Path) -> None:
    """Only one of its servers knows a region. What the others refuse goes by HTTP, and is tried ever less."""
    models = write_models(tmp_path, ["echo_variable"])
    with (
        throwaway_triton(models) as one,
        throwaway_triton(models) as other,
        Nginx([port(one), port(other)], access_log=True) as nginx,
        TritonClient(nginx.endpoint) as client,
    ):
        for number in range(400):
            assert (scored(client, number) == number).all()
        refused = nginx.statuses()[404]
    assert 1 <= refused <= 8
