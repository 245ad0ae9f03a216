"""The simulation of fleets: nothing is lost or made up in it, and its pool decides as the real one."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beam_triton.transport.config import ConnectionPoolConfig
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import AcquisitionState, ConnectionPool, PooledConnection
from benchmarks.cases.case import SMOKE, Case
from benchmarks.cases.fleet import EVENTS_CASE, SETTINGS_CASE, SIZES_CASE
from benchmarks.charts import draw
from benchmarks.fleet import Event, Fleet, _Connection, _Connections, _Server, simulate
from tests.support.clock import FakeClock
from tests.support.socket_pair_connections import Opener

FLEETS = {
    "two with two": Fleet(2, 2, seconds=5.0),
    "a balanced URL": Fleet(4, 2, is_balanced=True, seconds=5.0),
    "a server is lost": Fleet(4, 3, seconds=6.0, events=[Event(3.0, "lost")]),
    "a server vanishes": Fleet(4, 3, seconds=6.0, events=[Event(3.0, "vanished")]),
    "a server is added": Fleet(4, 3, seconds=6.0, discovery_seconds=1.0, events=[Event(3.0, "added", 2)]),
    "short queues": Fleet(8, 1, seconds=5.0, max_queue_size=4),
    "a few requests": Fleet(4, 2, seconds=5.0, requests_per_second=5.0, bundle_requests=3),
}


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_every_request_ends_once(fleet: Fleet) -> None:
    """What was started has ended or is in flight; servers execute no more than they can."""
    outcome = simulate(fleet)
    assert outcome.started == len(outcome.ended) + outcome.unfinished
    assert outcome.errors == Counter()
    executed = sum(outcome.executed.values())
    assert len(outcome.ended) <= executed - outcome.wasted
    assert 0 < executed <= fleet.capacity * fleet.seconds * 1.05


def test_same_fleet_has_the_same_outcome() -> None:
    """All chance comes from the seed."""
    fleet = FLEETS["a server is lost"]
    assert simulate(fleet) == simulate(fleet)
    assert simulate(fleet).ended != simulate(Fleet(4, 3, seconds=6.0, seed=2)).ended


def test_few_requests_go_to_all_servers() -> None:
    """Processes that send one request at a time do not meet at the first server of the list."""
    outcome = simulate(Fleet(16, 4, seconds=10.0, options={"max_concurrent_requests": 1}))
    assert min(outcome.by_server[number] for number in range(4)) > 0.9 * max(outcome.by_server.values())
    assert outcome.rate(4.0, 10.0) > 0.8 * outcome.fleet.capacity


def test_many_processes_keep_queues_short() -> None:
    """Processes that outnumber the instances by three have a request or two each in flight, not one for each
    server."""
    fleet = Fleet(48, 4, seconds=40.0)
    outcome = simulate(fleet)
    assert outcome.rate(20.0, 40.0) > 0.95 * fleet.capacity
    assert outcome.latency(0.5, 20.0) < 8 * fleet.model_seconds


def test_lost_server_costs_its_share() -> None:
    """The others take what it had, no request fails, and few are sent twice."""
    fleet = Fleet(8, 4, seconds=20.0, events=[Event(10.0, "lost")])
    outcome = simulate(fleet)
    assert outcome.rate(12.0, 20.0) > 0.7 * fleet.capacity
    retries = sum(each.attempts - 1 for each in outcome.ended)
    assert 0 < retries < 0.1 * len(outcome.ended)


@pytest.mark.parametrize("max_age_seconds", [None, 30.0])
def test_pool_decides_as_the_real_one(max_age_seconds: float | None) -> None:
    """The same acquisitions and releases leave the same connections open, idle and waiting."""
    config = ConnectionPoolConfig(max_idle=3, max_total=5, max_per_host=3, max_age_seconds=max_age_seconds)
    clock, opener = FakeClock(), Opener()
    real = ConnectionPool(config, opener.open, clock)
    simulation: Any = SimpleNamespace(
        now=0.0,
        elapsed=0.0,
        random=random.Random(1),
        outcome=SimpleNamespace(most_connections=0, opened=Counter()),
    )
    simulated = _Connections(config, simulation)
    origins = [Origin("http", name, 80) for name in ("a.example", "b.example", "c.example")]
    server: Any = SimpleNamespace(connections=0, epoch=0, is_silent=False)
    generator = random.Random(2)
    taken: list[tuple[PooledConnection, Any]] = []
    try:
        for _ in range(200):
            if taken and (len(taken) == 3 or generator.random() < 0.5):
                mine, theirs = taken.pop(generator.randrange(len(taken)))
                real.release(mine)
                simulated.release(theirs)
            else:
                origin = generator.choice(origins)
                got: list[Any] = []
                attempt: Any = SimpleNamespace(
                    origin=origin, send_on=lambda connection, is_reused, got=got: got.append(connection)
                )
                attempt.connect = lambda attempt=attempt: _connect(simulated, attempt, server)
                simulated.acquire(attempt)
                acquisition = real.acquire(origin, 5.0, lambda: None)
                while acquisition.state is AcquisitionState.CONNECTING:
                    pass
                assert acquisition.connection is not None
                taken.append((acquisition.connection, got[0]))
            figures = real.statistics()
            assert (figures.idle, figures.active) == (simulated.idle, simulated.total - simulated.idle)
            assert figures.opened == sum(simulation.outcome.opened.values())
    finally:
        for mine, _ in taken:
            real.release(mine)
        real.close()
        opener.close()


def _connect(simulated: _Connections, attempt: Any, server: _Server) -> None:
    connection = _Connection(attempt.origin, server, 0, float("inf"))
    simulated.opened(connection)
    attempt.send_on(connection, is_reused=False)


@pytest.mark.parametrize("case", [SIZES_CASE, SETTINGS_CASE, EVENTS_CASE], ids=lambda case: case.name)
def test_case_gives_a_table_and_charts(case: Case, tmp_path: Path) -> None:
    """At the smallest scale: no request fails, and servers give no more than they can."""
    no_server: Any = None
    result = case.measure(no_server, 1, SMOKE)
    for row in result.rows:
        assert row.measured["lost"].median == 0.0, row.name
        rates = [taken.median for quantity, taken in row.measured.items() if quantity.startswith("rate")]
        assert rates and all(0.0 < rate < 1.2 for rate in rates), row.name
    assert len(draw([result], tmp_path)) == len(result.curves)
