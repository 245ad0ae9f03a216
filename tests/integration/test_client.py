"""`TritonClient` against a real Triton, other servers of the protocol, and servers that do not speak it."""

from __future__ import annotations

import gc
import json
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from beam_triton import TritonClient
from beam_triton.dispatch.call import Call
from beam_triton.errors import (
    ConfigurationError,
    ConnectError,
    InferenceError,
    InvalidRequestError,
    LocalProtocolError,
    ModelExecutionError,
    ModelNotFoundError,
    ModelNotReadyError,
    RemoteProtocolError,
    TritonError,
)
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.testing import LocalTriton
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.session import SESSIONS
from tests.support import faults, sockets
from tests.support.answers import Answer, Request
from tests.support.fault_server import FaultServer
from tests.support.models import DATATYPES, LABELS

IMPATIENT: dict[str, Any] = {
    "timeout_seconds": 2.0,
    "pool": {"connect_timeout_seconds": 1.0},
    "retry": {"max_retries": 0},
    "circuit_breaker": None,
}
X4 = np.arange(8, dtype=np.float32).reshape(2, 4)
X1 = np.array([[0.5], [1.5]], np.float32)


@pytest.fixture(scope="module")
def client(triton: LocalTriton) -> Iterator[TritonClient]:
    with TritonClient(triton.endpoint) as client:
        yield client


def values_of(datatype: str) -> npt.NDArray[Any]:
    """Two rows of three values each, extreme values included."""
    if datatype == "BYTES":
        return np.array([[b"", b"\xff\x00", b"abc"], [b"x" * 300, b"0", b"\n"]], np.object_)
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    if datatype == "BF16":
        return np.array([[-1.5, 0.0, 2.25], [np.inf, -np.inf, 3e38]], np.float32)
    if datatype.startswith("FP"):
        return np.array([[-1.5, 0.0, 2.25], [np.inf, -np.inf, np.nan]], f"f{int(datatype[2:]) // 8}")
    limits = np.iinfo(datatype.lower())
    return np.array([[limits.min, 0, limits.max], [1, 2, 3]], datatype.lower())


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_round_trips(client: TritonClient, datatype: str) -> None:
    """Each datatype comes back unchanged, extreme values included."""
    x = values_of(datatype)
    y = client.infer(f"identity_{datatype.lower()}", {"x": x}).outputs["y"]
    if datatype == "BF16":
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, x, rtol=1 / 128)
    else:
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, x)


def test_fourteen_datatypes_travel_in_one_request(client: TritonClient) -> None:
    """Fourteen inputs of fourteen datatypes may be given in any order of the mapping."""
    inputs = {f"x_{datatype.lower()}": values_of(datatype) for datatype in reversed(DATATYPES)}
    outputs = client.infer("every_datatype", inputs).outputs
    assert len(outputs) == 14
    np.testing.assert_array_equal(outputs["y_int64"], inputs["x_int64"])
    np.testing.assert_array_equal(outputs["y_bytes"], inputs["x_bytes"])


def test_outputs_selects_which_outputs_are_returned(client: TritonClient) -> None:
    """All outputs are returned by default, and only the requested ones otherwise."""
    a, b = np.full((2, 16), 7, np.int32), np.ones((2, 16), np.int32)
    both = client.infer("sum_and_difference", {"a": a, "b": b})
    assert set(both.outputs) == {"sum", "difference"}
    one = client.infer("sum_and_difference", {"b": b, "a": a}, outputs=["difference"])
    assert set(one.outputs) == {"difference"} and (one.outputs["difference"] == 6).all()


def test_single_input_accepts_a_bare_array_or_list(client: TritonClient) -> None:
    """A model with one input takes the value without a name; lists are converted to the input's datatype."""
    assert (client.infer("double", X4).outputs["y"] == 2 * X4).all()
    assert (client.infer("double", {"x": X4.tolist()}).outputs["y"] == 2 * X4).all()


def test_array_layout_and_byte_order_do_not_change_values(client: TritonClient) -> None:
    """Big-endian, Fortran-ordered, strided and read-only arrays are sent with their values unchanged."""
    frozen = X4.copy()
    frozen.flags.writeable = False
    for x in (X4.astype(">f4"), np.asfortranarray(X4), np.repeat(X4, 2, axis=1)[:, ::2], frozen):
        np.testing.assert_array_equal(client.infer("double", {"x": x}).outputs["y"], 2 * X4)


