"""Each model of the catalogue does what its name says, as other tests rely on it.

The requests use tritonclient, so that a bug of this library cannot hide a bug of a model.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as tritonclient
from numpy.typing import NDArray

from beam_triton.testing import LocalTriton
from tests.support.models import CATALOGUE, DATATYPES, LABELS
from tests.support.sockets import settles

_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    **{name: np.dtype(name.lower()) for name in DATATYPES if "INT" in name},
}


@pytest.fixture(scope="module")
def client(triton: LocalTriton) -> Iterator[Any]:
    """tritonclient's own client, connected to the shared server."""
    with tritonclient.InferenceServerClient(triton.endpoint.removeprefix("http://")) as client:
        yield client


def infer(client: Any, model: str, inputs: dict[str, tuple[str, NDArray[Any]]], **options: Any) -> Any:
    """Sends one request of tritonclient with these inputs: name to datatype and array."""
    tensors = []
    for name, (datatype, array) in inputs.items():
        tensor = tritonclient.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return client.infer(model, tensors, **options)


def floats(*rows: list[float]) -> dict[str, tuple[str, NDArray[Any]]]:
    """One FP32 input named x."""
    return {"x": ("FP32", np.array(rows, np.float32))}


def values_of(datatype: str) -> NDArray[Any]:
    """Two rows of three values each, extreme values included."""
    if datatype == "BYTES":
        return np.array([[b"", b"\xff\x00", b"Gr\xc3\xbc"], [b"a", b"bb", b"c" * 300]], np.object_)
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    dtype = _NUMPY[datatype]
    if "INT" in datatype:
        limits = np.iinfo(dtype)
        return np.array([[limits.min, 0, limits.max], [1, 2, 3]], dtype)
    return np.array([[-1.5, 0.0, 2.25], [np.inf, -np.inf, 0.5]], dtype)


def test_every_model_that_loads_is_ready(client: Any) -> None:
    """The whole catalogue is ready except for the model that is broken on purpose."""
    ready = {model["name"] for model in client.get_model_repository_index() if model.get("state") == "READY"}
    assert ready == {name for name, model in CATALOGUE.items() if model.loads}


@pytest.mark.parametrize("datatype", DATATYPES)
def test_identity_returns_every_datatype(client: Any, datatype: str) -> None:
    """Each datatype comes back unchanged, bit by bit, extreme values included."""
    array = values_of(datatype)
    answer = infer(client, f"identity_{datatype.lower()}", {"x": (datatype, array)}).as_numpy("y")
    assert answer.shape == array.shape
    np.testing.assert_array_equal(answer, array)


def test_every_datatype_in_one_request(client: Any) -> None:
    """Fourteen inputs of fourteen datatypes come back as fourteen outputs."""
    arrays = {datatype: values_of(datatype) for datatype in DATATYPES}
    answer = infer(
        client, "every_datatype", {f"x_{name.lower()}": (name, array) for name, array in arrays.items()}
    )
    for name, array in arrays.items():
        np.testing.assert_array_equal(answer.as_numpy(f"y_{name.lower()}"), array)


@pytest.mark.parametrize("model", ["echo", "remote_like"])
def test_benchmark_models_echo_their_input(client: Any, model: str) -> None:
    """The models that the benchmarks load return 64 rows of 128 floats unchanged."""
    array = np.random.default_rng(1).random((64, 128), np.float32)
    np.testing.assert_array_equal(infer(client, model, {"x": ("FP32", array)}).as_numpy("y"), array)


def test_sum_and_difference_returns_two_outputs(client: Any) -> None:
    """Two inputs give two outputs."""
    a, b = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 3, np.int32)
    answer = infer(client, "sum_and_difference", {"a": ("INT32", a), "b": ("INT32", b)})
    np.testing.assert_array_equal(answer.as_numpy("sum"), a + b)
    np.testing.assert_array_equal(answer.as_numpy("difference"), a - b)


