"""Servers of the protocol that are not Triton, with default options, after public reports."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from beam_triton import ConfigurationError, ModelSpec, TensorSpec, TritonClient, TritonInference
from beam_triton.errors import LocalProtocolError, ModelNotFoundError
from tests.support import pipelines
from tests.support.fault_server import FaultServer
from tests.support.scripted_servers import ScriptedServer, Tensor, row_sums, tensor

ROWS = [np.array([n, 1, 2, 3], "f4") for n in range(8)]
SUMS = [n + 6.0 for n in range(8)]


@contextmanager
def serving(server: ScriptedServer) -> Iterator[str]:
    with FaultServer(server) as listening:
        yield listening.endpoint


def score(endpoint: str, elements: Sequence[Any], **options: Any) -> tuple[list[Any], list[Any]]:
    """The results and the dead letters of elements."""
    found = pipelines.score(elements, TritonInference(endpoint, "m", **options).with_exception_handling())
    return found.results, found.failures


def predictions(results: Sequence[Any]) -> list[float]:
    return sorted(float(np.ravel(result.inference["predict"])[0]) for result in results)


def test_elements_come_without_the_batch_dimension_that_the_metadata_show(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A first dimension of -1 everywhere is the batch; the log says so once, with the option."""
    server = ScriptedServer()
    with serving(server) as endpoint, caplog.at_level(logging.WARNING, "beam_triton"):
        for _ in range(2):
            results, failures = score(endpoint, ROWS)
            assert predictions(results) == SUMS and not failures
    assert server.batch_sizes == [8, 8]
    said = [record.message for record in caplog.records if "taken for the batch" in record.message]
    assert len(said) == 1 and "batching.max_batch_size" in said[0] and "model_spec" in said[0]
    assert {result.model_id for result in results} == {"m"}


def test_the_batch_size_option_replaces_the_default() -> None:
    """Three elements a request."""
    server = ScriptedServer()
    with serving(server) as endpoint:
        results, _ = score(endpoint, ROWS, batching={"max_batch_size": 3})
    assert predictions(results) == SUMS
    assert sorted(server.batch_sizes) == [2, 3, 3]


def test_an_element_with_the_batch_dimension_is_told_how_it_should_come() -> None:
    """The message names the shape, and what the first dimension is."""
    with serving(ScriptedServer()) as endpoint:
        _, failures = score(endpoint, [np.zeros((1, 4), "f4")])
    ((_, (kind, message, _)),) = failures
    assert kind is LocalProtocolError
    assert (
        "takes FP32 of shape [4], not shape [1, 4]. An element comes without the batch dimension" in message
    )


def test_nan_travels_as_null_both_ways() -> None:
    """A row with a gap is scored, and its neighbours are not lost to its answer."""
    server = ScriptedServer()
    with serving(server) as endpoint:
        results, failures = score(endpoint, [*ROWS, np.array([np.nan, 1, 2, 3], "f4")])
    assert not failures and server.batch_sizes == [9]
    found = predictions(results)
    assert sorted(filter(np.isfinite, found)) == SUMS and sum(map(np.isnan, found)) == 1


def test_fp16_travels_as_numbers() -> None:
    """MLServer and KServe take it so."""

    def halves(values: Sequence[Any], shape: Sequence[int]) -> list[Tensor]:
        return [{**output, "datatype": "FP16"} for output in row_sums(values, shape)]

    server = ScriptedServer(
        inputs=[tensor("x", "FP16", [-1, 4])], outputs=[tensor("predict", "FP16", [-1, 1])], predict=halves
    )
    with serving(server) as endpoint:
        results, failures = score(endpoint, ROWS)
    assert predictions(results) == SUMS and not failures
    assert results[0].inference["predict"].dtype == np.float16


def with_probabilities(values: Sequence[Any], shape: Sequence[int]) -> list[Tensor]:
    return [*row_sums(values, shape), tensor("predict_proba", "FP32", [shape[0], 2], [0.5] * 2 * shape[0])]


