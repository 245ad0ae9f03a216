"""The pool, with connections that are socket pairs and a clock that the test moves."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from beam_triton.errors import ConfigurationError, ConnectError, TritonError
from beam_triton.transport.config import ConnectionPoolConfig
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import Acquisition, AcquisitionState, ConnectionPool, PooledConnection
from tests.support.clock import FakeClock
from tests.support.socket_pair_connections import Opener, PairedConnection

A = Origin("http", "a.example", 80)
B = Origin("http", "b.example", 80)
PATIENCE_SECONDS = 5


class Bench:
    """A pool and what the test controls it with."""

    def __init__(self, *, by_hand: bool = False, **limits: Any) -> None:
        self.clock = FakeClock()
        self.opener = Opener(by_hand=by_hand)
        self.pool = ConnectionPool(ConnectionPoolConfig(**limits), self.opener.open, self.clock)
        self._events: dict[int, threading.Event] = {}

    def ask(self, origin: Origin = A, on_wake: Callable[[], None] | None = None) -> Acquisition:
        event = threading.Event()

        def wake() -> None:
            event.set()
            if on_wake is not None:
                on_wake()

        acquisition = self.pool.acquire(origin, 5.0, wake)
        self._events[id(acquisition)] = event
        return acquisition

    def settled(self, acquisition: Acquisition) -> Acquisition:
        """Waits for the acquisition's wake-up, unless it is ready already."""
        if acquisition.state is not AcquisitionState.READY:
            assert self._events[id(acquisition)].wait(PATIENCE_SECONDS), acquisition.state
        return acquisition

    def take(self, origin: Origin = A) -> PooledConnection:
        connection = self.settled(self.ask(origin)).connection
        assert connection is not None
        return connection

    def figures(self) -> tuple[int, int, int]:
        statistics = self.pool.statistics()
        return statistics.idle, statistics.active, statistics.waiting


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**limits: Any) -> Bench:
        made.append(Bench(**limits))
        return made[-1]

    yield make
    for each in made:
        each.opener.close()
        each.pool.close()


def is_closed(connection: PooledConnection) -> bool:
    return connection.sock.fileno() == -1


def test_released_connection_is_reused(bench: Callable[..., Bench]) -> None:
    """The second request to an origin uses the connection of the first."""
    b = bench()
    first = b.take()
    b.pool.release(first)
    assert b.take() is first
    statistics = b.pool.statistics()
    assert (statistics.opened, statistics.reused, statistics.waited) == (1, 1, 0)


def test_longest_idle_connection_is_reused_first(bench: Callable[..., Bench]) -> None:
    """Few requests in flight spread over all connections, and so over the servers behind a balancer."""
    b = bench()
    connections = [b.take() for _ in range(3)]
    for connection in connections:
        b.pool.release(connection)
    for connection in connections * 2:
        assert b.take() is connection
        b.pool.release(connection)


def test_most_recently_used_connection_is_reused_first_without_an_age(bench: Callable[..., Bench]) -> None:
    """Nothing but idle eviction closes surplus connections then, so these must become idle."""
    b = bench(max_age_seconds=None)
    connections = [b.take() for _ in range(3)]
    for connection in connections:
        b.pool.release(connection)
    assert [b.take() for _ in range(3)] == connections[::-1]


def test_connection_is_closed_at_its_age_between_two_requests(bench: Callable[..., Bench]) -> None:
    """Never within one, and it takes no further one."""
    b = bench(max_age_seconds=10.0)
    connection = b.take()
    b.clock.advance(100)
    assert not is_closed(connection)
    b.pool.release(connection)
    assert is_closed(connection)
    assert b.figures() == (0, 0, 0)


def test_idle_connection_is_closed_at_its_age(bench: Callable[..., Bench]) -> None:
    """It is not handed out any more, and eviction closes it, when it says."""
    b = bench(max_age_seconds=10.0)
    used, evicted = b.take(), b.take()
    used.ages_at, evicted.ages_at = b.clock() + 6, b.clock() + 8
    b.pool.release(used)
    b.pool.release(evicted)
    assert b.pool.close_expired() == 6
    b.clock.advance(6)
    assert b.take() is evicted
    b.pool.release(evicted)
    assert b.pool.close_expired() == 2
    assert is_closed(used) and not is_closed(evicted)
    b.clock.advance(2)
    assert b.pool.close_expired() == 10
    assert is_closed(evicted)
    assert b.pool.statistics().expired == 2


