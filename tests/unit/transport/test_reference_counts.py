"""Reference counts: on any thread, in any process, and from the garbage collector."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable

import pytest

from beam_triton.transport.reference_counts import Lease, SharedObjects


class Thing:
    """A shared object that counts how often it was closed."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def make_registry(make: Callable[[str], Thing] = Thing) -> SharedObjects[str, Thing]:
    return SharedObjects("thing", make, Thing.close, first_and_last_level=logging.INFO)


def in_child(work: Callable[[], bool]) -> int:
    """The exit status of a forked child that runs ``work``: 0 for True."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            signal.alarm(10)
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_equal_keys_share_a_value() -> None:
    """Other keys have their own."""
    registry = make_registry()
    first, second, other = registry.acquire("a"), registry.acquire("a"), registry.acquire("b")
    assert first.value is second.value is not other.value
    assert (registry.reference_count("a"), registry.reference_count("b"), len(registry)) == (2, 1, 2)


def test_last_release_closes_the_value() -> None:
    """It is closed once, and created again for the next reference: 1, 0, 1."""
    registry = make_registry()
    first, second = registry.acquire("a"), registry.acquire("a")
    thing = first.value
    first.release()
    assert thing.closed == 0
    second.release()
    assert thing.closed == 1
    assert (registry.reference_count("a"), len(registry)) == (0, 0)
    assert registry.acquire("a").value is not thing


def test_second_release_does_nothing() -> None:
    """Releasing twice takes no reference from others."""
    registry = make_registry()
    first, second = registry.acquire("a"), registry.acquire("a")
    first.release()
    first.release()
    assert registry.reference_count("a") == 1
    assert second.value.closed == 0


def test_failed_creation_leaves_nothing() -> None:
    """The failure reaches the caller, and the next one tries again."""
    fails = True

    def make(key: str) -> Thing:
        if fails:
            raise ValueError("no")
        return Thing(key)

    registry = make_registry(make)
    with pytest.raises(ValueError, match="no"):
        registry.acquire("a")
    assert len(registry) == 0
    fails = False
    assert registry.acquire("a").value.key == "a"


def test_reference_counts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """After each change, at a higher level where a value is created or closed."""
    caplog.set_level(logging.DEBUG)
    registry = make_registry()
    leases = [registry.acquire("a"), registry.acquire("a")]
    for lease in leases:
        lease.release()
    logged = [(record.levelname, record.getMessage().split(": ")[1]) for record in caplog.records]
    assert logged == [
        ("INFO", "1 reference(s)"),
        ("DEBUG", "2 reference(s)"),
        ("DEBUG", "1 reference(s)"),
        ("INFO", "0 reference(s)"),
    ]


def test_threads_never_see_a_closed_value() -> None:
    """Eight threads acquire and release without pause: no lease has a closed value, each is closed once."""
    made: list[Thing] = []

    def make(key: str) -> Thing:
        made.append(Thing(key))
        return made[-1]

    registry = make_registry(make)
    wrong: list[Thing] = []

    def work() -> None:
        for _ in range(2000):
            lease = registry.acquire("a")
            if lease.value.closed:
                wrong.append(lease.value)
            lease.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(registry) == 0
    assert all(thing.closed == 1 for thing in made)


class _Owner:
    """Holds a lease and is part of a cycle, so that only the garbage collector finalizes it."""

    def __init__(self, lease: Lease[Thing]) -> None:
        self.itself = self
        weakref.finalize(self, lease.release)


def test_release_from_the_garbage_collector_does_not_deadlock() -> None:
    """A collection during the registry's own work releases a reference without waiting for itself."""
    collect = False

    def make(key: str) -> Thing:
        if collect:
            gc.collect()
        return Thing(key)

    registry = make_registry(make)
    thing = registry.acquire("a").value
    _Owner(registry.acquire("b"))
    owned = registry.acquire("a")
    owned.release()
    collect = True
    done = threading.Event()

    def work() -> None:
        registry.acquire("c")
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(5), "the thread waits for a lock that it holds itself"
    assert registry.reference_count("b") == 0
    assert thing.closed == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_starts_without_values() -> None:
    """What the child acquires and releases is its own, and the parent keeps its values."""
    registry = make_registry()
    lease = registry.acquire("a")
    inherited = lease.value

    def work() -> bool:
        was_empty = len(registry) == 0 and registry.reference_count("a") == 0
        own = registry.acquire("a")
        thing = own.value
        own.release()
        return was_empty and thing is not inherited and thing.closed == 1

    assert in_child(work) == 0
    assert registry.reference_count("a") == 1
    assert lease.value.closed == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_lease_inherited_by_a_child_refers_to_the_childs_value() -> None:
    """Releasing it closes only the child's value."""
    registry = make_registry()
    lease, unused = registry.acquire("a"), registry.acquire("a")
    inherited = lease.value

    def work() -> bool:
        own = lease.value
        unused.release()
        counted = registry.reference_count("a") == 1 and own is lease.value
        lease.release()
        return own is not inherited and counted and own.closed == 1 and inherited.closed == 0

    assert in_child(work) == 0
    assert registry.reference_count("a") == 2
    assert lease.value is inherited and inherited.closed == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_holds_the_lock() -> None:
    """A lock that was held when the process forked does not block the child."""
    inside, leave = threading.Event(), threading.Event()

    def make(key: str) -> Thing:
        if key == "slow":
            inside.set()
            leave.wait(10)
        return Thing(key)

    registry = make_registry(make)
    thread = threading.Thread(target=lambda: registry.acquire("slow"))
    thread.start()
    assert inside.wait(5)
    try:
        assert in_child(lambda: registry.acquire("a").value.key == "a") == 0
    finally:
        leave.set()
        thread.join(5)
