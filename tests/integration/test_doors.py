"""Vertex AI's and SageMaker's doors, which the real Triton opens itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from beam_triton import (
    ConfigurationError,
    InferenceError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelSpec,
    TensorSpec,
    TritonClient,
    TritonInference,
)
from beam_triton.auth import AwsSignature
from beam_triton.server.probe import accepts
from beam_triton.testing import ports
from tests.support.answers import forward_to
from tests.support.fault_server import FaultServer
from tests.support.models import throwaway_triton, write_models

ROUTE = "/v1/projects/p/locations/europe-west1/endpoints/12:rawPredict"
SPEC = ModelSpec(
    "echo",
    inputs=(TensorSpec("x", "FP32", (128,)),),
    outputs=(TensorSpec("y", "FP32", (128,)),),
    max_batch_size=64,
)


class Doors(NamedTuple):
    """URLs of one server."""

    vertex: str
    sagemaker: str


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    repository = write_models(tmp_path_factory.mktemp("models"), ["echo", "rejecting"])
    vertex_port, sagemaker_port = ports.free_port(), ports.free_port()
    with throwaway_triton(
        repository,
        extra_args=[
            "--allow-vertex-ai=true",
            f"--vertex-ai-port={vertex_port}",
            "--vertex-ai-default-model=rejecting",
            "--allow-sagemaker=true",
            f"--sagemaker-port={sagemaker_port}",
        ],
        environment_variables={
            "AIP_PREDICT_ROUTE": ROUTE,
            "AIP_HEALTH_ROUTE": "/health",
            "SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "echo",
        },
    ):
        until = time.monotonic() + 30
        while not (accepts(vertex_port) and accepts(sagemaker_port)):
            # Triton opens them after it reports itself ready.
            assert time.monotonic() < until, "the doors did not open"
            time.sleep(0.05)
        yield Doors(
            f"http://127.0.0.1:{vertex_port}{ROUTE}", f"http://127.0.0.1:{sagemaker_port}/invocations"
        )


def elements(count: int) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    return [np.full(128, number, np.float32) for number in range(count)]


def test_pipeline_scores_through_vertex_ai(doors: Doors) -> None:
    """Inputs, outputs and limits come from the server, as anywhere; the model is the one that is named."""
    endpoint = doors.vertex.removesuffix(":rawPredict")
    with TestPipeline() as pipeline:
        scored = pipeline | beam.Create(elements(300)) | TritonInference(endpoint, "echo")
        sums = scored | beam.Map(lambda result: float(result.inference["y"][0]))
        assert_that(sums, equal_to([float(number) for number in range(300)]))


def test_vertex_ai_has_the_whole_control_plane(doors: Doors) -> None:
    """Health, metadata, configuration, index, statistics and their errors."""
    with TritonClient(doors.vertex) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("echo")
        assert not client.is_model_ready("none")
        assert client.server_metadata()["name"] == "triton"
        assert client.model_spec("echo", 1).max_batch_size == 1024
        assert client.model_config("echo")["name"] == "echo"
        assert {entry["name"] for entry in client.repository_index()} == {"echo", "rejecting"}
        assert client.statistics("echo")["model_stats"][0]["name"] == "echo"
        with pytest.raises(ModelNotFoundError, match="the server has: echo, rejecting"):
            client.infer("none", {"x": np.zeros((1, 128), np.float32)})
        with pytest.raises(InferenceError):
            client.infer("rejecting", {"x": np.full((1, 1), -1, np.float32)})


def test_pipeline_scores_through_sagemaker(doors: Doors) -> None:
    """The model is described by hand."""
    with TestPipeline() as pipeline:
        scored = (
            pipeline | beam.Create(elements(300)) | TritonInference(doors.sagemaker, "echo", model_spec=SPEC)
        )
        sums = scored | beam.Map(lambda result: float(result.inference["y"][0]))
        assert_that(sums, equal_to([float(number) for number in range(300)]))


def test_sagemaker_container_has_readiness(doors: Doors) -> None:
    """By its ping; it has no metadata."""
    with TritonClient(doors.sagemaker, model_spec=SPEC) as client:
        assert client.is_server_ready() and client.is_server_live() and client.is_model_ready("echo")
        with pytest.raises(ConfigurationError, match="takes inference requests only"):
            client.server_metadata()
    wrong = dataclasses.replace(SPEC, inputs=(TensorSpec("z", "FP32", (128,)),))
    with (
        TritonClient(doors.sagemaker, model_spec=wrong) as client,
        pytest.raises(InvalidRequestError, match="unexpected inference input 'z'"),
    ):
        client.infer("echo", {"z": np.zeros((1, 128), np.float32)})


def test_signature_covers_what_sagemaker_gets(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook sees the door's path and media type, as the signature must; the model's file is a header."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    port = int(doors.sagemaker.split(":")[2].split("/")[0])
    with (
        FaultServer(forward_to(port)) as front,
        TritonClient(
            f"{front.endpoint}/invocations",
            model_spec=SPEC,
            auth=AwsSignature("eu-west-1"),
            headers={"X-Amzn-SageMaker-Target-Model": "echo.tar.gz"},
        ) as client,
    ):
        x = np.arange(256, dtype=np.float32).reshape(2, 128)
        np.testing.assert_array_equal(client.infer("echo", {"x": x}).outputs["y"], x)
        (request,) = front.requests
    assert request.header("Content-Type").startswith("application/vnd.sagemaker-triton.binary+json;")
    signed = request.header("Authorization").partition("SignedHeaders=")[2].partition(",")[0].split(";")
    assert {"content-type", "host", "x-amz-date", "x-amzn-sagemaker-target-model"} <= set(signed)
