"""FakeTriton answers as the real server does: the same requests to both, and the answers compared.

An answer to a good request is compared byte by byte, a refusal by its status, by the error that the library
makes of it, and by its message.
"""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from beam_triton import InferenceError, InvalidRequestError, TritonClient, TritonError
from beam_triton.protocol import error_from_response
from beam_triton.testing import FakeModel, FakeTriton, LocalTriton
from tests.support.models import CATALOGUE, write_models

_FUNCTIONS = {
    "double": lambda x: {"y": 2 * x["x"]},
    "sum_and_difference": lambda x: {"sum": x["a"] + x["b"], "difference": x["a"] - x["b"]},
    "optional_input": lambda x: {"y": x["x"] * x.get("factor", np.float32(1))},
    "unbatched": lambda x: {"y": x["x"] + 1},
    "classifier": lambda x: {"scores": x["x"]},
    "one_row_less": lambda x: {"y": x["x"][:-1]},
    "empty_output": lambda x: {"y": np.empty((len(x["x"]), 0), np.float32)},
    "every_datatype": lambda x: {f"y{name[1:]}": array for name, array in x.items()},
    "shout": lambda x: {
        "loud": [[value.upper() for value in row] for row in x["text"]],
        "length_bytes": [[len(value) for value in row] for row in x["text"]],
    },
    "raising": lambda x: {"y": 2 * _not_negative(x["x"], ValueError)},
    "rejecting": lambda x: {"y": 2 * _not_negative(x["x"], lambda text: InferenceError(text, status=400))},
    "unavailable": lambda x: {"y": 2 * _not_negative(x["x"], lambda text: InferenceError(text, status=503))},
    "request_facts": lambda x: {"facts": [["none"]] * len(x["x"])},
    **{
        f"identity_{name}": lambda x: {"y": x["x"]}
        for name in ("bool", "int8", "fp16", "bf16", "bytes", "fp64", "uint64")
    },
}


def _not_negative(x: Any, error: Any) -> Any:
    if (x < 0).any():
        raise error(f"x is negative: {float(x.min())}")
    return x


def fake_of(name: str) -> FakeModel:
    """The model of the catalogue as a FakeModel."""
    model = CATALOGUE[name]
    return FakeModel(
        _FUNCTIONS[name],
        inputs={each.name: (each.datatype, each.dims) for each in model.inputs},
        outputs={each.name: (each.datatype, each.dims) for each in model.outputs},
        max_batch_size=model.max_batch_size,
        optional_inputs=[each.name for each in model.inputs if each.optional],
        labels={each.name: each.labels for each in model.outputs if each.labels},
        versions=[str(version) for version in model.versions],
    )


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeTriton]:
    with FakeTriton({name: fake_of(name) for name in _FUNCTIONS}) as server:
        yield server


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def answer(endpoint: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
    host = endpoint.removeprefix("http://")
    with closing(http.client.HTTPConnection(host, timeout=30)) as connection:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        sent = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, sent, response.read())


def tensor(name: str, datatype: str, shape: list[int], data: Any = None, **more: Any) -> dict[str, Any]:
    """An input of a request; with ``data`` as JSON."""
    entry = {"name": name, "datatype": datatype, "shape": shape, **more}
    return entry if data is None else {**entry, "data": data}


def x(data: Any = (1.0, 2.0, 3.0, 4.0), shape: tuple[int, ...] = (1, 4), datatype: str = "FP32") -> Any:
    """The input of the model named double."""
    return tensor("x", datatype, list(shape), list(data))


@dataclass(frozen=True)
class Case:
    """An infer request: its JSON, raw tensors after it, and headers beside the one for their length."""

    model: str
    document: Any
    raw: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None

    def request(self) -> tuple[str, str, bytes, dict[str, str]]:
        text = json.dumps(self.document).encode()
        headers = dict(self.headers)
        if self.raw is not None:
            headers["Inference-Header-Content-Length"] = str(len(text))
        body = text + (self.raw or b"") if self.body is None else self.body
        return "POST", f"/v2/models/{self.model}/infer", body, headers


FOUR = np.arange(4, dtype="<f4").tobytes()
BINARY_Y = [{"name": "y", "parameters": {"binary_data": True}}]