def test_optional_input_may_be_omitted(client: Any) -> None:
    """The factor may be omitted."""
    x = floats([1, 2, 3, 4])
    factor = np.array([[10]], np.float32)
    assert infer(client, "optional_input", x).as_numpy("y").tolist() == [[1, 2, 3, 4]]
    with_factor = infer(client, "optional_input", {**x, "factor": ("FP32", factor)})
    assert with_factor.as_numpy("y").tolist() == [[10, 20, 30, 40]]


def test_variable_shapes_are_accepted(client: Any) -> None:
    """Dimensions may differ from request to request, and the outputs follow."""
    answer = infer(client, "ragged", {"values": ("FP32", np.ones((2, 5), np.float32))})
    assert answer.as_numpy("total").tolist() == [[5], [5]]
    assert answer.as_numpy("doubled").shape == (2, 5)
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    transposed = infer(client, "transpose", {"x": ("FP32", x)}).as_numpy("y")
    np.testing.assert_array_equal(transposed, x.transpose(0, 2, 1))
    zeros = infer(client, "zeros", {"count": ("INT32", np.array([[1000]], np.int32))})
    assert zeros.as_numpy("y").shape == (1, 1000)


def test_attend_sees_only_what_is_under_the_mask(client: Any) -> None:
    """Padding with a mask of 0 changes no value; the width tells what came."""
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    ids = np.array([[1, 3, 99], [1, 2, 3]])
    answer = infer(client, "attend", {"input_ids": ("INT64", ids), "attention_mask": ("INT64", mask)})
    assert answer.as_numpy("mean").tolist() == [[2], [2]]
    assert answer.as_numpy("centred").tolist() == [[-1, 1, 0], [-1, 0, 1]]
    assert answer.as_numpy("width").tolist() == [[3], [3]]


def test_unbatched_model_takes_the_shape_as_is(client: Any) -> None:
    """A model without a batch dimension takes the shape as it is."""
    answer = infer(client, "unbatched", floats([1, 2, 3, 4], [5, 6, 7, 8]))
    assert answer.as_numpy("y").tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]


def test_empty_output_has_no_values(client: Any) -> None:
    """An output may have no values."""
    answer = infer(client, "empty_output", floats([1, 2], [3, 4]))
    assert answer.get_output("y")["shape"] == [2, 0]


def test_shout_returns_upper_case_and_length(client: Any) -> None:
    """Text goes in as BYTES; text and numbers come out."""
    text = np.array([[b"quiet"], ["gr\u00fcn".encode()]], np.object_)
    answer = infer(client, "shout", {"text": ("BYTES", text)})
    assert answer.as_numpy("loud").tolist() == [[b"QUIET"], [b"GR\xc3\xbcN"]]
    assert answer.as_numpy("length_bytes").tolist() == [[5], [5]]


def test_classifier_returns_labels(client: Any) -> None:
    """Classification returns value, index and label."""
    wanted = tritonclient.InferRequestedOutput("scores", class_count=2)
    answer = infer(client, "classifier", floats([0, 3, 1, 2]), outputs=[wanted]).as_numpy("scores")
    assert answer.tolist() == [[f"3.000000:1:{LABELS[1]}".encode(), f"2.000000:3:{LABELS[3]}".encode()]]


def test_ensemble_runs_both_steps(client: Any) -> None:
    """Two steps double the input twice."""
    assert infer(client, "ensemble", floats([1, 2, 3, 4])).as_numpy("y").tolist() == [[4, 8, 12, 16]]


def test_running_sum_requires_the_start_flag(client: Any) -> None:
    """A sequence is summed up; a request without a sequence start is refused."""

    def step(value: int, **flags: Any) -> int:
        x = np.array([[value]], np.int32)
        answer = infer(client, "running_sum", {"x": ("INT32", x)}, **flags).as_numpy("y")
        return int(answer.item())

    assert step(2, sequence_id=7, sequence_start=True) == 2
    assert step(3, sequence_id=7) == 5
    assert step(4, sequence_id=7, sequence_end=True) == 9
    with pytest.raises(tritonclient.InferenceServerException, match="START flag"):
        step(1, sequence_id=8)