def test_outputs_that_come_only_when_asked_for() -> None:
    """MLServer's scikit-learn runtime: what comes is taken, and what is named is asked for."""
    outputs = [tensor("predict", "FP32", [-1, 1]), tensor("predict_proba", "FP32", [-1, 2])]
    server = ScriptedServer(outputs=outputs, predict=with_probabilities, only_when_asked=["predict_proba"])
    with serving(server) as endpoint:
        results, failures = score(endpoint, ROWS)
        assert not failures and {tuple(result.inference) for result in results} == {("predict",)}
        results, failures = score(endpoint, ROWS, outputs=["predict", "predict_proba"])
    assert not failures
    assert {tuple(result.inference) for result in results} == {("predict", "predict_proba")}


def test_a_server_without_its_own_metadata_is_used() -> None:
    """ModelMesh answers 404 to GET /v2; the model's metadata are enough, or the user's."""
    spec = ModelSpec("m", inputs=(TensorSpec("x", "FP32", (4,)),), max_batch_size=8)
    with serving(ScriptedServer(server_metadata=None)) as endpoint:
        for options in ({}, {"model_spec": spec}):
            results, failures = score(endpoint, ROWS, **options)
            assert predictions(results) == SUMS and not failures


def test_versions_are_strings() -> None:
    """MLServer's own example has v0.1.0; the error for a version that is not found gives Triton's rule."""
    with serving(ScriptedServer(versions=["v0.1.0"])) as endpoint:
        results, _ = score(endpoint, ROWS, model_version="v0.1.0")
        assert {result.model_id for result in results} == {"m:v0.1.0"}
        with (
            TritonClient(endpoint, model_version="latest") as client,
            pytest.raises(ModelNotFoundError, match="Triton's versions are numbers"),
        ):
            client.model_spec("m")


def test_a_fixed_batch_of_one_is_one_element_a_request() -> None:
    """OpenVINO Model Server: elements come with the 1, or without it where max_batch_size is 1."""
    server = ScriptedServer(inputs=[tensor("x", "FP32", [1, 4])], outputs=[tensor("predict", "FP32", [1, 1])])
    with serving(server) as endpoint:
        results, failures = score(endpoint, [row[np.newaxis] for row in ROWS])
        assert predictions(results) == SUMS and not failures
        results, failures = score(endpoint, ROWS, batching={"max_batch_size": 1})
        assert predictions(results) == SUMS and not failures
        _, failures = score(endpoint, ROWS[:1])
        assert "fixed at 1" in failures[0][1][1]
        with (
            TritonClient(endpoint, batching={"max_batch_size": 8}) as client,
            pytest.raises(ConfigurationError, match=r"excludes batching\.max_batch_size=8"),
        ):
            client.model_spec("m")


def test_an_output_of_an_unknown_datatype_is_left_out() -> None:
    """The others come."""

    def labelled(values: Sequence[Any], shape: Sequence[int]) -> list[Tensor]:
        return [tensor("label", "STRING", [shape[0]], ["a"] * shape[0]), *row_sums(values, shape)]

    outputs = [tensor("label", "STRING", [-1]), tensor("predict", "FP32", [-1, 1])]
    with serving(ScriptedServer(outputs=outputs, predict=labelled)) as endpoint:
        results, failures = score(endpoint, ROWS)
    assert predictions(results) == SUMS and not failures
    assert {tuple(result.inference) for result in results} == {("predict",)}


def boxes(values: Sequence[Any], shape: Sequence[int]) -> list[Tensor]:
    """As many boxes as the request has elements, by chance: nothing in the answer shows what is wrong."""
    return [*row_sums(values, shape), tensor("boxes", "FP32", [shape[0], 2], [0.0] * 2 * shape[0])]