def test_unbatched_empty_variable_and_optional_shapes_are_accepted(client: TritonClient) -> None:
    """No batch dimension, empty dimensions and outputs, variable lengths, optional inputs, an ensemble."""
    assert (client.infer("unbatched", X4).outputs["y"] == X4 + 1).all()
    assert client.infer("empty_output", np.ones((3, 2), np.float32)).outputs["y"].shape == (3, 0)
    assert client.infer("echo_variable", np.ones((3, 0), np.float32)).outputs["y"].shape == (3, 0)
    ragged = client.infer("ragged", np.ones((2, 5), np.float32)).outputs
    assert ragged["total"].tolist() == [[5], [5]] and ragged["doubled"].shape == (2, 5)
    factor = np.full((2, 1), 3, np.float32)
    assert (client.infer("optional_input", {"x": X4, "factor": factor}).outputs["y"] == 3 * X4).all()
    assert (client.infer("optional_input", {"x": X4}).outputs["y"] == X4).all()
    assert (client.infer("ensemble", X4).outputs["y"] == 4 * X4).all()


def test_strings_are_sent_as_utf8_and_returned_as_bytes(client: TritonClient) -> None:
    """``str`` is encoded as UTF-8; BYTES outputs are bytes."""
    outputs = client.infer("shout", {"text": [["gr\u00fc\u00df"], [b"raw"]]}).outputs
    assert outputs["loud"][1, 0] == b"RAW"
    assert outputs["length_bytes"].tolist() == [[6], [3]]


def test_classification_returns_top_classes_with_labels(client: TritonClient) -> None:
    """The highest-scoring classes are returned with their labels, best first."""
    scores = np.array([[0.1, 0.7, 0.2, 0.0]], np.float32)
    answer = client.infer("classifier", scores, classification={"scores": 2}).outputs["scores"]
    assert [entry.decode().split(":")[2] for entry in answer[0]] == [LABELS[1], LABELS[2]]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_requests_and_responses_can_be_compressed(triton: LocalTriton, encoding: str) -> None:
    """Each encoding works for requests, for responses, and for both together."""
    x = np.zeros((4, 1000), np.float32)
    for options in (
        {"compression": encoding},
        {"response_compression": encoding},
        {"compression": encoding, "response_compression": encoding},
    ):
        with TritonClient(triton.endpoint, **options) as compressing:
            np.testing.assert_array_equal(compressing.infer("echo_variable", x).outputs["y"], x)


def test_request_id_parameters_and_version_reach_the_model(triton: LocalTriton) -> None:
    """The request's id and parameters reach the model, and the requested version answers."""
    with TritonClient(triton.endpoint, request_parameters={"team": "a", "level": 1}) as client:
        answer = client.infer("request_facts", X1, parameters={"level": 2}, request_id="request 7")
        facts = json.loads(answer.outputs["facts"][0, 0])
        assert facts["id"] == answer.id == "request 7"
        assert facts["parameters"]["team"] == "a" and int(facts["parameters"]["level"]) == 2
        assert facts["version"] == answer.model_version == "3"
        older = client.infer("request_facts", X1, model_version=1)
        assert json.loads(older.outputs["facts"][0, 0])["version"] == older.model_version == "1"


def test_requests_of_one_sequence_share_state(client: TritonClient) -> None:
    """The server adds up the requests of one sequence."""
    totals = []
    for number in range(3):
        parameters = {"sequence_id": 42, "sequence_start": number == 0, "sequence_end": number == 2}
        x = np.array([[number + 1]], np.int32)
        totals.append(int(client.infer("running_sum", x, parameters=parameters).outputs["y"][0, 0]))
    assert totals == [1, 3, 6]


