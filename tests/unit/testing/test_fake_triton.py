"""FakeTriton as a test's author uses it: models, faults, observations, stop and start.

That it answers as the real server does is tested in ``tests/integration/test_fake_triton_against_triton.py``.
"""

from __future__ import annotations

import functools
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from beam_triton import (
    ConfigurationError,
    ConnectError,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelExecutionError,
    ModelNotReadyError,
    ServerOverloadedError,
    ServerUnavailableError,
    TransportError,
    TritonClient,
    TritonInference,
)
from beam_triton.testing import FakeModel, FakeTriton
from tests.support import sockets

# One attempt, so that each fault is seen.
Client = functools.partial(TritonClient, retry={"max_retries": 0}, circuit_breaker=None)
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


def model(function: Callable[[dict[str, Any]], Any], **options: Any) -> FakeModel:
    """A model that takes x and gives y, four floats each."""
    return FakeModel(function, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])}, **options)


DOUBLE = model(lambda inputs: {"y": 2 * inputs["x"]})


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton({"double": DOUBLE}) as server:
        yield server


def test_a_pipeline_scores_through_faults(triton: FakeTriton) -> None:
    """The transform retries what fails, and the test sees each attempt."""
    triton.fail_next(2, status=503, retry_after=0)
    triton.drop_next()
    with TestPipeline() as p:
        results = (
            p
            | beam.Create([row.tolist() for row in ROWS])
            | TritonInference(triton.endpoint, "double", max_concurrent_requests=1)
            | beam.Map(lambda result: result.inference["y"].tolist())
        )
        assert_that(results, equal_to((2 * ROWS).tolist()))
    statuses = [request.status for request in triton.requests]
    assert statuses[:3] == [503, 503, None]
    assert set(statuses[3:]) == {200}
    assert sum(request.batch_size for request in triton.requests if request.status == 200) == 2


def test_requests_are_recorded(triton: FakeTriton) -> None:
    """Model, version, id, parameters, headers, tensors and status of a request can be looked at."""
    with Client(triton.endpoint, headers={"X-Tenant": "blue"}) as client:
        client.infer("double", {"x": ROWS}, request_id="mine", parameters={"colour": "green"})
        client.infer("double", {"x": ROWS[:1]}, model_version="1")
    first, second = triton.requests
    assert (first.model_name, first.model_version, first.id) == ("double", "", "mine")
    assert first.parameters["colour"] == "green"
    assert first.headers["X-Tenant"] == "blue"
    np.testing.assert_array_equal(first.inputs["x"], ROWS)
    assert (first.batch_size, first.status) == (2, 200)
    assert (second.model_version, second.batch_size) == ("1", 1)
    assert triton.connections_opened == 1


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (503, "", ServerUnavailableError),
        (429, "", ServerOverloadedError),
        (503, "Exceeds maximum queue size", ServerOverloadedError),
        (500, "", ModelExecutionError),
        (400, "no such thing", InvalidRequestError),
        (599, "", InferenceError),
    ],
)
def test_ordered_failures_reach_the_client(
    triton: FakeTriton, status: int, message: str, error: type[InferenceError]
) -> None:
    """Status, message and Retry-After are those that the test ordered; the next request is served."""
    triton.fail_next(status=status, message=message, retry_after=7)
    with Client(triton.endpoint) as client:
        with pytest.raises(error, match=message or "because the test asked for it") as caught:
            client.infer("double", {"x": ROWS})
        assert (caught.value.status, caught.value.retry_after_seconds) == (status, 7.0)
        assert client.infer("double", {"x": ROWS}).outputs["y"].tolist() == (2 * ROWS).tolist()


def test_faults_are_taken_in_their_order(triton: FakeTriton) -> None:
    """Each request takes one fault, and only inference does."""
    triton.fail_next(status=500)
    triton.drop_next()
    triton.fail_next(status=503)
    with Client(triton.endpoint) as client:
        assert client.is_model_ready("double")
        # The library repeats at once what it lost on a connection that it had used before.
        for error in (ModelExecutionError, ServerUnavailableError):
            with pytest.raises(error):
                client.infer("double", {"x": ROWS})
        client.infer("double", {"x": ROWS})
    assert [request.status for request in triton.requests] == [500, None, 503, 200]


def test_a_hanging_request_gets_no_answer(triton: FakeTriton) -> None:
    """The client's deadline ends the request, and its connection does not stay at the server."""
    triton.hang_next()
    threads = sockets.threads()
    with Client(triton.endpoint, timeout_seconds=0.3) as client:
        client.model_spec("double")
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            client.infer("double", {"x": ROWS})
        assert time.monotonic() - started < 2
        client.infer("double", {"x": ROWS})
    assert sockets.settles(lambda: len(set(sockets.threads()) - set(threads)), 0) == 0