def binary_x(size: int = 16, **more: Any) -> dict[str, Any]:
    entry = tensor("x", "FP32", [1, 4], parameters={"binary_data_size": size})
    return {"inputs": [entry], "outputs": BINARY_Y, **more}


def inputs(*entries: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": list(entries), **more}


def _one(value: float) -> dict[str, Any]:
    return inputs(tensor("x", "FP32", [1, 1], [value]))


def ab(a: Any, b: Any) -> dict[str, Any]:
    return inputs(tensor("a", "INT32", [1, 16], a), tensor("b", "INT32", [1, 16], b))


TEXT_2 = b"\x02\0\0\0hi"


def text(shape: list[int], size: int) -> dict[str, Any]:
    return inputs(tensor("text", "BYTES", shape, parameters={"binary_data_size": size}))


GOOD = {
    "json": Case("double", inputs(x())),
    "json with an id": Case("double", inputs(x(), id="abc")),
    "nested json": Case("double", inputs(x([[1.0, 2.0], [3.0, 4.0]]))),
    "a named output": Case("double", inputs(x(), outputs=[{"name": "y"}])),
    "no named output": Case("double", inputs(x(), outputs=[])),
    "a binary output": Case("double", inputs(x(), outputs=BINARY_Y)),
    "all outputs binary": Case("double", inputs(x(), parameters={"binary_data_output": True})),
    "a listed output heeds no request-wide parameter": Case(
        "double", inputs(x(), outputs=[{"name": "y"}], parameters={"binary_data_output": True})
    ),
    "parameters": Case("double", inputs(x(), parameters={"priority": 1, "timeout": 1000, "mine": "a"})),
    "a version": Case("double/versions/1", inputs(x())),
    "not a number": Case("double", inputs(x([1.0, 2.0, 3.0, float("nan")]))),
    "binary": Case("double", binary_x(), FOUR),
    "binary with an id": Case("double", binary_x(id="i7"), FOUR),
    "an optional input left out": Case("optional_input", inputs(x())),
    "an optional input": Case("optional_input", inputs(x(), tensor("factor", "FP32", [1, 1], [3]))),
    "no batch dimension": Case("unbatched", inputs(x([1] * 8, (2, 4)))),
    "inputs in any order": Case(
        "sum_and_difference", {"inputs": list(reversed(ab([1] * 16, [2] * 16)["inputs"]))}
    ),
    "text": Case("shout", inputs(tensor("text", "BYTES", [1, 1], ["héllo"]))),
    "binary text": Case("shout", text([1, 1], 6), TEXT_2),
    "a binary and a JSON output": Case(
        "shout",
        {
            **text([1, 1], 6),
            "outputs": [{"name": "loud", "parameters": {"binary_data": True}}, {"name": "length_bytes"}],
        },
        TEXT_2,
    ),
    "bytes that are not UTF-8, as JSON": Case(
        "identity_bytes",
        inputs(tensor("x", "BYTES", [1, 1], parameters={"binary_data_size": 5})),
        b"\x01\0\0\0\xff",
    ),
    "an empty binary output": Case(
        "empty_output",
        inputs(tensor("x", "FP32", [1, 1], parameters={"binary_data_size": 4}), outputs=BINARY_Y),
        bytes(4),
    ),
    "BF16": Case(
        "identity_bf16",
        inputs(tensor("x", "BF16", [1, 1], parameters={"binary_data_size": 2}), outputs=BINARY_Y),
        b"\x01\x40",
    ),
    "FP16": Case(
        "identity_fp16",
        inputs(tensor("x", "FP16", [1, 1], parameters={"binary_data_size": 2}), outputs=BINARY_Y),
        b"\x01\x40",
    ),
    "FP64 and a long fraction": Case("identity_fp64", inputs(tensor("x", "FP64", [1, 2], [0.1, 1e-300]))),
    "the greatest UINT64": Case("identity_uint64", inputs(tensor("x", "UINT64", [1, 1], [2**64 - 1]))),
    "BOOL": Case("identity_bool", inputs(tensor("x", "BOOL", [1, 2], [True, False]))),
    "a model that loses a row": Case("one_row_less", inputs(tensor("x", "FP32", [2, 1], [1, 2]))),
    "classification": Case(
        "classifier",
        inputs(x([1.5, 4.0, 3.25, 2.0]), outputs=[{"name": "scores", "parameters": {"classification": 2}}]),
    ),
    "more classes than there are": Case(
        "classifier", inputs(x(), outputs=[{"name": "scores", "parameters": {"classification": 9}}])
    ),
    "binary classification": Case(
        "classifier",
        {
            **binary_x(),
            "outputs": [{"name": "scores", "parameters": {"classification": 2, "binary_data": True}}],
        },
        FOUR,
    ),
    "a gzipped request": Case(
        "double",
        None,
        headers={"Content-Encoding": "gzip"},
        body=gzip.compress(json.dumps(inputs(x())).encode()),
    ),
    "a deflated request": Case(
        "double",
        None,
        headers={"Content-Encoding": "deflate"},
        body=zlib.compress(json.dumps(inputs(x())).encode()),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_requests_get_the_same_bytes(triton: LocalTriton, fake: FakeTriton, name: str) -> None:
    """Status, body, content type and header length are the real server's."""
    request = GOOD[name].request()
    real, faked = answer(triton.endpoint, *request), answer(fake.endpoint, *request)
    assert real.status == 200, real.body
    assert (faked.status, faked.body) == (real.status, real.body)
    for header in ("content-type", "inference-header-content-length"):
        assert faked.headers.get(header) == real.headers.get(header)


@pytest.mark.parametrize(
    "accepted", ["gzip", "deflate, gzip", "gzip;q=0.1, identity", "identity", "br", "*", "gzip, deflate"]
)
def test_answers_are_compressed_alike(triton: LocalTriton, fake: FakeTriton, accepted: str) -> None:
    """The same encoding is chosen, and the decompressed answer is the same."""
    request = Case("double", inputs(x()), headers={"Accept-Encoding": accepted}).request()
    real, faked = answer(triton.endpoint, *request), answer(fake.endpoint, *request)
    assert faked.headers.get("content-encoding") == real.headers.get("content-encoding")
    assert decompressed(faked) == decompressed(real)


def decompressed(each: Answer) -> bytes:
    bits = {"gzip": 31, "deflate": 15}.get(each.headers.get("content-encoding", ""))
    return each.body if bits is None else zlib.decompress(each.body, bits)


# These messages are the real server's to the last character; the next ones share a phrase with it.
REFUSED = {
    "an unknown output": Case("double", inputs(x(), outputs=[{"name": "z"}])),
    "an unknown input": Case("double", inputs(tensor("q", "FP32", [1, 4], [1, 2, 3, 4]))),
    "an input twice": Case("double", inputs(x(), x())),
    "an input too few": Case("sum_and_difference", inputs(tensor("a", "INT32", [1, 16], [1] * 16))),
    "no input": Case("double", inputs()),
    "no inputs at all": Case("double", {}),
    "a list": Case("double", [1]),
    "another datatype": Case("double", inputs(x(datatype="FP64"))),
    "no datatype of the protocol": Case("double", inputs(x(datatype="FP8"))),
    "more rows than the model takes": Case("double", inputs(x([1] * 132, (33, 4)))),
    "more rows than the model takes, and an id": Case("double", inputs(x([1] * 132, (33, 4)), id="mine")),
    "too few values, and an id": Case("double", inputs(x([1.0, 2.0, 3.0]), id="mine")),
    "a negative dimension": Case("double", inputs(x(shape=(-1, 4)))),
    "too few values": Case("double", inputs(x([1.0, 2.0, 3.0]))),
    "too many values": Case("double", inputs(x([1.0] * 5))),
    "text for numbers": Case("double", inputs(x(["a", "b", "c", "d"]))),
    "a boolean for a float": Case("double", inputs(x([True, 1, 2, 3]))),
    "a float for an integer": Case("sum_and_difference", ab([1.5] * 16, [1] * 16)),
    "an integer for a boolean": Case("identity_bool", inputs(tensor("x", "BOOL", [1, 1], [1]))),
    "a number for text": Case("shout", inputs(tensor("text", "BYTES", [1, 1], [3]))),
    "neither data nor a size": Case("double", inputs(tensor("x", "FP32", [1, 4]))),
    "data and a size": Case(
        "double", inputs(tensor("x", "FP32", [1, 4], [1, 2, 3, 4], parameters={"binary_data_size": 16})), FOUR
    ),
    "no shape": Case("double", inputs({"name": "x", "datatype": "FP32", "data": [1]})),
    "no datatype": Case("double", inputs({"name": "x", "shape": [1, 4], "data": [1]})),
    "no name": Case("double", inputs({"shape": [1, 4], "datatype": "FP32", "data": [1]})),
    "a model that is not there": Case("nothing", inputs(x())),
    "a version that is not there": Case("double/versions/7", inputs(x())),
    "FP16 as JSON": Case("identity_fp16", inputs(tensor("x", "FP16", [1, 1], [3]))),
    "BF16 as JSON": Case("identity_bf16", inputs(tensor("x", "BF16", [1, 1], [3]))),
    "an FP16 output as JSON": Case(
        "identity_fp16", inputs(tensor("x", "FP16", [1, 1], parameters={"binary_data_size": 2})), bytes(2)
    ),
    "a binary input that is too small": Case("double", binary_x(12), FOUR[:12]),
    "a binary input that is too large": Case("double", binary_x(20), FOUR + bytes(4)),
    "a body that is too short": Case("double", binary_x(), FOUR[:12]),
    "a body that is too long": Case("double", binary_x(), FOUR + bytes(4)),
    "a header length beyond the body": Case(
        "double", inputs(x()), headers={"Inference-Header-Content-Length": "9999"}
    ),
    "a priority of letters": Case("double", inputs(x(), parameters={"priority": "a"})),
    "a reserved parameter": Case("double", inputs(x(), parameters={"triton_x": "a"})),
    "a list as a parameter": Case("double", inputs(x(), parameters={"mine": [1]})),
    "a number as parameters": Case("double", inputs(x(), parameters=3)),
    "a number as the id": Case("double", inputs(x(), id=3)),
    "an encoding that is none": Case("double", inputs(x()), headers={"Content-Encoding": "br"}),
    "a model that refuses a row": Case("rejecting", _one(-1)),
    "a model that is unavailable": Case("unavailable", _one(-1)),
}

SIMILARLY_REFUSED = {
    "an input too many": (
        Case("double", inputs(x(), tensor("q", "FP32", [1, 4], [1, 2, 3, 4]))),
        "expected 1 inputs but got 2 inputs for model 'double'. Got input(s) ['q','x'], but missing",
    ),
    "unequal batch sizes": (
        Case(
            "sum_and_difference",
            inputs(tensor("a", "INT32", [2, 16], [1] * 32), tensor("b", "INT32", [1, 16], [1] * 16)),
        ),
        "batch size does not match other inputs for 'sum_and_difference'",
    ),
    "malformed JSON": (Case("double", None, body=b"{nope"), "failed to parse the request JSON buffer"),
    "a wrong shape": (Case("double", inputs(x([1] * 5, (1, 5)))), "unexpected shape for input 'x' for model"),
    "a missing batch dimension": (Case("double", inputs(x(shape=(4,)))), "Expected [-1,4], got [4]."),
    "a dimension too many": (Case("double", inputs(x(shape=(1, 1, 4)))), "Expected [-1,4], got [1,1,4]."),
    "a batch dimension that the model has not": (
        Case("unbatched", inputs(x([1] * 8, (1, 2, 4)))),
        "Expected [-1,4], got [1,2,4].",
    ),
    "zero rows": (Case("double", inputs(x([], (0, 4)))), "input byte size mismatch for input 'x'"),
    "broken text": (
        Case("shout", text([1, 1], 6), b"\x09\0\0\0hi"),
        "incomplete string data for inference input 'text'",
    ),
    "text too little": (Case("shout", text([2, 1], 6), TEXT_2), "inference input 'text'"),
    "text too much": (Case("shout", text([1, 1], 12), TEXT_2 * 2), "inference input 'text'"),
    "a model that raises": (
        Case("raising", _one(-1)),
        "Failed to process the request(s) for model 'raising_0_0', message: ValueError: x is negative: -1.0"
        "\n\nAt:\n  ",
    ),
    "a missing optional input and a required one": (
        Case("optional_input", inputs(tensor("factor", "FP32", [1, 1], [3]))),
        "input",
    ),
}


def error_of(each: Answer) -> tuple[type[InferenceError], int]:
    """What the library makes of an error answer."""
    return type(error_from_response(each.status, each.body)), each.status


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_the_same(triton: LocalTriton, fake: FakeTriton, name: str) -> None:
    """Status, kind of error and message are the real server's."""
    request = REFUSED[name].request()
    real, faked = answer(triton.endpoint, *request), answer(fake.endpoint, *request)
    assert real.status >= 400
    assert error_of(faked) == error_of(real)
    assert json.loads(faked.body) == json.loads(real.body)


@pytest.mark.parametrize("name", SIMILARLY_REFUSED)
def test_other_refusals_begin_the_same(triton: LocalTriton, fake: FakeTriton, name: str) -> None:
    """Status and kind of error are the real server's, and both messages hold the same phrase."""
    case, phrase = SIMILARLY_REFUSED[name]
    real, faked = answer(triton.endpoint, *case.request()), answer(fake.endpoint, *case.request())
    assert real.status >= 400
    assert error_of(faked) == error_of(real)
    assert phrase in json.loads(real.body)["error"]
    assert phrase in json.loads(faked.body)["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("GET", path)
            for path in (
                *("/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models", "/nothing"),
                *("/v2/models/double", "/v2/models/double/", "/v2/models/double/versions/1"),
                *("/v2/models/double/versions/7", "/v2/models/double/versions/latest"),
                *("/v2/models/double/ready", "/v2/models/double/versions/1/ready"),
                *("/v2/models/double/versions/7/ready", "/v2/models/double/versions/7/config"),
                *("/v2/models/double/versions/7/stats", "/v2/models/nothing", "/v2/models/nothing/ready"),
                *("/v2/models/nothing/config", "/v2/models/nothing/stats", "/v2/models/double/infer"),
                *("/v2/models/unbatched", "/v2/models/request_facts", "/v2/models/request_facts/versions/1"),
                *("/v2/models/every_datatype", "/v2/models/optional_input", "/v2/repository/index"),
            )
        ),
        *(("POST", path) for path in ("/v2/models/double", "/v2/health/ready", "/nothing")),
    ],
)
def test_other_paths_are_answered_alike(
    triton: LocalTriton, fake: FakeTriton, method: str, path: str
) -> None:
    """Health, metadata, and what is not there: status and body are the real server's."""
    body = b"{}" if method == "POST" else None
    real, faked = (
        answer(triton.endpoint, method, path, body, {}),
        answer(fake.endpoint, method, path, body, {}),
    )
    assert (faked.status, faked.body) == (real.status, real.body)


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_the_library_reads_the_same_model(triton: LocalTriton, fake: FakeTriton, name: str) -> None:
    """From metadata and configuration the client makes one description of the model."""
    with TritonClient(triton.endpoint) as real, TritonClient(fake.endpoint) as faked:
        assert faked.model_spec(name) == real.model_spec(name)
        real_config, fake_config = real.model_config(name), faked.model_config(name)
        for key in ("name", "backend", "max_batch_size"):
            assert fake_config[key] == real_config[key]
        for side in ("input", "output"):
            for given, wanted in zip(fake_config[side], real_config[side], strict=True):
                assert given.items() <= {**wanted, "label_filename": ""}.items()


def test_the_library_gets_the_same_tensors(triton: LocalTriton, fake: FakeTriton) -> None:
    """A batch of every datatype comes back alike from both."""
    shape = (3, 2)
    sent: dict[str, Any] = {
        f"x_{each.datatype.lower()}": np.arange(6).reshape(shape).astype(_dtype(each.datatype))
        for each in CATALOGUE["every_datatype"].inputs
        if each.datatype != "BYTES"
    }
    sent["x_bytes"] = [[b"", b"\xff"], ["text", "ü"], [b"x" * 300, b"\0"]]
    with TritonClient(triton.endpoint) as real, TritonClient(fake.endpoint) as faked:
        wanted = real.infer("every_datatype", sent, request_id="mine")
        given = faked.infer("every_datatype", sent, request_id="mine")
    assert (given.model_name, given.model_version, given.id) == ("every_datatype", "1", "mine")
    assert list(given.outputs) == list(wanted.outputs)
    for name, array in wanted.outputs.items():
        assert given.outputs[name].dtype == array.dtype
        np.testing.assert_array_equal(given.outputs[name], array)


def _dtype(datatype: str) -> str:
    return {"BOOL": "?", "BF16": "f4"}.get(datatype, datatype.lower().replace("fp", "float"))


@pytest.mark.parametrize("model", ["rejecting", "raising", "unavailable"])
def test_the_library_raises_the_same_errors(triton: LocalTriton, fake: FakeTriton, model: str) -> None:
    """A batch that the model refuses ends in one kind of error, after the same number of attempts."""
    caught = []
    for server in (triton, fake):
        with (
            TritonClient(
                server.endpoint, retry={"max_retries": 1, "initial_backoff_seconds": 0.01}
            ) as client,
            pytest.raises(TritonError) as error,
        ):
            client.infer(model, {"x": np.array([[1.0], [-1.0]], np.float32)})
        caught.append((type(error.value), [type(each) for each in error.value.attempts]))
    assert caught[0] == caught[1]


def test_statistics_count_alike(triton: LocalTriton, fake: FakeTriton) -> None:
    """Requests, rows and batch sizes are counted alike, and the documents have the same fields."""
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    for server in (triton, fake):
        with TritonClient(server.endpoint) as client:
            (found,) = client.statistics("unavailable")["model_stats"]
            before.append(found)
            for rows in (1, 5, 5):
                client.infer("unavailable", {"x": np.ones((rows, 1), np.float32)})
            with pytest.raises(InvalidRequestError):
                client.infer("rejecting", {"x": -np.ones((1, 1), np.float32)})
            (found,) = client.statistics("unavailable")["model_stats"]
            after.append(found)
            assert set(client.statistics()) == {"model_stats"}
    counts = [
        [
            last["inference_count"] - first["inference_count"],
            last["execution_count"] - first["execution_count"],
            last["inference_stats"]["success"]["count"] - first["inference_stats"]["success"]["count"],
            sizes_between(first, last),
        ]
        for first, last in zip(before, after, strict=True)
    ]
    assert counts[0] == counts[1] == [11, 3, 3, {1: 1, 5: 2}]
    assert set(after[0]) == set(after[1])
    assert set(after[0]["inference_stats"]) == set(after[1]["inference_stats"])
    assert set(after[0]["batch_stats"][0]) == set(after[1]["batch_stats"][0])


def sizes_between(first: dict[str, Any], last: dict[str, Any]) -> dict[int, int]:
    """Batch size to the number of batches that ran between two statistics."""
    earlier, later = (
        Counter({entry["batch_size"]: entry["compute_infer"]["count"] for entry in each["batch_stats"]})
        for each in (first, last)
    )
    return dict(later - earlier)


@pytest.mark.parametrize(("version", "served"), [(None, "3"), ("1", "1"), ("3", "3")])
def test_requests_reach_the_version_they_name(
    triton: LocalTriton, fake: FakeTriton, version: str | None, served: str
) -> None:
    """Without a version the highest one answers."""
    for server in (triton, fake):
        with TritonClient(server.endpoint) as client:
            response = client.infer("request_facts", {"x": np.ones((1, 1), "f4")}, model_version=version)
            assert response.model_version == served


def test_an_unloaded_model_is_refused_alike(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Between unload and load both servers answer alike, in every path of the model."""
    folder = write_models(tmp_path_factory.mktemp("models"), ["double"], instances=1)
    paths = [
        ("GET", f"/v2/models/double{suffix}")
        for suffix in ("", "/ready", "/config", "/stats", "/versions/1", "/versions/1/ready")
    ]
    body = json.dumps(inputs(x())).encode()
    asked = [*((*path, None) for path in paths), ("POST", "/v2/models/double/infer", body)]
    asked.append(("POST", "/v2/models/double/versions/1/infer", body))
    options: dict[str, Any] = {"models_control": "explicit", "load_models": ["double"]}
    with (
        LocalTriton(folder, stop_timeout_seconds=0.1, **options) as real,
        FakeTriton({"double": fake_of("double")}) as faked,
    ):
        real.unload_model("double")
        faked.unload_model("double")
        for request in asked:
            wanted, given = answer(real.endpoint, *request, {}), answer(faked.endpoint, *request, {})
            assert (given.status, given.body) == (wanted.status, wanted.body), request
        with TritonClient(real.endpoint) as real_client, TritonClient(faked.endpoint) as fake_client:
            assert fake_client.repository_index() == real_client.repository_index()
        real.load_model("double")
        faked.load_model("double")
        for server in (real, faked):
            assert answer(server.endpoint, "GET", "/v2/models/double/ready", None, {}).status == 200
