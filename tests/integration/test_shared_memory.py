"""Large tensors in shared memory, on a real Triton: what goes that way, and that results stay as they are."""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints.batch import NumpyArray

from beam_triton import (
    DeadlineExceededError,
    ServerUnavailableError,
    SharedMemoryError,
    TritonBatchInference,
    TritonClient,
    TritonInference,
)
from beam_triton.dispatch import shared_memory
from beam_triton.protocol import region_layout
from beam_triton.testing import LocalTriton
from tests.support.answers import Answer, Request, forward_to
from tests.support.executions import port
from tests.support.fault_server import FaultServer
from tests.support.models import DATATYPES
from tests.support.pipelines import run, score
from tests.support.shared_memory import files_of_regions, registered_regions

WIDTH = 20_000


def large(number: int, rows: int = 2) -> Any:
    return np.full((rows, WIDTH), number, np.float32) + np.arange(WIDTH, dtype=np.float32)


def until_shared(client: TritonClient, infer: Callable[[], Any], endpoint: str) -> None:
    """Ask until a region is registered; the requests before go by HTTP."""
    deadline = time.monotonic() + 10
    while not registered_regions(endpoint):
        assert time.monotonic() < deadline
        infer()
        time.sleep(0.02)


def lies_in_region(array: Any) -> bool:
    """Whether an array is a view of shared memory; those of answers and of copies have other bases."""
    return isinstance(getattr(array.base, "base", None), mmap.mmap)


def until_view(client: TritonClient, number: int = 0, rows: int = 2) -> Any:
    """Ask until the result lies in shared memory."""
    for _ in range(500):
        array = client.infer("echo_variable", {"x": large(number, rows)}).outputs["y"]
        if lies_in_region(array):
            return array
        del array
        time.sleep(0.01)
    raise AssertionError("no result in shared memory")


@pytest.fixture
def client(triton: LocalTriton) -> Iterator[TritonClient]:
    with TritonClient(triton.endpoint) as client:
        yield client
    assert registered_regions(triton.endpoint) == []
    assert files_of_regions() == []


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beam_triton.protocol.request.LEAST_SHARED_BYTES", 0)
    monkeypatch.setattr(region_layout, "LEAST_SHARED_BYTES", 0)


def test_large_tensors_go_through_shared_memory(triton: LocalTriton) -> None:
    """With no option set, from the second request or so on; the body is then some hundred bytes of JSON."""
    transform = TritonInference(triton.endpoint, "echo_variable", batching={"max_batch_size": 4})
    scored = run(
        lambda pipeline: pipeline | beam.Create(range(1000)) | beam.Map(lambda n: large(n)[0]) | transform
    )
    assert sorted(result.example[0] for result in scored.results) == list(range(1000))
    for result in scored.results:
        assert np.array_equal(result.inference["y"], result.example)
    assert scored.counters["shared_memory_requests"] >= 10
    assert registered_regions(triton.endpoint) == []


def test_small_tensors_and_never_go_by_http(triton: LocalTriton) -> None:
    small = score([large(1)[0][:50]] * 100, TritonInference(triton.endpoint, "echo_variable"))
    assert "shared_memory_requests" not in small.counters
    never = TritonInference(triton.endpoint, "echo_variable", shared_memory="never")
    assert "shared_memory_requests" not in score([large(1)[0]] * 20, never).counters


def test_results_that_are_kept_never_change(client: TritonClient, triton: LocalTriton) -> None:
    """Each has its own memory as long as anything refers to it: 200 results, all kept, read at the end."""
    until_shared(client, lambda: client.infer("echo_variable", {"x": large(0)}), triton.endpoint)

    def scored(number: int) -> Any:
        return client.infer("echo_variable", {"x": large(number)}).outputs["y"][1]

    with ThreadPoolExecutor(8) as threads:
        kept = list(threads.map(scored, range(200)))
    for number, row in enumerate(kept):
        assert np.array_equal(row, large(number)[1]), number


