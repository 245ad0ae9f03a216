"""DoFns and clients come and go, on any thread and in any order, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from beam_triton import ModelSpec, TensorSpec, TritonClient, TritonInference, TritonInferenceDoFn
from beam_triton.dispatch.channel import ENDPOINT_SETS
from beam_triton.errors import TritonError
from beam_triton.testing import LocalTriton
from beam_triton.transport.session import SESSIONS
from tests.support import faults, sockets
from tests.support.answers import Answer, forward_to
from tests.support.fault_server import FaultServer, infer_requests, serve
from tests.support.numbered_run import MODEL, run_numbered

CYCLES = 10_000
X = np.arange(6, dtype=np.float32).reshape(2, 3)
IMPATIENT: dict[str, Any] = {
    "timeout_seconds": 1.0,
    "pool": {"connect_timeout_seconds": 0.9},
    "retry": {"max_retries": 0},
    "circuit_breaker": {"when_open": "fail"},
}


def port_of(triton: LocalTriton) -> int:
    return int(triton.endpoint.rpartition(":")[2])


@pytest.fixture
def nothing_of_ours_left(triton: LocalTriton) -> Iterator[None]:
    """After the test: no session, no thread of the library, and nobody connected to the server."""
    assert len(SESSIONS) == len(ENDPOINT_SETS) == 0
    yield
    gc.collect()
    assert len(SESSIONS) == len(ENDPOINT_SETS) == 0
    assert sockets.settles(lambda: sockets.established(port_of(triton)), 0) == 0
    assert sockets.settles(lambda: len(own_threads()), 0) == 0, own_threads()


@pytest.fixture
def nothing_left(triton: LocalTriton, nothing_of_ours_left: None) -> Iterator[None]:
    """After the test also: as many threads and sockets as before, whoever made them.

    Not for tests that run a pipeline: Beam keeps some of its own.
    """
    # A thread keeps the two sockets that wake it from its first new connection on.
    with TritonClient(triton.endpoint, pool={"reuse_enabled": False}) as client:
        assert ask(client)
    gc.collect()
    threads, open_sockets = sockets.threads(), sockets.open_sockets()
    yield
    gc.collect()
    assert sockets.settles(lambda: len(sockets.threads()), len(threads)) == len(threads), sockets.threads()
    assert sockets.settles(sockets.open_sockets, open_sockets) == open_sockets


def own_threads() -> list[str]:
    return [name for name in sockets.threads() if name.startswith("beam_triton")]


def ask(client: TritonClient) -> bool:
    return bool(np.array_equal(client.infer(MODEL, {"x": X}).outputs["y"], X))


def live(dofn: TritonInferenceDoFn, number: int) -> None:
    """One DoFn's life, good or bad; what it raises is its own."""
    way = number % 6
    try:
        if way == 0:
            dofn.setup()
            dofn.teardown()
        elif way == 1:
            dofn.setup()
            dofn.teardown()
            dofn.teardown()
        elif way == 2:
            dofn.teardown()
        elif way == 3:
            dofn.setup()
            dofn.start_bundle()
            dofn.teardown()
        elif way == 4:
            dofn.setup()
            dofn.setup()
            dofn.teardown()
        else:
            dofn.setup()
            other_thread = threading.Thread(target=dofn.teardown)
            other_thread.start()
            other_thread.join()
    except TritonError:
        dofn.teardown()