def test_health_metadata_configuration_statistics_and_index_are_available(client: TritonClient) -> None:
    """Each call of the control plane returns what the server reports."""
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("double")
    assert not client.is_model_ready("no_such_model") and not client.is_model_ready("double", 9)
    assert "binary_tensor_data" in client.server_metadata()["extensions"]
    assert client.model_metadata("double")["inputs"][0]["name"] == "x"
    assert client.model_config("double")["max_batch_size"] == 32
    before = client.statistics("double")["model_stats"][0]["inference_count"]
    client.infer("double", X4)
    assert client.statistics("double")["model_stats"][0]["inference_count"] == before + 2
    assert len(client.statistics()["model_stats"]) > 10
    assert {"name": "double", "version": "1", "state": "READY"} in client.repository_index()
    spec = client.model_spec("sum_and_difference")
    assert [tensor.name for tensor in spec.inputs] == ["a", "b"] and spec.max_batch_size == 32


def test_unknown_model_error_lists_available_models(client: TritonClient) -> None:
    """The error for an unknown model lists the models that the server has."""
    with pytest.raises(ModelNotFoundError, match=r"the server has: .*double.*sum_and_difference") as caught:
        client.infer("no_such_model", X4)
    assert caught.value.status == 404
    with pytest.raises(TritonError, match="version"):
        client.infer("double", X4, model_version=9)


@pytest.mark.parametrize(
    ("inputs", "expected_parts"),
    [
        ({"y": X4}, ["'y'", "x FP32 [4]"]),
        ({}, ["x"]),
        ({"x": X4, "z": X4}, ["z"]),
        ({"x": X4.astype(np.float64) + 1e300}, ["FP32", "float64", "1e+300"]),
        ({"x": X4[:, :3]}, ["[batch, 4]", "[2, 3]"]),
        ({"x": [["a", "b", "c", "d"]]}, ["FP32"]),
        ({"x": np.zeros((0, 4), np.float32)}, ["at least one element"]),
        ({"x": None}, ["x"]),
    ],
)
def test_invalid_inputs_are_rejected_before_sending(
    client: TritonClient, inputs: Any, expected_parts: list[str]
) -> None:
    """Inputs that do not match the model are rejected locally; the message says what the model expects."""
    with pytest.raises(LocalProtocolError) as caught:
        client.infer("double", inputs)
    assert all(part in str(caught.value) for part in expected_parts), str(caught.value)


@pytest.mark.parametrize(
    ("model", "inputs", "error_type", "message"),
    [
        ("rejecting", -X1, InvalidRequestError, "x is negative"),
        ("raising", -X1, ModelExecutionError, "x is negative"),
        ("unavailable", -X1, InferenceError, "x is negative"),
        ("countdown", np.array([3], np.int32), InferenceError, "decoupled"),
    ],
)
def test_server_error_messages_are_preserved(
    triton: LocalTriton, model: str, inputs: npt.NDArray[Any], error_type: type[InferenceError], message: str
) -> None:
    """The server's message reaches the user with status and model name, and survives pickling."""
    with (
        TritonClient(triton.endpoint, **IMPATIENT) as impatient,
        pytest.raises(error_type, match=message) as caught,
    ):
        impatient.infer(model, inputs)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.status, copy.model_name, str(copy)) == (
        caught.value.status,
        model,
        str(caught.value),
    )


def test_client_is_thread_safe(triton: LocalTriton) -> None:
    """32 threads share one client and its eight connections; each answer belongs to its own request."""
    pool = {"max_total": 8, "max_idle": 8}
    with TritonClient(triton.endpoint, pool=pool, max_concurrent_requests=8) as client:

        def work(number: int) -> bool:
            x = np.full((2, 4), number, np.float32)
            return all(bool((client.infer("double", x).outputs["y"] == 2 * number).all()) for _ in range(10))

        with ThreadPoolExecutor(32) as threads:
            assert all(threads.map(work, range(32)))
        port = int(triton.endpoint.rpartition(":")[2])
        assert sockets.established(port) >= 1


def test_closing_the_last_client_closes_the_session(triton: LocalTriton) -> None:
    """Closing is idempotent; a closed client raises an error and opens no new session."""
    sessions = len(SESSIONS)
    options: dict[str, Any] = {"pool": {"max_total": 77}}
    spec = ModelSpec("double", inputs=(TensorSpec("x", "FP32", (4,)),), max_batch_size=8)
    for more in ({}, {"model_spec": spec}):
        client = TritonClient(triton.endpoint, **options, **more)
        client.infer("double", X4)
        client.close()
        client.close()
        with pytest.raises(TritonError, match="closed"):
            client.infer("double", X4)
        assert len(SESSIONS) == sessions


