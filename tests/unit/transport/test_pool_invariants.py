"""Any operations in any order: limits hold, no capacity is lost, no request waits while there is room."""

from __future__ import annotations

import random
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from beam_triton.errors import ConnectError
from beam_triton.transport.config import ConnectionPoolConfig
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import Acquisition, AcquisitionState, ConnectionPool, PooledConnection
from tests.support.clock import FakeClock
from tests.support.socket_pair_connections import Opener

ORIGINS = [Origin("http", name, 80) for name in ("a", "b", "c")]
CONFIG = ConnectionPoolConfig(
    max_total=4, max_per_host=2, max_idle=3, keep_alive_seconds=10.0, max_age_seconds=15.0
)
ORIGIN = st.sampled_from(ORIGINS)
PICK = st.randoms(use_true_random=False)


class PoolMachine(RuleBasedStateMachine):
    """A pool whose connections open, fail and are cancelled at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.opener = Opener(by_hand=True)
        self.pool = ConnectionPool(CONFIG, self.opener.open, self.clock)
        self.asks = 0
        self.asked: list[Acquisition] = []
        self.held: list[PooledConnection] = []

    @rule(origin=ORIGIN)
    def ask(self, origin: Origin) -> None:
        # A timeout of its own, by which `end_an_opening` knows it again.
        self.asks += 1
        self.asked.append(self.pool.acquire(origin, 1.0 + self.asks / 1000, lambda: None))

    @rule(origin=ORIGIN)
    def take_idle(self, origin: Origin) -> None:
        connection = self.pool.take_idle(origin)
        if connection is not None:
            assert connection.origin == origin
            self.held.append(connection)

    @precondition(lambda self: self.opener.pending)
    @rule(pick=PICK, succeeds=st.booleans())
    def end_an_opening(self, pick: random.Random, succeeds: bool) -> None:
        # In the order in which they were asked for; that of their threads differs from run to run.
        opening = pick.choice(sorted(self.opener.pending, key=lambda each: each.timeout_seconds))
        if succeeds:
            opening.succeed()
        else:
            opening.fail(ConnectError("refused"))

    @precondition(lambda self: self.asked)
    @rule(pick=PICK)
    def cancel(self, pick: random.Random) -> None:
        acquisition = pick.choice(self.asked)
        self.asked.remove(acquisition)
        self.pool.cancel(acquisition)

    @precondition(lambda self: self.held)
    @rule(pick=PICK, reusable=st.booleans())
    def give_back(self, pick: random.Random, reusable: bool) -> None:
        connection = pick.choice(self.held)
        self.held.remove(connection)
        if reusable:
            self.pool.release(connection)
        else:
            self.pool.discard(connection)

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]), evicts=st.booleans())
    def time_passes(self, seconds: float, evicts: bool) -> None:
        self.clock.advance(seconds)
        if evicts:
            self.pool.close_expired()

    @rule(pick=PICK)
    def a_server_hangs_up(self, pick: random.Random) -> None:
        peers = list(self.opener.peers.values())
        if peers:
            pick.choice(peers).close()

    @invariant()
    def limits_hold_and_nothing_is_lost(self) -> None:
        for acquisition in list(self.asked):
            if acquisition.state is AcquisitionState.READY:
                assert acquisition.connection is not None
                assert acquisition.connection.origin == acquisition.origin
                self.held.append(acquisition.connection)
                self.asked.remove(acquisition)
            elif acquisition.state is AcquisitionState.FAILED:
                self.asked.remove(acquisition)
        statistics = self.pool.statistics()
        assert len({id(connection) for connection in self.held}) == len(self.held)
        assert statistics.idle <= CONFIG.max_idle
        assert statistics.idle + statistics.active <= CONFIG.max_total
        # Only connections in use and connections being opened count against the limit.
        connecting = statistics.active - len(self.held)
        assert self.opener.until_pending(connecting), (statistics, len(self.held), self.opener.pending)
        waiting = [each for each in self.asked if each.state is AcquisitionState.WAITING]
        assert statistics.waiting == len(waiting)
        in_use = [connection.origin for connection in self.held]
        in_use += [opening.origin for opening in self.opener.pending]
        for origin in ORIGINS:
            assert in_use.count(origin) <= 2
            states = [each.state for each in self.asked if each.origin == origin]
            assert states == sorted(states, key=lambda state: state is AcquisitionState.WAITING), "overtaken"
        for acquisition in waiting:
            is_full = statistics.active == CONFIG.max_total
            assert is_full or in_use.count(acquisition.origin) >= 2, "a request waits although there is room"

    def teardown(self) -> None:
        self.pool.close()
        while self.opener.pending:
            self.opener.pending[0].fail(ConnectError("over"))
        for connection in self.held:
            self.pool.release(connection)
        for acquisition in self.asked:
            self.pool.cancel(acquisition)
        deadline = time.monotonic() + 5
        while self.pool.statistics().active and time.monotonic() < deadline:
            time.sleep(0.01)
        statistics = self.pool.statistics()
        assert (statistics.idle, statistics.active, statistics.waiting) == (0, 0, 0)
        self.opener.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
