"""Managed endpoints: which URL is which door, what is sent there, and what its answers mean."""

from __future__ import annotations

import json

import numpy as np
import pytest

from beam_triton import (
    ConfigurationError,
    InferenceError,
    InvalidRequestError,
    ModelSpec,
    ServerOverloadedError,
    ServerUnavailableError,
    TensorSpec,
    TritonClient,
)
from beam_triton.doors import SageMaker, VertexAi, door_at, json_length_of
from beam_triton.options import InferenceOptions
from beam_triton.transport.origin import EndpointUrl
from tests.support import faults
from tests.support.answers import Answer, Request
from tests.support.fault_server import FaultServer

ENDPOINT = "/v1/projects/p/locations/europe-west1/endpoints/12"
SPEC = ModelSpec(
    "echo",
    inputs=(TensorSpec("x", "FP32", (4,)),),
    outputs=(TensorSpec("y", "FP32", (4,)),),
    max_batch_size=8,
)
X = np.arange(8, dtype=np.float32).reshape(2, 4)
ANSWER = json.dumps(
    {
        "model_name": "echo",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [2, 4], "parameters": {"binary_data_size": 32}}
        ],
    }
).encode()

DOORS = {
    f"https://europe-west1-aiplatform.googleapis.com{ENDPOINT}": VertexAi(f"{ENDPOINT}:rawPredict"),
    f"https://12.europe-west1-1.prediction.vertexai.goog{ENDPOINT}:rawPredict": VertexAi(
        f"{ENDPOINT}:rawPredict"
    ),
    "http://localhost:8080/predict:rawPredict": VertexAi("/predict:rawPredict"),
    "https://runtime.sagemaker.eu-west-1.amazonaws.com/endpoints/digits/invocations": SageMaker(
        "/endpoints/digits/invocations"
    ),
    "http://localhost:8080/invocations": SageMaker("/invocations"),
    "http://localhost:8080/models/digits/invoke": SageMaker("/models/digits/invoke"),
    "http://triton:8000": None,
    "http://gateway/team/projects": None,
    "http://triton:8000/v2/models": None,
}


@pytest.mark.parametrize("url", DOORS)
def test_path_says_which_door_it_is(url: str) -> None:
    """Whatever the host: endpoints are reached through private addresses, too."""
    assert EndpointUrl.parse(url).door == DOORS[url]


def test_vertex_gets_every_request_at_one_path() -> None:
    """The header says what Triton should do; tensors have the door's media type."""
    door = door_at(ENDPOINT)
    assert door is not None
    own = [("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", "70")]
    assert door.translate("POST", "/v2/models/m/infer", own) == (
        "POST",
        f"{ENDPOINT}:rawPredict",
        (
            ("X-Vertex-Ai-Triton-Redirect", "v2/models/m/infer"),
            ("Content-Type", "application/vnd.vertex-ai-triton.binary+json;json-header-size=70"),
        ),
    )
    assert door.translate("GET", "/v2", ()).method == "POST"


def test_sagemaker_has_inference_and_in_a_container_readiness() -> None:
    """Everything else is an error, and not sent."""
    hosted, container = SageMaker("/endpoints/digits/invocations"), SageMaker("/invocations")
    own = [("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", "70")]
    media_type = "application/vnd.sagemaker-triton.binary+json;json-header-size=70"
    for door in (hosted, container):
        assert door.translate("POST", "/v2/models/m/infer", own).headers == (("Content-Type", media_type),)
        with pytest.raises(ConfigurationError, match="has nothing like /v2/models/m/config"):
            door.translate("GET", "/v2/models/m/config", ())
    assert container.translate("GET", "/v2/health/ready", ()) == ("GET", "/ping", ())
    with pytest.raises(ConfigurationError, match="takes inference requests only"):
        hosted.translate("GET", "/v2/health/ready", ())


def test_what_a_door_needs_is_said_at_construction() -> None:
    """Before the job starts."""
    sagemaker, vertex = "http://localhost:8080/invocations", f"http://localhost:8080{ENDPOINT}"
    with pytest.raises(ConfigurationError, match="does not describe its model: give model_spec"):
        InferenceOptions(endpoint=sagemaker)
    with pytest.raises(ConfigurationError, match="leave model_version out"):
        InferenceOptions(endpoint=sagemaker, model_spec=SPEC, model_version=2)
    with pytest.raises(ConfigurationError, match="takes no compressed tensors"):
        InferenceOptions(endpoint=vertex, compression="gzip")
    with pytest.raises(ConfigurationError, match="set by the library"):
        InferenceOptions(endpoint=vertex, headers={"X-Vertex-AI-Triton-Redirect": "v2"})
    assert "invocations" in InferenceOptions(endpoint=sagemaker, model_spec=SPEC).shown()["endpoint"]