def test_clients_with_equal_pools_share_a_session(triton: LocalTriton) -> None:
    """Closing one of two clients leaves the other one its connections."""
    sessions = len(SESSIONS)
    pool = {"max_total": 78}
    with TritonClient(triton.endpoint, pool=pool) as remaining:
        with TritonClient(triton.endpoint, pool=pool) as closing:
            closing.infer("double", X4)
            assert len(SESSIONS) == sessions + 1
        remaining.infer("double", X4)


MLSERVER_METADATA = {"name": "iris", "versions": [], "platform": "", "inputs": [], "outputs": []}


def json_only_server(request: Request) -> Answer:
    """A server of the protocol without any extension: JSON only, no configuration, no repository index."""
    headers = (("Content-Type", "application/json"),)
    path = request.target
    if path == "/v2":
        body: Any = {"name": "other", "version": "1.7", "extensions": []}
    elif path == "/v2/models/iris":
        body = MLSERVER_METADATA
    elif path == "/v2/models/iris/infer":
        if request.header("Content-Type") != "application/json":
            return Answer(422, b'{"detail": "not JSON"}', headers)
        (given,) = json.loads(request.body)["inputs"]
        output = {"name": "sum", "shape": [len(given["data"])], "datatype": "FP32", "data": given["data"]}
        body = {"model_name": "iris", "outputs": [output]}
    else:
        return Answer(404, b'{"error": "Not Found"}', headers)
    return Answer(200, json.dumps(body).encode(), headers)


def test_server_without_extensions_is_used_in_json(caplog: pytest.LogCaptureFixture) -> None:
    """Without binary tensors, configuration and named inputs JSON is used, and each gap is logged once."""
    with (
        FaultServer(json_only_server) as server,
        TritonClient(server.endpoint, **IMPATIENT) as client,
    ):
        for _ in range(2):
            answer = client.infer("iris", {"values": np.array([1.0, 2.0], np.float32)})
            assert answer.outputs["sum"].tolist() == [1.0, 2.0]
        with pytest.raises(ModelNotFoundError, match="does not list its models"):
            client.infer("elsewhere", {"x": X4})
    logged = "\n".join(record.message for record in caplog.records)
    for missing in ("binary_tensor_data", "model_configuration", "does not name the inputs"):
        assert logged.count(missing) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, b"<html>Welcome to nginx!</html>", (("Content-Type", "text/html"),)),
        Answer(200, b"[]"),
        Answer(200, b""),
        Answer(200, b"[" * 100_000),
        Answer(200, b"not gzip", (("Content-Encoding", "gzip"),)),
        Answer(404, b"<html>Not Found</html>"),
        Answer(302, b"", (("Location", "https://user:s3cret@login.example/?token=s3cret"),)),
        Answer(401, b"who are you?"),
    ],
)
def test_non_inference_servers_raise_library_errors(answer: Answer) -> None:
    """Any other HTTP server raises an error of this library that shows no secrets."""
    with (
        FaultServer(lambda request: answer) as server,
        TritonClient(server.endpoint, **IMPATIENT) as client,
        pytest.raises(TritonError) as caught,
    ):
        client.infer("double", X4)
    if answer.status == 302:
        assert f"redirected there by {server.endpoint}" in str(caught.value)
    else:
        assert isinstance(caught.value, RemoteProtocolError | InferenceError)
    assert "s3cret" not in str(caught.value)


def test_grpc_port_fails_within_the_deadline(triton: LocalTriton) -> None:
    """The gRPC port speaks HTTP/2: the error says so at once, and health checks return False."""
    with TritonClient(f"http://{triton.grpc_endpoint}", **IMPATIENT) as client:
        started = time.monotonic()
        with pytest.raises(RemoteProtocolError, match="gRPC port"):
            client.infer("double", X4)
        assert time.monotonic() - started < 2.5
        assert client.is_server_live() is False
        assert client.is_server_ready() is False


def test_connect_error_names_the_unreachable_host() -> None:
    """A port without a listener and a host name that does not resolve are named in the error."""
    with (
        faults.refusing_port() as port,
        TritonClient(f"http://127.0.0.1:{port}", **IMPATIENT) as client,
    ):
        with pytest.raises(ConnectError, match=str(port)):
            client.infer("double", X4)
        assert not client.is_server_live() and not client.is_model_ready("double")
    with (
        TritonClient("http://no-such-host.invalid:8000", **IMPATIENT) as client,
        pytest.raises(ConnectError, match=r"no-such-host\.invalid"),
    ):
        client.infer("double", X4)


