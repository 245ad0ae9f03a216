"""Servers that join and leave, behind a balancer of connections and behind a name with several addresses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from beam_triton import TritonClient, TritonInference
from beam_triton.testing import LocalTriton
from tests.support.connection_proxy import ConnectionProxy
from tests.support.executions import Shares, port
from tests.support.models import sleeping, throwaway_triton
from tests.support.names import resolving
from tests.support.numbered_run import Progress, run_numbered

MODEL = sleeping("remote", 0.02, instances=4)
ELEMENTS = 40_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LocalTriton]]:
    """Two servers with the same model."""
    folder = tmp_path_factory.mktemp("fleet")
    MODEL.write(folder)
    with throwaway_triton(folder) as first, throwaway_triton(folder) as second:
        yield [first, second]


def test_replica_that_joins_a_balancer_gets_its_share(fleet: list[LocalTriton]) -> None:
    """Connections are renewed at their age, so that a balancer of connections can use the new server."""
    shares = Shares(fleet, MODEL.name)
    with ConnectionProxy(port(fleet[0])) as proxy:

        def meanwhile(progress: Progress) -> None:
            progress.reached(ELEMENTS // 5)
            proxy.add(port(fleet[1]))
            progress.reached(ELEMENTS * 3 // 5)
            assert shares.second() > 0
            shares.start()

        transform = TritonInference(proxy.endpoint, MODEL.name, pool={"max_age_seconds": 1.5, "max_idle": 32})
        run = run_numbered(transform, ELEMENTS, meanwhile=meanwhile)
    assert 0.3 < shares.second() < 0.7
    assert run.counters.get("retries", 0) == 0
    # At most one for each connection in half of its age.
    assert run.counters["connections_opened"] < 32 * (1 + run.seconds / 0.75)


def test_few_requests_reach_every_server_behind_a_balancer(fleet: list[LocalTriton]) -> None:
    """A single request at a time goes round all connections of an earlier burst."""
    with ConnectionProxy(*map(port, fleet)) as proxy, TritonClient(proxy.endpoint) as client:
        for _ in range(5):
            client.infer(MODEL.name, {"x": np.zeros((20 * 32, 1), np.float32)})
        shares = Shares(fleet, MODEL.name)
        for _ in range(60):
            client.infer(MODEL.name, {"x": np.zeros((1, 1), np.float32)})
    assert 0.3 < shares.second() < 0.7


def test_addresses_of_a_name_come_and_go_in_mid_run(fleet: list[LocalTriton]) -> None:
    """One is killed with requests in flight and leaves the name later; another joins and has its share."""
    shares = Shares(fleet, MODEL.name)
    late_shares: list[float] = []
    with ExitStack() as stack:
        first = stack.enter_context(ConnectionProxy(port(fleet[0]), host="127.0.0.2"))
        pod = stack.enter_context(ExitStack())
        pod.enter_context(ConnectionProxy(port(fleet[1]), host="127.0.0.3", port=first.port))
        joining = stack.enter_context(ConnectionProxy(port(fleet[1]), host="127.0.0.4", port=first.port))
        names = {"triton": ["127.0.0.2", "127.0.0.3"]}
        stack.enter_context(resolving(names))

        def meanwhile(progress: Progress) -> None:
            progress.reached(ELEMENTS // 5)
            late_shares.append(shares.second())
            pod.close()
            progress.reached(ELEMENTS * 2 // 5)
            names["triton"] = ["127.0.0.2"]
            shares.start()
            progress.reached(ELEMENTS * 3 // 5)
            late_shares.append(shares.second())
            names["triton"] = ["127.0.0.2", "127.0.0.4"]
            progress.reached(ELEMENTS * 7 // 10)
            shares.start()

        transform = TritonInference(
            f"http://triton:{first.port}", MODEL.name, discovery="dns", discovery_interval_seconds=0.3
        )
        run = run_numbered(transform, ELEMENTS, meanwhile=meanwhile)
        assert joining.connections[port(fleet[1])] > 0
    with_both, with_first = late_shares
    assert 0.3 < with_both < 0.7
    assert with_first == 0
    assert 0.3 < shares.second() < 0.7
    assert run.counters["retries"] > 0
    assert "failures" not in run.counters