ANSWERED_AS = {
    "media type": (
        ("Content-Type", f"application/vnd.sagemaker-triton.binary+json; json-header-size={len(ANSWER)}"),
    ),
    "Triton's header": (
        ("Content-Type", "application/octet-stream"),
        ("Inference-Header-Content-Length", str(len(ANSWER))),
    ),
    "neither": (("Content-Type", "application/octet-stream"),),
}


@pytest.mark.parametrize("headers", ANSWERED_AS.values(), ids=ANSWERED_AS)
def test_tensors_are_found_in_an_answer(headers: tuple[tuple[str, str], ...]) -> None:
    """By the media type, by Triton's header, or by the JSON itself where a front passes neither on."""

    def origin(request: Request) -> Answer:
        assert request.target == "/endpoints/digits/invocations"
        return Answer(200, ANSWER + X.tobytes(), headers)

    with FaultServer(origin) as server:
        url = f"{server.endpoint}/endpoints/digits/invocations"
        with TritonClient(url, model_spec=SPEC) as client:
            np.testing.assert_array_equal(client.infer("echo", {"x": X}).outputs["y"], X)


@pytest.mark.parametrize("size", [10, 4096, 4097, 300_000])
def test_length_of_json_counts_bytes(size: int) -> None:
    """Characters beyond ASCII and braces in strings included."""
    text = json.dumps({"a": "ä}" * (size // 3)}, ensure_ascii=False).encode()
    assert json_length_of("application/octet-stream", memoryview(text + b'{"\xff\0')) == len(text)
    assert json_length_of("application/json", memoryview(text)) is None
    assert json_length_of("application/octet-stream", memoryview(b"\x00" * size)) is None


def sagemaker_error(**fields: object) -> bytes:
    return json.dumps({"ErrorCode": "CLIENT_ERROR_FROM_MODEL", **fields}).encode()


TRITON_400 = json.dumps({"error": "unexpected shape for input 'x'"})
ERRORS = {
    "the container's 400": (
        Answer(424, sagemaker_error(OriginalStatusCode=400, OriginalMessage=TRITON_400)),
        InvalidRequestError,
        "the server answered 400: unexpected shape for input 'x'",
    ),
    "the container's 503": (
        Answer(424, sagemaker_error(OriginalStatusCode=503, OriginalMessage="")),
        ServerUnavailableError,
        "503",
    ),
    "no answer in time": (
        Answer(424, sagemaker_error(OriginalStatusCode=0, Message="Your invocation timed out")),
        ServerUnavailableError,
        "504",
    ),
    "throttled": (
        Answer(400, b'{"message":"Rate exceeded"}', (("x-amzn-errortype", "ThrottlingException:http://x"),)),
        ServerOverloadedError,
        "Rate exceeded",
    ),
    "of the front": (
        Answer(500, b"{}", (("x-amzn-ErrorType", "InternalFailure"),)),
        ServerUnavailableError,
        "503",
    ),
    "without details": (Answer(424, b"{}"), InvalidRequestError, "424"),
    "Google's": (
        Answer(429, b'{"error":{"code":429,"message":"Quota exceeded","status":"RESOURCE_EXHAUSTED"}}'),
        ServerOverloadedError,
        "429: Quota exceeded",
    ),
    "Google's about Triton's": (
        Answer(400, json.dumps({"error": {"code": 400, "message": TRITON_400}}).encode()),
        InvalidRequestError,
        "400: unexpected shape for input 'x'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_a_front_mean_what_the_server_said(name: str) -> None:
    """Kind and message: they decide about retries, and about elements."""
    answer, kind, message = ERRORS[name]
    with (
        FaultServer(lambda request: answer, faults.answered(answer)) as server,
        TritonClient(
            f"{server.endpoint}/invocations",
            model_spec=SPEC,
            retry={"max_retries": 0},
            circuit_breaker=None,
        ) as client,
        pytest.raises(InferenceError) as caught,
    ):
        client.infer("echo", {"x": X})
    assert type(caught.value) is kind and message in caught.value.message