def test_an_output_without_a_batch_dimension_is_named_before_anything_is_sent() -> None:
    """Where the metadata show it; alone, an element has all of it, and the other outputs need no care."""
    outputs = [tensor("predict", "FP32", [-1, 1]), tensor("boxes", "FP32", [8, 2])]
    server = ScriptedServer(outputs=outputs, predict=boxes)
    with serving(server) as endpoint:
        with pytest.raises(Exception, match=r"output boxes FP32 .*has no batch dimension"):
            score(endpoint, ROWS, batching={"max_batch_size": 8})
        assert server.batch_sizes == []
        results, failures = score(endpoint, ROWS, batching={"max_batch_size": 8}, outputs=["predict"])
        assert predictions(results) == SUMS and not failures
        results, failures = score(endpoint, ROWS, batching={"max_batch_size": 1})
    assert predictions(results) == SUMS and not failures
    assert {result.inference["boxes"].shape for result in results} == {(1, 2)}


def test_rows_of_the_whole_request_are_not_handed_out() -> None:
    """The metadata have a dimension more than the answer: the batch is halved, and each element has its
    own."""
    outputs = [tensor("predict", "FP32", [-1, 1]), tensor("boxes", "FP32", [-1, -1, 2])]
    server = ScriptedServer(outputs=outputs, predict=boxes)
    with serving(server) as endpoint:
        results, failures = score(endpoint, ROWS)
    assert predictions(results) == SUMS and not failures
    assert {result.inference["boxes"].shape for result in results} == {(1, 2)}


def test_one_unreadable_value_fails_alone() -> None:
    """The batch is halved until the element that gives it stands alone."""

    def words(values: Sequence[Any], shape: Sequence[int]) -> list[Tensor]:
        (output,) = row_sums(values, shape)
        return [{**output, "data": ["many" if value == 9.0 else value for value in output["data"]]}]

    with serving(ScriptedServer(predict=words)) as endpoint:
        results, failures = score(endpoint, ROWS)
    assert predictions(results) == [value for value in SUMS if value != 9.0]
    ((element, (_, message, _)),) = failures
    assert element[0] == 3 and "'many' is not a FP32 value" in message


def test_inputs_that_the_metadata_do_not_name_come_from_the_elements() -> None:
    """With a batch size, elements of equal names and shapes share requests; content types go with them."""
    server = ScriptedServer(inputs=[], outputs=[])
    options: dict[str, Any] = {
        "batching": {"max_batch_size": 8},
        "input_parameters": {"x": {"content_type": "np"}},
    }
    with serving(server) as endpoint:
        results, failures = score(endpoint, [{"x": row} for row in ROWS], **options)
    assert predictions(results) == SUMS and not failures and server.batch_sizes == [8]
    assert server.requests[0]["inputs"][0]["parameters"] == {"content_type": "np"}


def test_json_can_be_said_for_a_described_model() -> None:
    """``binary=False`` holds whatever describes the model, and asks nobody."""
    spec = ModelSpec("m", inputs=(TensorSpec("x", "FP32", (4,)),), max_batch_size=8)
    server = ScriptedServer()
    with FaultServer(server) as listening:
        results, failures = score(listening.endpoint, ROWS, model_spec=spec, binary=False)
        assert {request.target for request in listening.requests} == {"/v2/models/m/infer"}
    assert predictions(results) == SUMS and not failures


@pytest.mark.parametrize(
    "listing",
    [
        {"index": [{"name": "m", "version": "v0.1.0", "state": "READY", "reason": ""}]},
        {"names": {"models": ["m"]}},
    ],
    ids=["mlserver", "kserve"],
)
def test_an_unknown_model_is_told_with_those_that_there_are(listing: dict[str, Any]) -> None:
    """MLServer's index needs a body, KServe has a list of names; nothing else is guessed about the
    address."""
    with (
        serving(ScriptedServer(**listing)) as endpoint,
        TritonClient(endpoint) as client,
        pytest.raises(ModelNotFoundError, match=r"the server has: m$") as caught,
    ):
        client.model_spec("nosuch")
    assert "Open Inference Protocol" not in str(caught.value)