def test_connections_of_one_moment_age_at_different_times(bench: Callable[..., Bench]) -> None:
    """Between half of ``max_age_seconds`` and all of it: they are not all renewed at once."""
    b = bench(max_age_seconds=10.0)
    ages = sorted(b.take().ages_at - b.clock() for _ in range(50))
    assert 5 <= ages[0] < 6 and 9 < ages[-1] <= 10
    assert bench(max_age_seconds=None).take().ages_at == math.inf


def test_pool_shrinks_to_what_few_requests_need(bench: Callable[..., Bench]) -> None:
    """Although all connections are used in turn, those of a burst are gone at their age."""
    b = bench(max_age_seconds=10.0)
    burst = [b.take() for _ in range(12)]
    for connection in burst:
        b.pool.release(connection)
    for _ in range(100):
        b.clock.advance(0.1)
        connections = b.take(), b.take()
        for connection in connections:
            b.pool.release(connection)
    assert all(is_closed(connection) for connection in burst)
    assert b.figures() == (2, 0, 0)
    assert b.pool.statistics().opened == 14


def test_connections_are_not_shared_between_origins(bench: Callable[..., Bench]) -> None:
    """A connection serves only its own scheme, host and port."""
    b = bench()
    b.pool.release(b.take(A))
    assert b.take(B).origin == B
    assert b.pool.take_idle(Origin("https", A.host, A.port)) is None
    assert b.figures() == (1, 1, 0)


def test_requests_beyond_max_total_wait_in_order(bench: Callable[..., Bench]) -> None:
    """They are served in the order in which they came."""
    b = bench(max_total=2, max_idle=2)
    first, second = b.take(), b.take()
    third, fourth = b.ask(), b.ask()
    assert third.state is fourth.state is AcquisitionState.WAITING
    assert third.waited and fourth.waited
    b.pool.release(second)
    assert b.settled(third).connection is second
    assert fourth.state is AcquisitionState.WAITING
    b.pool.release(first)
    assert b.settled(fourth).connection is first
    assert len(b.opener.opened) == 2


def test_max_per_host_delays_only_its_own_host(bench: Callable[..., Bench]) -> None:
    """A host at its limit delays neither other hosts nor requests behind it in the queue."""
    b = bench(max_total=3, max_idle=3, max_per_host=1)
    held = b.take(A)
    waiting = b.ask(A)
    assert b.take(B).origin == B
    assert waiting.state is AcquisitionState.WAITING
    b.pool.release(held)
    assert b.settled(waiting).connection is held


def test_idle_connection_is_closed_for_another_host(bench: Callable[..., Bench]) -> None:
    """At ``max_total`` the longest idle connection is closed when another host needs one."""
    b = bench(max_total=2, max_idle=2)
    old, young = b.take(A), b.take(A)
    b.pool.release(old)
    b.pool.release(young)
    b.take(B)
    assert is_closed(old) and not is_closed(young)
    assert b.figures() == (1, 1, 0)


def test_max_idle_closes_the_longest_idle_connection(bench: Callable[..., Bench]) -> None:
    """A released connection beyond ``max_idle`` closes the longest idle one."""
    b = bench(max_total=3, max_idle=2)
    connections = [b.take() for _ in range(3)]
    for connection in connections:
        b.pool.release(connection)
    assert [is_closed(connection) for connection in connections] == [True, False, False]
    assert b.figures() == (2, 0, 0)


def test_eviction_closes_expired_connections(bench: Callable[..., Bench]) -> None:
    """To the second, and it says when the next eviction is due."""
    b = bench(keep_alive_seconds=10.0)
    old, young = b.take(), b.take()
    b.pool.release(old)
    b.clock.advance(4)
    b.pool.release(young)
    assert b.pool.close_expired() == 6
    b.clock.advance(6)
    assert b.pool.close_expired() == 4
    assert is_closed(old) and not is_closed(young)
    b.clock.advance(4)
    assert b.pool.close_expired() == 10
    assert b.pool.statistics().expired == 2


def test_expired_connection_is_not_reused(bench: Callable[..., Bench]) -> None:
    """An expired connection is not handed out, even before it is evicted."""
    b = bench(keep_alive_seconds=10.0)
    old = b.take()
    b.pool.release(old)
    b.clock.advance(10)
    assert b.take() is not old


def test_expired_connection_frees_its_host(bench: Callable[..., Bench]) -> None:
    """A request that waits at ``max_per_host`` behind an expired connection is served."""
    b = bench(keep_alive_seconds=10.0, max_per_host=1)
    b.pool.release(b.take())
    b.clock.advance(10)
    waiting = b.ask()
    b.pool.close_expired()
    assert b.settled(waiting).state is AcquisitionState.READY


