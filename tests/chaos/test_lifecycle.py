"""DoFns and clients are created and closed on any thread and in any order, and leak nothing."""

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
def no_library_leaks(triton: LocalTriton) -> Iterator[None]:
    """After the test: no session, no thread of the library, and no connection to the server."""
    assert len(SESSIONS) == len(ENDPOINT_SETS) == 0
    yield
    gc.collect()
    assert len(SESSIONS) == len(ENDPOINT_SETS) == 0
    assert sockets.settles(lambda: sockets.established(port_of(triton)), 0) == 0
    assert sockets.settles(lambda: len(library_threads()), 0) == 0, library_threads()


@pytest.fixture
def no_leaks(triton: LocalTriton, no_library_leaks: None) -> Iterator[None]:
    """After the test also: as many threads and sockets as before, whoever created them.

    Not for tests that run a pipeline: Beam keeps some of its own.
    """
    # From its first new connection on, a thread keeps the two sockets that wake it.
    with TritonClient(triton.endpoint, pool={"reuse_enabled": False}) as client:
        assert echoes(client)
    gc.collect()
    threads, open_sockets = sockets.threads(), sockets.open_sockets()
    yield
    gc.collect()
    assert sockets.settles(lambda: len(sockets.threads()), len(threads)) == len(threads), sockets.threads()
    assert sockets.settles(sockets.open_sockets, open_sockets) == open_sockets


def library_threads() -> list[str]:
    return [name for name in sockets.threads() if name.startswith("beam_triton")]


def echoes(client: TritonClient) -> bool:
    return bool(np.array_equal(client.infer(MODEL, {"x": X}).outputs["y"], X))


def run_lifecycle(dofn: TritonInferenceDoFn, number: int) -> None:
    """Takes one DoFn through one of six lifecycles, good or bad; a library error is part of some."""
    variant = number % 6
    try:
        if variant == 0:
            dofn.setup()
            dofn.teardown()
        elif variant == 1:
            dofn.setup()
            dofn.teardown()
            dofn.teardown()
        elif variant == 2:
            dofn.teardown()
        elif variant == 3:
            dofn.setup()
            dofn.start_bundle()
            dofn.teardown()
        elif variant == 4:
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