def test_results_are_copied_where_kept_ones_hold_half_of_the_memory(
    client: TritonClient, triton: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept cannot use up the regions: requests go on through the others."""
    monkeypatch.setattr(shared_memory, "MOST_BYTES", 4_000_000)
    kept = []
    for number in range(60):
        kept.append(client.infer("echo_variable", {"x": large(number)}).outputs["y"])
        time.sleep(0.005)
    regions = registered_regions(triton.endpoint)
    assert 2 <= len(regions) <= 4_000_000 // 320_000
    for number, array in enumerate(kept):
        assert np.array_equal(array, large(number)), number
    # Those that own their memory were copied.
    assert sum(isinstance(array.base, bytearray) for array in kept) > 40


def test_every_datatype(client: TritonClient, triton: LocalTriton, everything_is_large: None) -> None:
    """BYTES inputs lie in the region; BYTES outputs, whose size is not known before, come in the answer."""
    inputs: dict[str, Any] = {
        f"x_{datatype.lower()}": np.arange(1, 7).reshape(2, 3).astype(_dtype(datatype))
        for datatype in DATATYPES
    }
    inputs["x_bytes"] = np.array([[b"a", b"", b"ccc"], [b"\0", b"%d", b"f" * 300]], object)
    expected = client.infer("every_datatype", inputs).outputs
    outputs = dict(expected)
    for _ in range(500):
        if lies_in_region(outputs["y_fp32"]):
            break
        outputs = {}
        outputs = client.infer("every_datatype", inputs).outputs
        time.sleep(0.01)
    assert outputs.keys() == expected.keys()
    for name, array in outputs.items():
        assert array.dtype == expected[name].dtype
        assert np.array_equal(array, expected[name]), name
        assert lies_in_region(array) == (name not in ("y_bytes", "y_bf16")), name


def test_an_empty_input_beside_a_large_one(client: TritonClient) -> None:
    """Triton refuses a place of no bytes: such requests go by HTTP."""
    until_view(client)
    inputs: dict[str, Any] = {
        f"x_{datatype.lower()}": np.empty((2, 0), _dtype(datatype)) for datatype in DATATYPES
    }
    inputs["x_fp32"] = large(5)
    for _ in range(20):
        outputs = client.infer("every_datatype", inputs).outputs
        assert np.array_equal(outputs["y_fp32"], large(5))
        assert outputs["y_int8"].shape == (2, 0)
        time.sleep(0.01)


def _dtype(datatype: str) -> Any:
    names = {"BYTES": object, "BOOL": bool, "BF16": np.float32, "FP16": np.float16}
    return names.get(datatype) or np.dtype(datatype.lower().replace("fp", "float"))


def test_an_output_that_outgrows_its_place_comes_in_the_answer(
    client: TritonClient, triton: LocalTriton, everything_is_large: None
) -> None:
    """The size of an output without fixed dimensions is that of earlier answers, until one is larger."""

    def zeros(count: int) -> Any:
        return client.infer("zeros", {"count": np.array([[count]], np.int32)}).outputs["y"]

    until_shared(client, lambda: zeros(10), triton.endpoint)
    assert zeros(10).shape == (1, 10)
    for count in (5000, 7, 9000):
        assert zeros(count).shape == (1, count)


def test_a_request_that_got_no_answer_leaves_its_region(
    client: TritonClient, triton: LocalTriton, everything_is_large: None
) -> None:
    """The server may write into it later: no other request may use it until then, or ever."""

    def slow(seconds: float, value: TritonClient) -> Any:
        return value.infer("slow", {"x": np.array([[seconds]], np.float32)}).outputs["y"][0, 0]

    with TritonClient(triton.endpoint, timeout_seconds=0.4, retry={"max_retries": 0}) as hasty:
        until_shared(hasty, lambda: slow(0.0, hasty), triton.endpoint)
        before = registered_regions(triton.endpoint)
        for _ in range(2):
            with pytest.raises(DeadlineExceededError):
                slow(1.0, hasty)
        answers = []
        for _ in range(40):
            answers.append(slow(0.01, hasty))
            time.sleep(0.03)
        assert set(answers) == {np.float32(0.01)}
        # The server keeps one registered for as long as a request uses it.
        assert set(registered_regions(triton.endpoint)) - set(before)


def _refuses(triton: LocalTriton, answer: Answer) -> Callable[[Request], Answer]:
    forward = forward_to(port(triton))
    return lambda request: answer if "/systemsharedmemory/" in request.target else forward(request)


def test_a_server_that_refuses_is_asked_once_and_gets_http(
    triton: LocalTriton, caplog: pytest.LogCaptureFixture
) -> None:
    """As Triton does since 2.69 unless it is told otherwise; the log says so once, with the reason."""
    reason = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
    refusal = Answer(501, json.dumps({"error": reason}).encode())
    with FaultServer(_refuses(triton, refusal)) as server, TritonClient(server.endpoint) as client:
        for number in range(20):
            assert np.array_equal(
                client.infer("echo_variable", {"x": large(number)}).outputs["y"], large(number)
            )
            time.sleep(0.01)
        asked = [request for request in server.requests if "/systemsharedmemory/region" in request.target]
    assert len(asked) == 1
    told = [record for record in caplog.records if "by HTTP" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert reason in told[0].getMessage()


def test_a_server_on_another_machine_is_never_asked(
    triton: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "is_loopback", lambda host: False)
    with FaultServer(forward_to(port(triton))) as server:
        for mode, is_asked in (("auto", False), ("always", True)):
            server.requests.clear()
            with TritonClient(server.endpoint, shared_memory=mode) as client:
                for number in range(10):
                    client.infer("echo_variable", {"x": large(number)})
                    time.sleep(0.02)
            targets = [request.target for request in server.requests]
            assert any("/systemsharedmemory/" in target for target in targets) == is_asked


def test_no_memory_means_http(
    client: TritonClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Docker gives a container 64 MiB of shared memory."""
    monkeypatch.setattr(shared_memory, "_free_bytes", lambda: 100_000)
    for number in range(5):
        assert np.array_equal(client.infer("echo_variable", {"x": large(number)}).outputs["y"], large(number))
        time.sleep(0.02)
    assert [r.levelname for r in caplog.records if "/dev/shm has no room" in r.getMessage()] == ["WARNING"]


def test_numpy_batches_and_rows(triton: LocalTriton) -> None:
    """The other ways into the transforms use it, too."""
    numbered = beam.Map(lambda number: np.full(128, number, np.float32))
    arrays = numbered.with_output_types(NumpyArray[np.float32, (128,)])
    transform = TritonBatchInference(triton.endpoint, "echo")
    batches = run(lambda pipeline: pipeline | beam.Create(range(20_000)) | arrays | transform)
    assert sorted(row[-1] for row in batches.results) == list(range(20_000))
    assert batches.counters["shared_memory_requests"] > 0
    given = [beam.Row(id=number, x=large(number)[0].tolist()) for number in range(200)]
    rows = score(given, TritonInference(triton.endpoint, "echo_variable", output="row"))
    assert [row.id for row in rows.results] == [row.y[0] for row in rows.results]
    assert rows.counters["shared_memory_requests"] > 0


def test_worker_processes_share_a_server(triton: LocalTriton) -> None:
    """Two SDK processes: their regions never have the same name, and none is left."""
    options = PipelineOptions(["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
    pipeline = TestPipeline(runner="FnApiRunner", options=options)
    right = (
        pipeline
        | beam.Create(range(400))
        | beam.Map(lambda number: large(number)[0])
        | TritonInference(triton.endpoint, "echo_variable", batching={"max_batch_size": 4})
        | beam.Map(lambda result: np.array_equal(result.example, result.inference["y"]))
        | beam.combiners.Count.PerElement()
    )
    assert_that(right, equal_to([(True, 400)]))
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(MetricsFilter().with_name("shared_memory_requests"))["counters"]
    assert sum(counter.result for counter in counters) > 0
    assert files_of_regions() == []


def _infer_in_child(endpoint: str, client: TritonClient, right: Any) -> None:
    for number in range(30):
        right.put(
            np.array_equal(client.infer("echo_variable", {"x": large(number)}).outputs["y"], large(number))
        )
        time.sleep(0.005)
    right.put(len(registered_regions(endpoint)))


def test_a_forked_child_has_regions_of_its_own(client: TritonClient, triton: LocalTriton) -> None:
    """It may not write into those of its parent."""
    until_shared(client, lambda: client.infer("echo_variable", {"x": large(0)}), triton.endpoint)
    context = multiprocessing.get_context("fork")
    right = context.Queue()
    child = context.Process(target=_infer_in_child, args=(triton.endpoint, client, right))
    child.start()
    for number in range(100, 160):
        assert np.array_equal(client.infer("echo_variable", {"x": large(number)}).outputs["y"], large(number))
    assert [right.get(timeout=20) for _ in range(30)] == [True] * 30
    assert right.get(timeout=20) >= 2
    child.join(20)
    # What the child has left registered goes with the next process that tidies up.
    client.close()
    assert len(registered_regions(triton.endpoint)) == 1
    with TritonClient(triton.endpoint) as another:
        for _ in range(5):
            another.infer("echo_variable", {"x": large(0)})
            time.sleep(0.05)


def test_a_forked_child_keeps_the_results_that_it_inherits(client: TritonClient, triton: LocalTriton) -> None:
    """The parent drops them, and does not know what the child still reads: it leaves their region."""
    kept = until_view(client, 7)
    context = multiprocessing.get_context("fork")
    may_read, is_right = context.Event(), context.Queue()

    def read(array: Any) -> None:
        may_read.wait(20)
        is_right.put(np.array_equal(array, large(7)))

    child = context.Process(target=read, args=(kept,))
    child.start()
    del kept
    for number in range(100, 130):
        client.infer("echo_variable", {"x": large(number)})
    may_read.set()
    assert is_right.get(timeout=20)
    child.join(20)


def test_a_region_that_a_proxy_gave_up_is_not_used_again(
    triton: LocalTriton, everything_is_large: None
) -> None:
    """The server goes on with a request that its proxy has answered with 504, and writes the outputs."""
    forward = forward_to(port(triton))
    is_impatient = threading.Event()

    def proxy(request: Request) -> Answer:
        if is_impatient.is_set() and request.target.endswith("/infer"):
            is_impatient.clear()
            threading.Thread(target=forward_to(port(triton)), args=(request,)).start()
            time.sleep(0.1)
            return Answer(504, b"<html>Gateway Time-out</html>")
        return forward(request)

    def slow(seconds: float) -> Any:
        return hasty.infer("slow", {"x": np.array([[seconds]], np.float32)}).outputs["y"]

    with (
        FaultServer(proxy) as server,
        TritonClient(server.endpoint, retry={"max_retries": 0}, circuit_breaker=None) as hasty,
    ):
        until_shared(hasty, lambda: slow(0.0), triton.endpoint)
        is_impatient.set()
        with pytest.raises(ServerUnavailableError):
            slow(0.7)
        kept = [slow(0.0) for _ in range(5)]
        time.sleep(1.2)
        assert [array[0, 0] for array in kept] == [0.0] * 5


def test_a_server_that_forgets_its_regions_and_says_so_with_400_gets_new_ones(triton: LocalTriton) -> None:
    """Triton up to 2.41 answers 400 where later ones answer 404."""
    forward = forward_to(port(triton))

    def old(request: Request) -> Answer:
        answer = forward(request)
        return dataclasses.replace(answer, status=400) if answer.status == 404 else answer

    with FaultServer(old) as server, TritonClient(server.endpoint) as client:
        until_view(client)
        forward(Request(0, "POST", "/v2/systemsharedmemory/unregister", []))
        assert registered_regions(triton.endpoint) == []
        assert np.array_equal(until_view(client, 3), large(3))


def test_a_server_that_misses_a_region_that_no_request_names_is_not_asked_for_ever(
    triton: LocalTriton,
) -> None:
    forward = forward_to(port(triton))
    refusal = Answer(404, b'{"error":"Unable to find shared memory region: \'other\'"}')

    def origin(request: Request) -> Answer:
        return refusal if refuses.is_set() and request.target.endswith("/infer") else forward(request)

    refuses = threading.Event()
    with FaultServer(origin) as server, TritonClient(server.endpoint, timeout_seconds=2) as client:
        until_view(client)
        refuses.set()
        server.requests.clear()
        with pytest.raises(SharedMemoryError):
            client.infer("echo_variable", {"x": large(0)})
        assert sum(request.target.endswith("/infer") for request in server.requests) == 2


def test_a_request_that_finds_no_room_leaves_smaller_regions_alone(
    client: TritonClient, triton: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would make too little room for it, and the next small request needs them."""
    monkeypatch.setattr(shared_memory, "MOST_BYTES", 4_000_000)

    def scored(rows: int) -> Any:
        return client.infer("echo_variable", {"x": large(1, rows)}).outputs["y"]

    until_view(client, 1)
    kept = until_view(client, 1, 9)
    until_view(client, 1)
    scored(16)
    assert lies_in_region(scored(2))
    assert np.array_equal(kept, large(1, 9))


def test_clients_with_different_pools_leave_no_region(triton: LocalTriton) -> None:
    """They share the regions: those that one has made are unregistered by the one that is closed last."""

    def until_registered(client: TritonClient, rows: int, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(registered_regions(triton.endpoint)) < count:
            assert time.monotonic() < deadline
            client.infer("echo_variable", {"x": large(0, rows)})
            time.sleep(0.02)

    last = TritonClient(triton.endpoint)
    first = TritonClient(triton.endpoint, pool={"keep_alive_seconds": 77})
    until_registered(last, 2, 1)
    until_registered(first, 9, 2)
    first.close()
    last.close()
    assert registered_regions(triton.endpoint) == []