@pytest.mark.parametrize("sign", ["end", "unasked bytes"])
def test_stale_connection_is_not_reused(bench: Callable[..., Bench], sign: str) -> None:
    """A connection that the server has closed, or sent unrequested bytes on, is closed."""
    b = bench()
    stale = b.take()
    b.pool.release(stale)
    peer = b.opener.peer(stale.connection)
    if sign == "end":
        peer.close()
    else:
        peer.sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    fresh = b.take()
    assert fresh is not stale and is_closed(stale)
    assert b.figures() == (0, 1, 0)
    assert b.pool.statistics().reused == 0


def test_reuse_disabled_opens_a_connection_per_request(bench: Callable[..., Bench]) -> None:
    """``reuse_enabled=False`` closes a connection when it is released."""
    b = bench(reuse_enabled=False)
    first = b.take()
    b.pool.release(first)
    assert is_closed(first)
    assert b.take() is not first
    assert b.figures() == (0, 1, 0)


def test_discarded_connection_makes_room_for_the_next_request(bench: Callable[..., Bench]) -> None:
    """The request that has waited longest gets a new connection."""
    b = bench(max_total=1, max_idle=1)
    held = b.take()
    waiting = b.ask()
    b.pool.discard(held)
    assert b.settled(waiting).connection is not held
    assert b.figures() == (0, 1, 0)


def test_connecting_counts_against_max_total(bench: Callable[..., Bench]) -> None:
    """A connection that is being opened counts already."""
    b = bench(by_hand=True, max_total=1, max_idle=1)
    connecting, waiting = b.ask(), b.ask()
    assert (connecting.state, waiting.state) == (AcquisitionState.CONNECTING, AcquisitionState.WAITING)
    assert b.opener.until_pending(1)
    b.opener.pending[0].succeed()
    assert b.settled(connecting).state is AcquisitionState.READY
    assert waiting.state is AcquisitionState.WAITING


def test_failed_connection_makes_room_for_the_next_request(bench: Callable[..., Bench]) -> None:
    """The request that could not connect gets the reason, and the next one may connect."""
    b = bench(by_hand=True, max_total=1, max_idle=1)
    failing, waiting = b.ask(), b.ask()
    assert b.opener.until_pending(1)
    b.opener.pending[0].fail(ConfigurationError("no such file"))
    assert b.settled(failing).state is AcquisitionState.FAILED
    assert isinstance(failing.error, ConfigurationError)
    assert b.opener.until_pending(1)
    assert waiting.state is AcquisitionState.CONNECTING
    b.opener.pending[0].fail(ValueError("label too long"))
    assert b.settled(waiting).state is AcquisitionState.FAILED
    assert isinstance(waiting.error, ConnectError)
    assert "a.example" in waiting.error.message and "label too long" in waiting.error.message
    assert b.figures() == (0, 0, 0)


def test_connecting_is_bounded_by_timeout_and_deadline(bench: Callable[..., Bench]) -> None:
    """The opener gets ``connect_timeout_seconds``, or the request's remaining time if that is shorter."""
    b = bench(by_hand=True, connect_timeout_seconds=3.0)
    b.ask()
    b.pool.acquire(A, 2.0, lambda: None)
    b.pool.acquire(A, -1.0, lambda: None)
    assert b.opener.until_pending(3)
    assert sorted(opening.timeout_seconds for opening in b.opener.pending) == [0.001, 2.0, 3.0]


def test_cancelled_acquisition_in_the_queue_is_skipped(bench: Callable[..., Bench]) -> None:
    """The next one in the queue gets the connection."""
    b = bench(max_total=1, max_idle=1)
    held = b.take()
    given_up, waiting = b.ask(), b.ask()
    b.pool.cancel(given_up)
    b.pool.cancel(given_up)
    b.pool.release(held)
    assert b.settled(waiting).connection is held
    assert given_up.state is AcquisitionState.CANCELLED and given_up.connection is None


@pytest.mark.parametrize("succeeds", [True, False])
def test_connection_of_a_cancelled_acquisition_goes_to_the_next_one(
    bench: Callable[..., Bench], succeeds: bool
) -> None:
    """If connecting fails, the next one may connect."""
    b = bench(by_hand=True, max_total=1, max_idle=1)
    given_up, waiting = b.ask(), b.ask()
    assert b.opener.until_pending(1)
    b.pool.cancel(given_up)
    opening = b.opener.pending[0]
    if succeeds:
        opening.succeed()
    else:
        opening.fail(ConnectError("refused"))
        assert b.opener.until_pending(1)
        b.opener.pending[0].succeed()
    assert b.settled(waiting).state is AcquisitionState.READY
    assert given_up.state is AcquisitionState.CANCELLED
    assert b.figures() == (0, 1, 0)


