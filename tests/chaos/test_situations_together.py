"""Slow models, silent connections, moving fleets and learned sizes, two or three of them at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from beam_triton import TritonInference
from beam_triton.testing import LocalTriton
from tests.support.connection_proxy import ConnectionProxy
from tests.support.executions import Shares, executed, failed, port
from tests.support.models import sleeping, throwaway_triton
from tests.support.numbered_run import Progress, run_numbered

SLOW = sleeping("slow", 0.3, max_batch_size=32)
# 64 rows by their configuration, 32 by their memory.
SHORT_OF_MEMORY = sleeping("short_of_memory", 0.02, max_batch_size=64, max_rows=32)
SLOWER_AND_SHORT = sleeping("slower_and_short", 0.05, instances=2, max_batch_size=64, max_rows=32)

# What a pipeline takes to start and to end.
BEAM_SECONDS = 1.5


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LocalTriton]]:
    """Two servers with the same models."""
    folder = tmp_path_factory.mktemp("situations_together")
    for model in (SLOW, SHORT_OF_MEMORY, SLOWER_AND_SHORT):
        model.write(folder)
    with throwaway_triton(folder) as first, throwaway_triton(folder) as second:
        yield [first, second]


@contextmanager
def one_limit_learned(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts that one line says what the model takes: a limit that is forgotten is learned again."""
    with caplog.at_level(logging.WARNING, "beam_triton"):
        yield
    lines = [record.getMessage() for record in caplog.records if "elements fail" in record.getMessage()]
    assert len(lines) == 1, lines
    assert "batches of 64 elements fail, 32 pass" in lines[0]


@pytest.mark.parametrize("timeout_seconds", [3.0, 30.0])
def test_slow_model_behind_connections_that_go_silent(
    fleet: list[LocalTriton], timeout_seconds: float
) -> None:
    """The short deadline passes before ten times what answers usually take, the long one after."""
    server, elements = fleet[0], 500
    batches = -(-elements // 32)
    before = executed(server, SLOW.name)
    with ConnectionProxy(port(server)) as proxy:

        def meanwhile(progress: Progress) -> None:
            progress.wait_until(lambda: executed(server, SLOW.name) >= before + batches // 2)
            proxy.hole()

        transform = TritonInference(proxy.endpoint, SLOW.name, timeout_seconds=timeout_seconds)
        run = run_numbered(transform, elements, meanwhile=meanwhile)
    # One or two are in flight.
    assert 1 <= run.counters["retries"] <= 4
    assert run.counters["requests"] <= batches + 4
    assert executed(server, SLOW.name) <= before + batches + 4
    silent_seconds = min(timeout_seconds, 10 * 2 * 0.3)
    assert run.seconds < BEAM_SECONDS + 1.5 * batches * 0.3 + 1.5 * silent_seconds


def test_replica_that_joins_a_model_short_of_memory(
    fleet: list[LocalTriton], caplog: pytest.LogCaptureFixture
) -> None:
    """It gets its share, in batches of the size that the first one has taught."""
    elements = 16_000
    with ConnectionProxy(port(fleet[0])) as proxy, one_limit_learned(caplog):
        shares = Shares(fleet, SHORT_OF_MEMORY.name)

        def meanwhile(progress: Progress) -> None:
            progress.reached(elements // 5)
            proxy.add(port(fleet[1]))
            progress.reached(elements * 3 // 5)
            shares.start()

        transform = TritonInference(
            proxy.endpoint, SHORT_OF_MEMORY.name, pool={"max_age_seconds": 1.5, "max_idle": 32}
        )
        run = run_numbered(transform, elements, meanwhile=meanwhile)
    assert 0.3 < shares.second() < 0.7
    assert run.counters.get("retries", 0) == 0
    # The batches that were formed before, and a trial now and then.
    assert run.counters["split_batches"] <= 36
    assert failed(fleet[1], SHORT_OF_MEMORY.name) <= 2
    alone_seconds = elements / 32 * 0.02
    assert run.seconds < BEAM_SECONDS + 1.5 * alone_seconds


def test_connections_go_silent_while_a_size_is_being_learned(
    fleet: list[LocalTriton], caplog: pytest.LogCaptureFixture
) -> None:
    """The server has answered with errors only so far; that is no reason to give the silent batch up."""
    elements, server = 2_000, fleet[0]
    before = failed(server, SLOWER_AND_SHORT.name)
    with ConnectionProxy(port(server)) as proxy, one_limit_learned(caplog):

        def meanwhile(progress: Progress) -> None:
            progress.wait_until(lambda: failed(server, SLOWER_AND_SHORT.name) >= before + 8)
            assert failed(server, SLOWER_AND_SHORT.name) < before + 30
            proxy.hole()

        transform = TritonInference(proxy.endpoint, SLOWER_AND_SHORT.name, timeout_seconds=1.0)
        run = run_numbered(transform, elements, meanwhile=meanwhile)
    assert run.counters["retries"] > 0
    assert run.seconds < BEAM_SECONDS + 32 * 0.05 + 2 * elements / 32 * 0.05 + 2 * 1.0


def test_fleet_short_of_memory_moves_while_connections_go_silent(
    fleet: list[LocalTriton], caplog: pytest.LogCaptureFixture
) -> None:
    """A replica leaves with requests in flight and joins again; all connections go silent twice."""
    elements = 10_000
    first, second = fleet
    refused_before: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(one_limit_learned(caplog))
        pod = stack.enter_context(ExitStack())
        leaving = pod.enter_context(ConnectionProxy(port(second)))
        proxy = stack.enter_context(ConnectionProxy(port(first), leaving.port))
        shares = Shares(fleet, SLOWER_AND_SHORT.name)

        def meanwhile(progress: Progress) -> None:
            assert progress.reached(elements // 4)
            proxy.remove(leaving.port)
            pod.close()
            assert progress.reached(elements // 2)
            proxy.hole()
            assert progress.reached(elements * 3 // 5)
            refused_before.append(failed(second, SLOWER_AND_SHORT.name))
            proxy.add(port(second))
            proxy.hole()
            shares.start()

        run = run_numbered(
            TritonInference(proxy.endpoint, SLOWER_AND_SHORT.name), elements, meanwhile=meanwhile
        )
    assert run.counters["retries"] > 0
    # Few requests are left by then, and an odd number of connections.
    assert 0.2 < shares.second() < 0.8
    assert run.counters["split_batches"] <= 36
    assert failed(second, SLOWER_AND_SHORT.name) <= refused_before[0] + 2
    batches = elements / 32
    assert run.counters["requests"] < 1.15 * batches + 36
    # 32 batches are refused one after the other before one fits.
    learning_seconds = 32 * 0.05
    alone_seconds = batches * 0.05 / 2
    assert run.seconds < BEAM_SECONDS + learning_seconds + 1.5 * alone_seconds + 2 * 3.0