def test_second_endpoint_serves_while_the_first_is_down(triton: LocalTriton) -> None:
    """Metadata, health and inference come from the second endpoint."""
    with (
        faults.refusing_port() as port,
        TritonClient(
            [f"http://127.0.0.1:{port}", triton.endpoint],
            timeout_seconds=5.0,
            pool={"connect_timeout_seconds": 1.0},
        ) as client,
    ):
        assert client.is_server_ready()
        assert all((client.infer("double", X4).outputs["y"] == 2 * X4).all() for _ in range(4))


def test_loading_model_raises_model_not_ready() -> None:
    """The error for a model that is loading lists the models and their states."""

    def loading(request: Request) -> Answer:
        if request.target == "/v2/repository/index":
            return Answer(200, b'[{"name": "m", "state": "LOADING"}, {"name": "other", "state": "READY"}]')
        return Answer(404, b'{"error": "Request for unknown model: \'m\' has no available versions"}')

    with (
        FaultServer(loading) as server,
        TritonClient(server.endpoint, **IMPATIENT) as client,
        pytest.raises(ModelNotReadyError, match=r"m \(loading\), other"),
    ):
        client.infer("m", X4)


def test_failing_token_callable_is_called_again(triton: LocalTriton) -> None:
    """A token callable that raises causes an error without the token; the next call tries again."""
    is_available = False

    def token() -> str:
        if not is_available:
            raise ValueError("s3cret")
        return "s3cret-token"

    with TritonClient(triton.endpoint, auth_token=token) as client:
        with pytest.raises(ConfigurationError, match="auth_token") as caught:
            client.infer("double", X4)
        assert "s3cret" not in str(caught.value)
        is_available = True
        assert (client.infer("double", X4).outputs["y"] == 2 * X4).all()


def test_endpoint_path_and_headers_apply_to_every_request() -> None:
    """Paths are appended to the endpoint's own path; headers and credentials are sent with each request."""
    seen: list[Request] = []

    def gateway(request: Request) -> Answer:
        seen.append(request)
        return Answer(404, b"nothing here")

    with (
        FaultServer(gateway) as server,
        TritonClient(
            server.endpoint.replace("http://", "http://user:pw@") + "/team/v2/",
            headers={"X-Team": "a"},
            **IMPATIENT,
        ) as client,
        pytest.raises(ModelNotFoundError),
    ):
        client.infer("double", X4)
    assert all(request.target.startswith("/team/v2/") for request in seen)
    assert all(request.header("X-Team") == "a" for request in seen)
    assert all(request.header("Authorization") == "Basic dXNlcjpwdw==" for request in seen)


@pytest.mark.parametrize("model", ["echo_variable", "rejecting"])
def test_requests_are_freed_without_garbage_collection(triton: LocalTriton, model: str) -> None:
    """No reference cycle keeps requests and answers: they are freed with the last reference to them."""
    with TritonClient(triton.endpoint, **IMPATIENT) as client:

        def infer() -> None:
            try:
                client.infer(model, -X1)
            except InvalidRequestError as error:
                assert model == "rejecting" and "negative" in error.message

        infer()
        gc.collect()
        gc.disable()
        try:
            infer()
            left = [type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, Call | Exchange)]
            assert left == []
        finally:
            gc.enable()


def test_closing_a_client_in_use_gives_answers_or_errors(triton: LocalTriton) -> None:
    """Threads that use a client while it is closed get an answer or a library error, and nothing leaks."""
    sessions = len(SESSIONS)
    client = TritonClient(triton.endpoint, pool={"max_total": 79}, retry={"max_retries": 0})
    outcomes: list[object] = []

    def work() -> None:
        for _ in range(50):
            try:
                client.infer("double", X4)
            except TritonError as error:
                outcomes.append(error)
                return
            except BaseException as error:
                outcomes.append(("unexpected", error))
                raise

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    client.close()
    for thread in threads:
        thread.join(30)
    assert not any(isinstance(outcome, tuple) for outcome in outcomes), outcomes
    assert len(SESSIONS) == sessions