def test_cancelled_ready_acquisition_returns_its_connection(bench: Callable[..., Bench]) -> None:
    """A connection that was handed out, but not used, is idle again."""
    b = bench()
    acquisition = b.settled(b.ask())
    b.pool.cancel(acquisition)
    b.pool.cancel(acquisition)
    assert b.figures() == (1, 0, 0)


def test_cancel_between_decision_and_connecting_leaks_nothing(bench: Callable[..., Bench]) -> None:
    """An acquisition that is cancelled just as it may connect does not keep its share of the limit."""
    b = bench(max_total=1, max_idle=1)
    evicted = b.take(A)
    given_up = b.ask(B)
    assert given_up.state is AcquisitionState.WAITING
    assert isinstance(evicted.connection, PairedConnection)
    # The pool has already decided who connects next when it closes the evicted connection.
    evicted.connection.before_close = lambda: b.pool.cancel(given_up)
    b.pool.release(evicted)
    assert b.take() is not None
    assert b.figures() == (0, 1, 0)


def test_expired_connection_does_not_count_against_the_limits(bench: Callable[..., Bench]) -> None:
    """A request that it would delay opens a new connection at once, before the next eviction."""
    b = bench(keep_alive_seconds=10.0, max_per_host=1, max_total=1, max_idle=1)
    expired = b.take()
    b.pool.release(expired)
    b.clock.advance(10)
    fresh = b.take()
    assert fresh is not expired and is_closed(expired)
    assert b.pool.statistics().expired == 1
    assert b.figures() == (0, 1, 0)


def test_connecting_thread_that_cannot_start_fails_the_request(bench: Callable[..., Bench]) -> None:
    """Without a thread to connect on the request fails, and the next one may connect."""
    b = bench(max_total=1, max_idle=1)
    before = threading.stack_size()
    threading.stack_size(1 << 46)
    try:
        acquisition = b.settled(b.ask())
    finally:
        threading.stack_size(before)
    assert isinstance(acquisition.error, ConnectError)
    assert b.figures() == (0, 0, 0)
    assert b.take() is not None


def test_close_fails_waiting_requests(bench: Callable[..., Bench]) -> None:
    """``close`` closes idle connections, fails waiting requests, and closes active ones when released."""
    b = bench(max_total=2, max_idle=2)
    active, idle = b.take(A), b.take(A)
    b.pool.release(idle)
    held = b.take(B)
    waiting = b.ask(B)
    b.pool.close()
    assert b.settled(waiting).state is AcquisitionState.FAILED
    assert isinstance(waiting.error, ConnectError)
    b.pool.release(active)
    b.pool.discard(held)
    assert is_closed(idle) and is_closed(active) and is_closed(held)
    assert b.figures() == (0, 0, 0)
    with pytest.raises(ConnectError, match="closed"):
        b.ask()
    assert b.pool.take_idle(A) is None


@pytest.mark.parametrize("succeeds", [True, False])
@pytest.mark.parametrize("cancelled", [True, False])
def test_connection_opened_after_close_is_closed(
    bench: Callable[..., Bench], succeeds: bool, cancelled: bool
) -> None:
    """The request that it was opened for fails."""
    b = bench(by_hand=True)
    acquisition = b.ask()
    assert b.opener.until_pending(1)
    b.pool.close()
    if cancelled:
        b.pool.cancel(acquisition)
    opening = b.opener.pending[0]
    if succeeds:
        opening.succeed()
    else:
        opening.fail(ConnectError("refused"))
    if not cancelled:
        assert b.settled(acquisition).state is AcquisitionState.FAILED
        assert isinstance(acquisition.error, TritonError)
    assert b.figures() == (0, 0, 0)
    assert all(peer.recv(1) == b"" for peer in b.opener.peers.values())


def test_threads_share_few_connections_within_the_limit(bench: Callable[..., Bench]) -> None:
    """Sixteen threads on three connections: never more than three in use, and all are served."""
    b = bench(max_total=3, max_idle=2)
    in_use = most = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal in_use, most
        for turn in range(50):
            connection = b.take(A if turn % 3 else B)
            with lock:
                in_use += 1
                most = max(most, in_use)
            with lock:
                in_use -= 1
            (b.pool.discard if turn % 7 == 0 else b.pool.release)(connection)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert most <= 3
    idle, active, waiting = b.figures()
    assert (active, waiting) == (0, 0) and idle <= 2


def test_closed_connections_release_their_descriptors() -> None:
    """Every connection that the pool closes releases its descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    b = Bench(max_total=2, max_idle=1)
    connections = [b.take(), b.take()]
    for connection in connections:
        b.pool.release(connection)
    b.pool.close()
    b.opener.close()
    assert len(os.listdir("/proc/self/fd")) == before