@pytest.mark.usefixtures("nothing_left")
def test_ten_thousand_cycles(triton: LocalTriton) -> None:
    """10,000 setups and teardowns on four threads, some failing, some twice, some never set up.

    One in ten asks the server for its model, one in ten finds no server, and the others know the model.
    """
    asking = pickle.dumps(TritonInferenceDoFn(triton.endpoint, MODEL, **IMPATIENT))
    spec = ModelSpec(
        MODEL,
        "1",
        inputs=(TensorSpec("x", "FP32", (-1,)),),
        outputs=(TensorSpec("y", "FP32", (-1,)),),
        max_batch_size=64,
    )
    knowing = pickle.dumps(TritonInferenceDoFn(triton.endpoint, MODEL, model_spec=spec, **IMPATIENT))
    with faults.refusing_port() as port, ThreadPoolExecutor(4) as threads:
        hasty = IMPATIENT | {"timeout_seconds": 0.1, "pool": {"connect_timeout_seconds": 0.09}}
        bad = pickle.dumps(TritonInferenceDoFn(f"http://127.0.0.1:{port}", MODEL, **hasty))

        def cycle(number: int) -> None:
            kind = {0: bad, 1: asking}.get(number % 10, knowing)
            live(pickle.loads(kind), number // 10)

        for _ in threads.map(cycle, range(CYCLES), chunksize=100):
            pass


@pytest.mark.usefixtures("nothing_left")
def test_a_teardown_beside_requests_of_others(triton: LocalTriton) -> None:
    """While one client works, others come and go with the same configuration and disturb nothing."""
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            with TritonClient(triton.endpoint) as passing:
                assert ask(passing)

    with TritonClient(triton.endpoint) as staying, ThreadPoolExecutor(3) as threads:
        passing = [threads.submit(come_and_go) for _ in range(3)]
        try:
            assert all(ask(staying) for _ in range(300))
        finally:
            stop.set()
        for each in passing:
            each.result()


@pytest.mark.usefixtures("nothing_left")
def test_a_dofn_that_is_never_torn_down(triton: LocalTriton) -> None:
    """A DoFn that Beam forgets, as after a sibling's failed setup, gives its reference back as garbage."""
    for _ in range(10):
        dofn = TritonInferenceDoFn(triton.endpoint, MODEL)
        dofn.setup()
        del dofn
        gc.collect()


@pytest.mark.usefixtures("nothing_left")
def test_failing_requests_leave_nothing(triton: LocalTriton) -> None:
    """Clients whose every request fails, in ways that end connections, are gone as others are."""
    script = [faults.reset_after_reading, faults.truncated_body(1), faults.answered(Answer(500))] * 100
    for _ in range(20):
        with FaultServer(forward_to(port_of(triton)), script) as proxy:
            with TritonClient(proxy.endpoint, **IMPATIENT) as client:
                for _ in range(10):
                    with pytest.raises(TritonError):
                        ask(client)
            assert sockets.settles(lambda: proxy.open_now, 0) == 0


@pytest.mark.usefixtures("nothing_left")
def test_a_closed_client_says_so(triton: LocalTriton) -> None:
    """A client after ``close`` raises an error of this library, and closing again does nothing."""
    client = TritonClient(triton.endpoint)
    assert ask(client)
    client.close()
    client.close()
    with pytest.raises(TritonError):
        ask(client)


@pytest.mark.usefixtures("nothing_of_ours_left")
def test_a_failed_pipeline_leaves_nothing(triton: LocalTriton) -> None:
    """A run that fails in mid-bundle closes what it opened."""
    with pytest.raises(Exception, match="elsewhere"):
        run_numbered(TritonInference(triton.endpoint, "elsewhere"), 5000)


def forked(work: Any) -> int:
    """The exit status of a child that does ``work``: 0 when it returned True; a hanging one is ended."""
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            signal.alarm(10)
            status = 0 if work() else 1
        except BaseException:
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("nothing_left")
def test_a_forked_child_uses_its_own_connections(triton: LocalTriton) -> None:
    """Parent and child go on with the same client, and never on the same connection."""
    with FaultServer(forward_to(port_of(triton))) as proxy, TritonClient(proxy.endpoint) as client:
        assert ask(client)
        opened = proxy.opened
        assert forked(lambda: ask(client) and ask(client)) == 0
        assert proxy.opened == opened + 1
        assert ask(client)
        assert proxy.opened == opened + 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("nothing_left")
def test_a_fork_while_all_slots_are_taken(triton: LocalTriton) -> None:
    """What other threads hold at the moment of a fork, slots and connections, is free in the child."""
    limits: dict[str, Any] = {"max_concurrent_requests": 4, "pool": {"max_total": 4, "max_idle": 4}}
    with (
        FaultServer(forward_to(port_of(triton)), when=infer_requests) as proxy,
        TritonClient(proxy.endpoint, **limits) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        assert ask(client)
        before = len(proxy.requests)
        proxy.play(faults.late(2.0))
        held = [threads.submit(ask, client) for _ in range(4)]
        assert sockets.settles(lambda: len(proxy.requests) - before, 4) == 4
        proxy.play(serve)
        status = forked(lambda: ask(client))
        assert all(each.result() for each in held)
        assert status == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("nothing_left")
def test_forks_beside_busy_threads(triton: LocalTriton) -> None:
    """A fork at any moment leaves a child that works: no lock stays taken by a thread that it has not got."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert ask(client)

    with TritonClient(triton.endpoint) as client, ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work) for _ in range(4)]
        try:
            for _ in range(15):
                assert forked(lambda: ask(client)) == 0
        finally:
            stop.set()
        for each in working:
            each.result()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("nothing_left")
def test_a_child_that_closes_leaves_the_parents_connections(triton: LocalTriton) -> None:
    """A child's ``close`` takes nothing from its parent."""
    with FaultServer(forward_to(port_of(triton))) as proxy, TritonClient(proxy.endpoint) as client:
        assert ask(client)
        opened = proxy.opened

        def close_in_child() -> bool:
            client.close()
            return True

        assert forked(close_in_child) == 0
        assert ask(client)
        assert proxy.opened == opened


@pytest.mark.usefixtures("nothing_of_ours_left")
@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_a_run_leaves_nothing_in_this_process(triton: LocalTriton, mode: str) -> None:
    """After a run its connections, threads and sessions are gone."""
    run_numbered(
        TritonInference(triton.endpoint, MODEL),
        20_000,
        options=[f"--direct_running_mode={mode}", "--direct_num_workers=2"],
        bundles=True,
    )


@pytest.mark.usefixtures("nothing_of_ours_left")
def test_a_run_in_several_processes(triton: LocalTriton) -> None:
    """Each process of the multi-processing runner has its own pool, and none outlives the run."""
    run_numbered(
        TritonInference(triton.endpoint, MODEL),
        20_000,
        options=["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
        bundles=True,
    )


@pytest.mark.usefixtures("nothing_left")
def test_idle_connections_go_when_their_time_is_over(triton: LocalTriton) -> None:
    """``keep_alive_seconds`` after the last request no connection is left, though the client is."""
    with TritonClient(triton.endpoint, pool={"keep_alive_seconds": 0.5}) as client:
        assert ask(client)
        assert sockets.established(port_of(triton)) == 1
        time.sleep(0.2)
        assert sockets.established(port_of(triton)) == 1
        assert sockets.settles(lambda: sockets.established(port_of(triton)), 0, within_seconds=2.0) == 0
        assert ask(client)


def test_pickled_transforms_work(triton: LocalTriton) -> None:
    """A transform is the same after pickling, before and after its first use."""
    transform = TritonInference(triton.endpoint, MODEL)
    for _ in range(2):
        transform = pickle.loads(pickle.dumps(transform))
        run_numbered(transform, 500)
