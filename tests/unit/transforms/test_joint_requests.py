"""Last batches of several bundles share a request while the server is busy, and only a request."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import InvalidRequestError, TritonClient, TritonInferenceDoFn
from beam_triton.dispatch.endpoints import EndpointSet
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.pipelines import bundle_of

BUSY, POISON = -1.0, -2.0


class GatedModel:
    """Doubles; requests with `BUSY` are held until `release`, those with `POISON` are refused."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[float]] = []

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        values = inputs["x"][:, 0].tolist()
        self.batches.append(values)
        if BUSY in values:
            assert self.gate.wait(20)
        if POISON in values:
            raise InvalidRequestError("poison", status=400)
        return {"y": 2 * inputs["x"]}


class Busy:
    """A server that is executing a request, and as many bundles as wanted that wait for it."""

    def __init__(self, triton: FakeTriton, model: GatedModel, **options: Any) -> None:
        self.model = model
        self._dofn = TritonInferenceDoFn(triton.endpoint, "m", with_exception_handling=True, **options)
        self._pool = ThreadPoolExecutor(32)
        self.first = self.start([BUSY])
        wait_until(lambda: bool(model.batches))
        self._endpoints = endpoints_of(triton)

    def start(self, values: list[float], dofn: Any = None) -> Future[list[Any]]:
        """Run a bundle on a thread of its own, on a copy of the DoFn; gives its outputs."""
        return self._pool.submit(run_bundle, pickle.dumps(dofn or self._dofn), values)

    def start_all(self, bundles: list[list[float]]) -> list[Future[list[Any]]]:
        """Start bundles, and wait until all of them wait for the server."""
        started = [self.start(values) for values in bundles]
        self.wait_for(len(bundles))
        return started

    def wait_for(self, count: int) -> None:
        """Wait until so many bundles wait for the server."""
        wait_until_waiting(self._endpoints, count)

    def release(self) -> None:
        self.model.gate.set()


def endpoints_of(triton: FakeTriton) -> EndpointSet:
    """What all DoFns of this process have in common, for as long as one of them is open."""
    with TritonClient(triton.endpoint) as client:
        model = client.open_model("m")
        model.close()
        return model.channel.endpoints


def wait_until_waiting(endpoints: EndpointSet, count: int) -> None:
    """Wait until so many calls that may share a request wait for an admission."""
    waiting = endpoints.joinable_calls._waiting
    wait_until(lambda: sum(map(len, list(waiting.values()))) == count)


def run_bundle(pickled: bytes, values: list[float]) -> list[Any]:
    with bundle_of(pickle.loads(pickled)) as dofn:
        outputs = [output for value in values for output in dofn.process(None, windowed(value))]
        return [*outputs, *dofn.finish_bundle()]


def windowed(value: float) -> WindowedValue:
    return WindowedValue(np.full(2, value, np.float32), 0, (GlobalWindow(),))


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def one_at_a_time(seconds: float) -> FakeModel:
    """A model of one instance that takes so long."""
    instance = threading.Lock()

    def double(inputs: dict[str, Any]) -> dict[str, Any]:
        with instance:
            time.sleep(seconds)
        return {"y": 2 * inputs["x"]}

    return FakeModel(double, inputs={"x": ("FP32", [2])}, outputs={"y": ("FP32", [2])}, max_batch_size=16)


def results_of(outputs: list[Any]) -> list[float]:
    return [output.value.inference["y"][0].item() for output in outputs if isinstance(output, WindowedValue)]


def failures_of(outputs: list[Any]) -> list[float]:
    return [output.value.value[0][0].item() for output in outputs if not isinstance(output, WindowedValue)]


@pytest.fixture
def model() -> GatedModel:
    return GatedModel()


@pytest.fixture
def triton(model: GatedModel) -> Iterator[FakeTriton]:
    served = FakeModel(model, inputs={"x": ("FP32", [2])}, outputs={"y": ("FP32", [2])}, max_batch_size=16)
    with FakeTriton({"m": served}) as triton:
        yield triton
        model.gate.set()


def test_bundles_that_wait_share_one_request(triton: FakeTriton, model: GatedModel) -> None:
    """Each gets the results of its own elements, in its own order."""
    busy = Busy(triton, model)
    started = busy.start_all([[10.0 * number, 10.0 * number + 1] for number in range(1, 6)])
    busy.release()
    assert [results_of(each.result(20)) for each in started] == [
        [20.0 * number, 20.0 * number + 2] for number in range(1, 6)
    ]
    assert [len(batch) for batch in model.batches] == [1, 10]


def test_a_joint_request_holds_no_more_than_a_batch(triton: FakeTriton, model: GatedModel) -> None:
    """What does not fit goes with the next one."""
    busy = Busy(triton, model, batching={"max_batch_size": 4})
    started = busy.start_all([[float(number)] * 3 for number in range(1, 4)] + [[9.0]])
    busy.release()
    wait(started, 20)
    assert [len(each.result()) for each in started] == [3, 3, 3, 1]
    assert all(len(batch) <= 4 for batch in model.batches)


def test_an_idle_server_is_sent_to_at_once(triton: FakeTriton, model: GatedModel) -> None:
    """One bundle after another: a request each, and no waiting for company."""
    dofn = pickle.dumps(TritonInferenceDoFn(triton.endpoint, "m"))
    for number in range(3):
        assert results_of(run_bundle(dofn, [float(number)])) == [2.0 * number]
    assert model.batches == [[0.0], [1.0], [2.0]]