@pytest.mark.usefixtures("no_leaks")
def test_ten_thousand_setups_and_teardowns_leak_nothing(triton: LocalTriton) -> None:
    """10,000 setups and teardowns on four threads: some fail, some happen twice, some have no setup.

    One in ten asks the server for its model, one in ten finds no server, and the others know the model.
    """
    asks_the_server = pickle.dumps(TritonInferenceDoFn(triton.endpoint, MODEL, **IMPATIENT))
    spec = ModelSpec(
        MODEL,
        "1",
        inputs=(TensorSpec("x", "FP32", (-1,)),),
        outputs=(TensorSpec("y", "FP32", (-1,)),),
        max_batch_size=64,
    )
    has_the_model_spec = pickle.dumps(
        TritonInferenceDoFn(triton.endpoint, MODEL, model_spec=spec, **IMPATIENT)
    )
    with faults.refusing_port() as port, ThreadPoolExecutor(4) as threads:
        short_timeouts = IMPATIENT | {"timeout_seconds": 0.1, "pool": {"connect_timeout_seconds": 0.09}}
        finds_no_server = pickle.dumps(
            TritonInferenceDoFn(f"http://127.0.0.1:{port}", MODEL, **short_timeouts)
        )

        def cycle(number: int) -> None:
            kind = {0: finds_no_server, 1: asks_the_server}.get(number % 10, has_the_model_spec)
            run_lifecycle(pickle.loads(kind), number // 10)

        for _ in threads.map(cycle, range(CYCLES), chunksize=100):
            pass


@pytest.mark.usefixtures("no_leaks")
def test_closing_a_client_does_not_disturb_others(triton: LocalTriton) -> None:
    """While one client works, others with the same configuration open and close."""
    stop = threading.Event()

    def open_and_close() -> None:
        while not stop.is_set():
            with TritonClient(triton.endpoint) as short_lived:
                assert echoes(short_lived)

    with TritonClient(triton.endpoint) as remaining, ThreadPoolExecutor(3) as threads:
        others = [threads.submit(open_and_close) for _ in range(3)]
        try:
            assert all(echoes(remaining) for _ in range(300))
        finally:
            stop.set()
        for each in others:
            each.result()


@pytest.mark.usefixtures("no_leaks")
def test_dofn_without_teardown_releases_its_session(triton: LocalTriton) -> None:
    """A DoFn that Beam drops, as after a sibling's failed setup, releases its reference as garbage."""
    for _ in range(10):
        dofn = TritonInferenceDoFn(triton.endpoint, MODEL)
        dofn.setup()
        del dofn
        gc.collect()


@pytest.mark.usefixtures("no_leaks")
def test_failing_requests_leak_nothing(triton: LocalTriton) -> None:
    """Clients whose requests all fail, in ways that end connections, leak nothing either."""
    script = [faults.reset_after_reading, faults.truncated_body(1), faults.answered(Answer(500))] * 100
    for _ in range(20):
        with FaultServer(forward_to(port_of(triton)), script) as proxy:
            with TritonClient(proxy.endpoint, **IMPATIENT) as client:
                for _ in range(10):
                    with pytest.raises(TritonError):
                        echoes(client)
            assert sockets.settles(lambda: proxy.open_now, 0) == 0


@pytest.mark.usefixtures("no_leaks")
def test_closed_client_raises_an_error(triton: LocalTriton) -> None:
    """A request after ``close`` raises an error of this library, and closing again does nothing."""
    client = TritonClient(triton.endpoint)
    assert echoes(client)
    client.close()
    client.close()
    with pytest.raises(TritonError):
        echoes(client)


@pytest.mark.usefixtures("no_library_leaks")
def test_failed_pipeline_leaks_nothing(triton: LocalTriton) -> None:
    """A run that fails closes what it opened."""
    with pytest.raises(Exception, match="elsewhere"):
        run_numbered(TritonInference(triton.endpoint, "elsewhere"), 5000)


def forked(work: Any) -> int:
    """The exit status of a child that runs ``work``: 0 when it returned True. A hanging child is ended."""
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
@pytest.mark.usefixtures("no_leaks")
def test_forked_child_uses_its_own_connections(triton: LocalTriton) -> None:
    """Parent and child continue with the same client, and never on the same connection."""
    with FaultServer(forward_to(port_of(triton))) as proxy, TritonClient(proxy.endpoint) as client:
        assert echoes(client)
        opened = proxy.opened
        assert forked(lambda: echoes(client) and echoes(client)) == 0
        assert proxy.opened == opened + 1
        assert echoes(client)
        assert proxy.opened == opened + 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("no_leaks")
def test_forked_child_has_all_slots_and_connections_free(triton: LocalTriton) -> None:
    """Slots and connections that other threads hold at the moment of a fork are free in the child."""
    limits: dict[str, Any] = {"max_concurrent_requests": 4, "pool": {"max_total": 4, "max_idle": 4}}
    with (
        FaultServer(forward_to(port_of(triton)), when=infer_requests) as proxy,
        TritonClient(proxy.endpoint, **limits) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        assert echoes(client)
        before = len(proxy.requests)
        proxy.play(faults.late(2.0))
        held = [threads.submit(echoes, client) for _ in range(4)]
        # All four have slots; the limit of requests in flight lets fewer through so early.
        assert sockets.settles(lambda: len(proxy.requests) - before >= 2, True)
        proxy.play(serve)
        status = forked(lambda: echoes(client))
        assert all(each.result() for each in held)
        assert status == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("no_leaks")
def test_fork_beside_busy_threads_leaves_no_lock_held(triton: LocalTriton) -> None:
    """After a fork at any moment the child works: no lock stays held by a thread that it does not have."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert echoes(client)

    with TritonClient(triton.endpoint) as client, ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work) for _ in range(4)]
        try:
            for _ in range(15):
                assert forked(lambda: echoes(client)) == 0
        finally:
            stop.set()
        for each in working:
            each.result()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("no_leaks")
def test_closing_in_a_forked_child_keeps_the_parents_connections(triton: LocalTriton) -> None:
    """A child's ``close`` takes nothing from its parent."""
    with FaultServer(forward_to(port_of(triton))) as proxy, TritonClient(proxy.endpoint) as client:
        assert echoes(client)
        opened = proxy.opened

        def close_in_child() -> bool:
            client.close()
            return True

        assert forked(close_in_child) == 0
        assert echoes(client)
        assert proxy.opened == opened


@pytest.mark.usefixtures("no_library_leaks")
@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_pipeline_run_leaks_nothing(triton: LocalTriton, mode: str) -> None:
    """After a run its connections, threads and sessions are gone."""
    run_numbered(
        TritonInference(triton.endpoint, MODEL),
        20_000,
        options=[f"--direct_running_mode={mode}", "--direct_num_workers=2"],
        bundles=True,
    )


@pytest.mark.usefixtures("no_library_leaks")
def test_multi_processing_run_leaks_nothing(triton: LocalTriton) -> None:
    """Each process of the multi-processing runner has its own pool, and no connection outlives the run."""
    run_numbered(
        TritonInference(triton.endpoint, MODEL),
        20_000,
        options=["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
        bundles=True,
    )


@pytest.mark.usefixtures("no_leaks")
def test_idle_connections_are_closed_after_keep_alive_seconds(triton: LocalTriton) -> None:
    """``keep_alive_seconds`` after the last request no connection is left, though the client is open."""
    with TritonClient(triton.endpoint, pool={"keep_alive_seconds": 0.5}) as client:
        assert echoes(client)
        assert sockets.established(port_of(triton)) == 1
        time.sleep(0.2)
        assert sockets.established(port_of(triton)) == 1
        assert sockets.settles(lambda: sockets.established(port_of(triton)), 0, within_seconds=2.0) == 0
        assert echoes(client)


def test_pickled_transforms_work(triton: LocalTriton) -> None:
    """A transform works after pickling, before and after its first use."""
    transform = TritonInference(triton.endpoint, MODEL)
    for _ in range(2):
        transform = pickle.loads(pickle.dumps(transform))
        run_numbered(transform, 500)