def test_a_delay_holds_requests_at_once(triton: FakeTriton) -> None:
    """Each request waits for delay_seconds, and requests on several connections wait together."""
    triton.delay_seconds = 0.3
    with Client(triton.endpoint) as client:
        client.model_spec("double")
        started = time.monotonic()
        threads = [threading.Thread(target=client.infer, args=("double", {"x": ROWS})) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0.3 <= time.monotonic() - started < 1.2  # the time of four in a row
    assert [request.status for request in triton.requests] == [200] * 4


def test_a_stopped_server_refuses_and_comes_back(triton: FakeTriton) -> None:
    """Stopping closes connections and the port; starting serves on the same one, and the record goes on."""
    endpoint = triton.endpoint
    with Client(triton.endpoint, timeout_seconds=1) as client:
        client.infer("double", {"x": ROWS})
        triton.stop()
        triton.stop()
        with pytest.raises(ConnectError):
            client.infer("double", {"x": ROWS})
        triton.start()
        triton.start()
        client.infer("double", {"x": ROWS})
        triton.restart()
        client.infer("double", {"x": ROWS})
    assert triton.endpoint == endpoint
    assert [request.status for request in triton.requests] == [200] * 3


def test_stopping_ends_requests_in_flight(triton: FakeTriton) -> None:
    """A request that hangs or waits loses its connection, and no thread or socket stays."""
    triton.hang_next()
    caught: list[Exception] = []

    def ask() -> None:
        with Client(triton.endpoint) as client, pytest.raises(TransportError) as error:
            client.infer("double", {"x": ROWS})
        caught.append(error.value)

    thread = threading.Thread(target=ask)
    thread.start()
    assert sockets.settles(lambda: len(triton.requests), 1) == 1
    started = time.monotonic()
    triton.stop()
    assert time.monotonic() - started < 1
    thread.join()
    assert len(caught) == 1
    assert not [each for each in threading.enumerate() if each.name == "fake-triton"]


def test_an_unloaded_model_is_not_ready(triton: FakeTriton) -> None:
    """Its requests fail until it is loaded again; the server itself stays ready."""
    with Client(triton.endpoint) as client:
        triton.unload_model("double")
        assert not client.is_model_ready("double")
        assert client.is_server_ready()
        with pytest.raises(ModelNotReadyError):
            client.infer("double", {"x": ROWS})
        triton.load_model("double")
        client.infer("double", {"x": ROWS})
        triton.is_ready = False
        assert not client.is_server_ready()
        assert client.is_server_live()
    with pytest.raises(ConfigurationError, match="has no model 'triple'"):
        triton.load_model("triple")


def raises(error: Exception) -> FakeModel:
    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        raise error

    return model(run)


@pytest.mark.parametrize(
    ("fake_model", "error", "message"),
    [
        (raises(ValueError("out of paper")), ModelExecutionError, "ValueError: out of paper"),
        (raises(InferenceError("not today", status=400)), InvalidRequestError, "not today"),
        (raises(InferenceError("too busy", status=503)), ServerUnavailableError, "too busy"),
        (model(lambda inputs: {"z": inputs["x"]}), ModelExecutionError, r"a dict of \['y'\], not \['z'\]"),
        (model(lambda inputs: inputs["x"]), ModelExecutionError, r"a dict of \['y'\], not ndarray"),
        (model(lambda inputs: {"y": "text"}), ModelExecutionError, "output 'y' takes FP32"),
    ],
)
def test_a_failing_function_is_a_failing_model(
    fake_model: FakeModel, error: type[InferenceError], message: str
) -> None:
    """An exception is a 500 with its text, an InferenceError answers with its own status."""
    with FakeTriton({"bad": fake_model}) as triton, Client(triton.endpoint) as client:
        with pytest.raises(error, match=message):
            client.infer("bad", {"x": ROWS})
        assert [request.status for request in triton.requests] != [200]
        # The connection and the server are as good as before.
        assert client.is_model_ready("bad")
        assert triton.connections_opened == 1


def test_a_function_may_change_its_arguments() -> None:
    """It works on copies: what the test sees of the request stays what was sent."""

    def double_in_place(inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["x"] *= 2
        return {"y": inputs["x"]}

    with FakeTriton({"double": model(double_in_place)}) as triton, Client(triton.endpoint) as client:
        assert client.infer("double", {"x": ROWS}).outputs["y"].tolist() == (2 * ROWS).tolist()
        np.testing.assert_array_equal(triton.requests[0].inputs["x"], ROWS)


def test_a_function_runs_once_at_a_time() -> None:
    """Requests for one model wait for each other, as with one instance of a model."""
    running: list[int] = [0]
    most = [0]

    def count(inputs: dict[str, Any]) -> dict[str, Any]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1
        return {"y": inputs["x"]}

    with FakeTriton({"counting": model(count)}) as triton, Client(triton.endpoint) as client:
        client.model_spec("counting")
        threads = [threading.Thread(target=client.infer, args=("counting", {"x": ROWS})) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1]


def test_outputs_may_be_any_values_of_their_datatype() -> None:
    """Lists, text, Python numbers and float64 are converted to what the output is."""
    values = FakeModel(
        lambda inputs: {
            "text": [["a"], [b"\xff"]],
            "half": np.array([[0.1], [0.2]]),
            "brain": [[1.0], [3.0]],
            "whole": [[1], [2]],
            "flag": [[True], [False]],
        },
        inputs={"x": ("FP32", [4])},
        outputs={
            "text": ("BYTES", [1]),
            "half": ("FP16", [1]),
            "brain": ("BF16", [1]),
            "whole": ("INT64", [1]),
            "flag": ("BOOL", [1]),
        },
    )
    with FakeTriton({"values": values}) as triton, Client(triton.endpoint) as client:
        outputs = client.infer("values", {"x": ROWS}).outputs
    assert outputs["text"].tolist() == [[b"a"], [b"\xff"]]
    assert outputs["half"].tolist() == [[np.float16(0.1)], [np.float16(0.2)]]
    assert outputs["brain"].tolist() == [[1.0], [3.0]]
    assert outputs["whole"].tolist() == [[1], [2]]
    assert outputs["flag"].tolist() == [[True], [False]]


def test_one_model_may_have_two_names() -> None:
    """The same FakeModel under two names is loaded and counted apart."""
    with FakeTriton({"a": DOUBLE, "b": DOUBLE}) as triton, Client(triton.endpoint) as client:
        client.infer("a", {"x": ROWS})
        triton.unload_model("b")
        assert client.is_model_ready("a") and not client.is_model_ready("b")
        assert [entry["inference_count"] for entry in client.statistics("a")["model_stats"]] == [2]


def test_chunked_requests_are_read(triton: FakeTriton) -> None:
    """A body in chunks is one body, and the connection serves on."""
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    text = json.dumps(document).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", _port(triton), timeout=5)) as connection:
        for _ in range(2):
            connection.request(
                "POST",
                "/v2/models/double/infer",
                iter([text[:10], text[10:]]),
                {"Transfer-Encoding": "chunked"},
                encode_chunked=True,
            )
            response = connection.getresponse()
            assert json.load(response)["outputs"][0]["data"] == [2, 4, 6, 8]
    assert triton.connections_opened == 1


def _port(triton: FakeTriton) -> int:
    return int(triton.endpoint.rpartition(":")[2])


def test_a_port_in_use_is_named() -> None:
    """The error names the port that somebody else listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} of 127.0.0.1"):
            FakeTriton({"double": DOUBLE}, port=port).start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": {"x": ("FP8", [4])}}, "datatype 'FP8' is not one of"),
        ({"inputs": {"x": "FP32"}}, "needs a datatype and a shape"),
        ({"outputs": {"y": ("FP32", ["a"])}}, "must hold whole numbers"),
        ({"max_batch_size": -1}, "max_batch_size must be 0"),
        ({"optional_inputs": ["z"]}, "optional_inputs name 'z'"),
        ({"versions": ["latest"]}, "versions must be numbers"),
        ({"function": "double"}, "needs a function"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    """Each wrong argument gives an error that names it."""
    good: dict[str, Any] = {
        "function": lambda inputs: inputs,
        "inputs": {"x": ("FP32", [4])},
        "outputs": {"y": ("FP32", [4])},
    }
    with pytest.raises(ConfigurationError, match=message):
        FakeModel(**{**good, **options})


def test_a_server_of_something_else_is_refused() -> None:
    """A plain function in place of a FakeModel is named."""
    with pytest.raises(ConfigurationError, match="model 'double' must be a FakeModel, not function"):
        FakeTriton({"double": lambda inputs: inputs})  # type: ignore[dict-item]


def test_it_needs_numpy_and_the_standard_library_alone() -> None:
    """FakeTriton's own modules import neither Beam nor the library's transport: it runs where Python does."""
    script = """
import sys, types
for name in ("apache_beam", "requests", "urllib3", "fcntl"):
    sys.modules[name] = None
package = types.ModuleType("beam_triton")
package.__path__ = [sys.argv[1]]
sys.modules["beam_triton"] = package
testing = types.ModuleType("beam_triton.testing")
testing.__path__ = [sys.argv[1] + "/testing"]
sys.modules["beam_triton.testing"] = testing
from beam_triton.testing.fake_model import FakeModel
from beam_triton.testing.fake_triton import FakeTriton
with FakeTriton({}) as triton:
    print(triton.endpoint)
"""
    package = Path(__file__).parents[3] / "beam_triton"
    ran = subprocess.run([sys.executable, "-c", script, str(package)], capture_output=True, text=True)
    assert ran.stdout.startswith("http://127.0.0.1:"), ran.stderr