def test_countdown_is_decoupled(client: Any, triton: LocalTriton) -> None:
    """A plain inference request is refused; the event stream delivers every response."""
    with pytest.raises(tritonclient.InferenceServerException, match="decoupled"):
        infer(client, "countdown", {"count": ("INT32", np.array([3], np.int32))})
    connection = http.client.HTTPConnection(triton.endpoint.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v2/models/countdown/generate_stream", json.dumps({"count": 3}))
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    assert [json.loads(line[5:])["left"] for line in lines if line.startswith("data:")] == [2, 1, 0]


def test_request_facts_reports_id_parameters_and_rows(client: Any) -> None:
    """Both versions of the model see the request's id, parameters and number of rows."""
    for version in ("1", "3"):
        answer = infer(
            client,
            "request_facts",
            floats([0], [0]),
            model_version=version,
            request_id="my request",
            parameters={"tenant": "a", "depth": 2},
        )
        facts = json.loads(answer.as_numpy("facts")[0, 0])
        assert facts == {
            "id": "my request",
            "parameters": {"tenant": "a", "depth": 2},
            "rows": 2,
            "version": version,
        }


def test_slow_sleeps_for_the_given_seconds(client: Any) -> None:
    """The model sleeps for as many seconds as its input says."""

    def computed_nanoseconds() -> int:
        statistics = client.get_inference_statistics("slow")["model_stats"][0]["inference_stats"]
        return int(statistics["compute_infer"]["ns"])

    before = computed_nanoseconds()
    infer(client, "slow", floats([0.3]))
    # Triton counts an execution a moment after it has answered.
    assert settles(lambda: computed_nanoseconds() > before, True)
    assert 0.3e9 <= computed_nanoseconds() - before < 5e9


def test_full_queue_refuses_excess_requests(client: Any) -> None:
    """With more concurrent requests than the queue holds some are refused, and the message says why."""
    with tritonclient.InferenceServerClient(client._parsed_url.netloc, concurrency=20) as many:
        tensor = tritonclient.InferInput("x", [4, 1], "FP32")
        tensor.set_data_from_numpy(np.zeros((4, 1), np.float32))
        pending = [many.async_infer("full_queue", [tensor]) for _ in range(20)]
        refused = 0
        for request in pending:
            try:
                request.get_result()
            except tritonclient.InferenceServerException as error:
                assert "Exceeds maximum queue size" in str(error)
                refused += 1
        assert 0 < refused < 20


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("rejecting", "400", "x is negative: -1"),
        ("unavailable", "503", "x is negative: -1"),
        ("raising", "500", "x is negative: -1"),
    ],
)
def test_negative_values_trigger_the_fault(client: Any, model: str, status: str, message: str) -> None:
    """One negative row fails its request; the next request succeeds."""
    assert infer(client, model, floats([1], [2])).as_numpy("y").tolist() == [[2], [4]]
    with pytest.raises(tritonclient.InferenceServerException, match=message) as caught:
        infer(client, model, floats([1], [-1], [2]))
    assert caught.value.status() == status
    assert infer(client, model, floats([1])).as_numpy("y").tolist() == [[2]]


def test_crashed_model_fails_until_the_server_restarts(client: Any) -> None:
    """Once a model's process has exited, all its requests fail, and the server still reports ready."""
    assert infer(client, "crashing", floats([1])).as_numpy("y").tolist() == [[2]]
    for value in (-1, 1):
        with pytest.raises(tritonclient.InferenceServerException, match=r"Stub process .* is not healthy"):
            infer(client, "crashing", floats([value]))
    assert client.is_server_ready()


def test_hanging_model_never_answers(triton: LocalTriton) -> None:
    """A negative value blocks the request forever; the server stays ready."""
    host = triton.endpoint.removeprefix("http://")
    with tritonclient.InferenceServerClient(host, network_timeout=1) as impatient:
        assert infer(impatient, "hanging", floats([1])).as_numpy("y").tolist() == [[2]]
        with pytest.raises(TimeoutError):
            infer(impatient, "hanging", floats([-1]))
    assert triton.is_ready


def test_one_row_less_returns_a_short_output(client: Any) -> None:
    """Triton passes an output with too few rows on as it is."""
    assert infer(client, "one_row_less", floats([1], [2], [3])).as_numpy("y").tolist() == [[1], [2]]