def test_a_bad_element_is_its_own_bundles_failure_only(triton: FakeTriton, model: GatedModel) -> None:
    """The other bundles of the joint request are sent by themselves, and get their results."""
    busy = Busy(triton, model)
    started = busy.start_all([[1.0, 2.0], [3.0, POISON, 4.0], [5.0]])
    busy.release()
    outputs = [each.result(20) for each in started]
    assert [sorted(results_of(each)) for each in outputs] == [[2.0, 4.0], [6.0, 8.0], [10.0]]
    assert [failures_of(each) for each in outputs] == [[], [POISON], []]


def test_a_lost_joint_request_fails_no_bundle(triton: FakeTriton, model: GatedModel) -> None:
    """Each bundle sends its elements again, by itself."""
    busy = Busy(triton, model)
    started = busy.start_all([[1.0], [2.0], [3.0]])
    triton.drop_next(1)
    busy.release()
    assert [results_of(each.result(20)) for each in started] == [[2.0], [4.0], [6.0]]


def test_a_cancelled_bundle_leaves_the_others_alone() -> None:
    """Whether it waits, or has sent the joint request for all."""
    with FakeTriton({"m": one_at_a_time(0.3)}) as slow:
        dofn = TritonInferenceDoFn(slow.endpoint, "m", timeout_seconds=20)
        pool = ThreadPoolExecutor(8)
        first = pool.submit(run_bundle, pickle.dumps(dofn), [1.0])
        wait_until(lambda: bool(slow.requests))

        def cancelled(after_seconds: float) -> None:
            mine = pickle.loads(pickle.dumps(dofn))
            with bundle_of(mine) as copy:
                list(copy.process(None, windowed(7.0)))
                copy._scorer.send_buffered()
                give_up_at = time.monotonic() + after_seconds
                while time.monotonic() < give_up_at:
                    copy._scorer._sender.step()
                    time.sleep(0.001)

        cancels = [pool.submit(cancelled, seconds) for seconds in (0.1, 0.4)]
        others = [pool.submit(run_bundle, pickle.dumps(dofn), [float(number)]) for number in (2, 3, 4)]
        assert [results_of(each.result(20)) for each in (first, *others)] == [[2.0], [4.0], [6.0], [8.0]]
        wait(cancels, 20)


def test_dofns_with_other_options_share_nothing(triton: FakeTriton, model: GatedModel) -> None:
    """Their requests may carry other parameters or credentials."""
    busy = Busy(triton, model)
    other = TritonInferenceDoFn(triton.endpoint, "m", request_parameters={"tenant": "b"})
    started = [busy.start([1.0]), busy.start([2.0], other)]
    busy.wait_for(2)
    busy.release()
    assert [results_of(each.result(20)) for each in started] == [[2.0], [4.0]]
    assert sorted(model.batches) == [[BUSY], [1.0], [2.0]]


def test_padded_elements_share_a_request_within_a_bucket() -> None:
    """Each answer is cut to its own element; beyond the last boundary, requests are a bundle's own."""
    gate = threading.Event()
    shapes: list[tuple[int, ...]] = []

    def double(inputs: dict[str, Any]) -> dict[str, Any]:
        shapes.append(inputs["x"].shape)
        assert len(shapes) > 1 or gate.wait(20)
        return {"y": 2 * inputs["x"]}

    served = FakeModel(double, inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])}, max_batch_size=16)
    with FakeTriton({"m": served}) as triton, ThreadPoolExecutor(8) as pool:
        dofn = TritonInferenceDoFn(triton.endpoint, "m", batching={"bucket_boundaries": [4, 8], "pad": 0})

        def outputs_of(length: int) -> list[Any]:
            with bundle_of(pickle.loads(pickle.dumps(dofn))) as copy:
                element = WindowedValue(np.ones(length, np.float32), 0, (GlobalWindow(),))
                outputs = [*copy.process(None, element), *copy.finish_bundle()]
            return [output.value.inference["y"].tolist() for output in outputs]

        first = pool.submit(outputs_of, 1)
        wait_until(lambda: bool(shapes))
        endpoints = endpoints_of(triton)
        started = {length: pool.submit(outputs_of, length) for length in (2, 3, 4)}
        wait_until_waiting(endpoints, 3)
        started |= {length: pool.submit(outputs_of, length) for length in (9, 11)}
        gate.set()
        assert first.result(20) == [[2.0]]
        for length, done in started.items():
            assert done.result(20) == [[2.0] * length]
    assert (3, 4) in shapes
    assert {(1, 9), (1, 11)} <= set(shapes)


def test_many_threads_lose_nothing() -> None:
    """Sixteen threads with bundles of one to four elements: each element's own result, in fewer requests."""
    with FakeTriton({"m": one_at_a_time(0.01)}) as triton:
        dofn = pickle.dumps(TritonInferenceDoFn(triton.endpoint, "m"))

        def work(thread: int) -> None:
            for number in range(20):
                values = [float(thread * 100 + number + 2000 * each) for each in range(1 + number % 4)]
                assert results_of(run_bundle(dofn, values)) == [2 * value for value in values]

        with ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(work, thread) for thread in range(16)]:
                done.result()
    assert len(triton.requests) < 16 * 20 / 2
