"""Every request has an id of its own, by which the server's log names it."""

from __future__ import annotations

import json
import multiprocessing
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.typehints.batch import NumpyArray

from beam_triton import (
    ModelSpec,
    TensorSpec,
    TritonBatchInference,
    TritonClient,
    TritonInference,
    TritonModelHandler,
)
from beam_triton.options import InferenceOptions
from beam_triton.remote_model import RemoteModel, new_request_id
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.pipelines import run

DOUBLE = FakeModel(
    lambda inputs: {"y": 2 * inputs["x"]},
    inputs={"x": ("FP32", [1])},
    outputs={"y": ("FP32", [1])},
    max_batch_size=4,
)
ELEMENTS = [np.full(1, n, np.float32) for n in range(20)]

TRANSFORMS: dict[str, Any] = {
    "elements": lambda endpoint: TritonInference(endpoint, "double"),
    "parameters": lambda endpoint: TritonInference(endpoint, "double", request_parameters={"a": 1}),
    "RunInference": lambda endpoint: RunInference(
        TritonModelHandler(endpoint, "double"), inference_args={"a": 1}
    ),
    "NumPy batches": lambda endpoint: TritonBatchInference(endpoint, "double"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_request_has_an_id(name: str) -> None:
    """An id that no other request has, beside the request's own parameters."""
    with FakeTriton({"double": DOUBLE}) as triton:
        elements = beam.Create(ELEMENTS, reshuffle=False).with_output_types(NumpyArray[np.float32, (1,)])
        results = run(lambda pipeline: pipeline | elements | TRANSFORMS[name](triton.endpoint)).results
        ids = [request.id for request in triton.requests]
        has_parameters = {"a" in request.parameters for request in triton.requests}
    assert len(results) == len(ELEMENTS)
    assert len(ids) == len(set(ids)) >= 5 and all(ids)
    assert has_parameters == {name in ("parameters", "RunInference")}


def test_retry_has_the_id_of_its_request() -> None:
    """All attempts of a request are found under one id in the log."""
    with FakeTriton({"double": DOUBLE}) as triton, TritonClient(triton.endpoint) as client:
        triton.fail_next(1, status=503)
        client.infer("double", ELEMENTS[0][np.newaxis])
        first, second = triton.requests
    assert first.id == second.id != ""


def test_given_id_is_kept() -> None:
    """``TritonClient.infer(request_id=)`` is sent as it is; without one the answer has the library's."""
    with FakeTriton({"double": DOUBLE}) as triton, TritonClient(triton.endpoint) as client:
        assert client.infer("double", ELEMENTS[0][np.newaxis], request_id='m"ine').id == 'm"ine'
        other = client.infer("double", ELEMENTS[0][np.newaxis], outputs=["y"]).id
        assert [request.id for request in triton.requests] == ['m"ine', other]


@pytest.mark.parametrize("binary", [True, False])
def test_body_has_the_id(binary: bool) -> None:
    """In binary and in JSON requests, in front of what is the same for all requests of a shape."""
    spec = ModelSpec("m", "1", (TensorSpec("x", "FP32", (1,)),), (TensorSpec("y", "FP32", (1,)),), 4)
    model = RemoteModel(spec, InferenceOptions(endpoint="http://triton:8000"), binary=binary)
    found = []
    for _ in range(2):
        encoded = model.encoder.encode_batch([model.encoder.prepare(ELEMENTS[0])])
        body = b"".join(encoded.parts)
        assert len(body) == encoded.content_length
        document = json.loads(body[: encoded.json_length])
        assert document["id"] == encoded.request_id == model.http_request(encoded).request_id
        found.append(document["id"])
    model.close()
    assert found[0] != found[1]


def _put_id(ids: Any) -> None:
    ids.put(new_request_id())


def test_processes_make_different_ids() -> None:
    """A process that was forked counts on from the same number, under a name of its own."""
    fork = multiprocessing.get_context("fork")
    ids = fork.Queue()
    children = [fork.Process(target=_put_id, args=(ids,)) for _ in range(2)]
    for child in children:
        child.start()
    names = {ids.get(timeout=20).partition("-")[0] for _ in children}
    for child in children:
        child.join()
    assert len(names | {new_request_id().partition("-")[0]}) == 3
