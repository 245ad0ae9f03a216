"""Credentials reach the server and nothing else: no message, log, repr, graph or dead letter shows them."""

from __future__ import annotations

import base64
import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms.display import DisplayData

from beam_triton import TritonClient, TritonInference
from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.testing import LocalTriton
from tests.support import faults
from tests.support.answers import Answer, always, forward_to
from tests.support.fault_server import Fault, FaultServer
from tests.support.numbered_run import MODEL

USER, PASSWORD = "gateway-user", "pa55w0rd-of-the-url"
TOKEN = "t0ken-of-the-service"
KEY = "k3y-in-a-header"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = (PASSWORD, TOKEN, KEY, BASIC)
X = np.arange(6, dtype=np.float32).reshape(2, 3)

FAULTS: dict[str, Fault] = {
    "reset": faults.reset_after_reading,
    "silence": faults.silence,
    "garbage": faults.garbage_status_line,
    "401": faults.answered(Answer(401, b'{"error":"who are you?"}')),
    "403": faults.answered(Answer(403, b"<html>Forbidden</html>")),
    "500": faults.answered(Answer(500, b'{"error":"broken"}')),
    "503": faults.answered(Answer(503)),
    "redirect": faults.answered(Answer(302, b"", (("Location", "http://elsewhere.example/"),))),
}


def with_password(endpoint: str) -> str:
    return endpoint.replace("://", f"://{USER}:{PASSWORD}@")


def assert_secret_free(*shown: object) -> None:
    for text in shown:
        data = text if isinstance(text, bytes) else str(text).encode()
        for secret in SECRETS:
            assert secret.encode() not in data, f"{secret!r} is shown in {data[:2000]!r}"


def everything_of(error: BaseException) -> list[object]:
    """The error as users, logs and other processes see it, with its causes."""
    shown: list[object] = ["".join(traceback.format_exception(error)), repr(error), pickle.dumps(error)]
    for one in (error, error.__cause__, error.__context__, *getattr(error, "attempts", ())):
        shown += [repr(one), repr(getattr(one, "__dict__", {}))]
    return shown


@pytest.mark.parametrize("name", FAULTS)
def test_errors_and_logs_show_no_credentials(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong, errors and the log at level DEBUG show no credential that was sent."""
    caplog.set_level(logging.DEBUG)
    with (
        FaultServer(always(Answer()), FAULTS[name]) as server,
        TritonClient(
            with_password(server.endpoint),
            headers={"X-Api-Key": KEY},
            timeout_seconds=0.5,
            pool={"connect_timeout_seconds": 0.4},
            retry={"max_retries": 1, "initial_backoff_seconds": 0.01},
            circuit_breaker={"when_open": "fail"},
        ) as client,
    ):
        with pytest.raises(TritonError) as caught:
            client.infer(MODEL, {"x": X})
        assert_secret_free(*everything_of(caught.value), repr(client), str(vars(client)), caplog.text)
        if server.requests:
            assert server.requests[0].header("X-Api-Key") == KEY
            assert server.requests[0].header("Authorization") == f"Basic {BASIC}"


def test_connection_errors_show_no_credentials(caplog: pytest.LogCaptureFixture) -> None:
    """Errors for refused connections and unknown hosts name the endpoint without its credentials."""
    caplog.set_level(logging.DEBUG)
    with faults.refusing_port() as port:
        for host in (f"127.0.0.1:{port}", "no-such-host.invalid:8000"):
            with (
                TritonClient(
                    f"http://{USER}:{PASSWORD}@{host}",
                    auth_token=TOKEN,
                    timeout_seconds=2.0,
                    pool={"connect_timeout_seconds": 1.5},
                    retry={"max_retries": 0},
                    circuit_breaker=None,
                ) as client,
                pytest.raises(TritonError) as caught,
            ):
                client.infer(MODEL, {"x": X})
            assert host.partition(":")[0] in str(caught.value)
            assert_secret_free(*everything_of(caught.value))
    assert_secret_free(caplog.text)


@pytest.mark.parametrize(
    "endpoint",
    [
        f"grpc://{USER}:{PASSWORD}@host:8001",
        f"{USER}:{PASSWORD}@host:8000",
        f"http://{USER}:{PASSWORD}@host:port",
        f"http://{USER}:{PASSWORD}@host:8000/?query",
        f"http://{USER}:{PASSWORD}@",
        f"http://{USER}:{PASSWORD}@[::1",
    ],
)
def test_rejected_endpoints_show_no_credentials(endpoint: str) -> None:
    """The error for an invalid endpoint does not repeat its password."""
    with pytest.raises(ConfigurationError) as caught:
        TritonInference(endpoint, MODEL)
    assert_secret_free(*everything_of(caught.value))


@pytest.mark.parametrize("value", [f"{TOKEN}\r\nX: y", f"{TOKEN}\n", f"{TOKEN}\u20ac"])
def test_rejected_tokens_are_not_shown(value: str) -> None:
    """The error for a token that is not a valid header value does not repeat it."""
    with (
        pytest.raises(ConfigurationError) as caught,
        TritonClient("http://127.0.0.1:9", auth_token=value) as client,
    ):
        client.is_server_live()
    assert_secret_free(*everything_of(caught.value))


def test_references_keep_secrets_out_of_the_graph(
    triton: LocalTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With references the secret is in no pickle and no pipeline proto, but still reaches the server."""
    monkeypatch.setenv("TEST_GATEWAY_TOKEN", TOKEN)
    (tmp_path / "key").write_text(KEY + "\n")
    port = int(triton.endpoint.rpartition(":")[2])
    with FaultServer(forward_to(port)) as proxy:
        transform = TritonInference(
            proxy.endpoint,
            MODEL,
            auth_token="env:TEST_GATEWAY_TOKEN",
            headers={"X-Api-Key": f"file:{tmp_path / 'key'}"},
        )
        with beam.Pipeline("FnApiRunner") as pipeline:
            _ = pipeline | beam.Create([np.ones(3, np.float32)]) | transform
            assert_secret_free(pickle.dumps(transform), pipeline.to_runner_api().SerializeToString())
        last = proxy.requests[-1]
        assert last.header("Authorization") == f"Bearer {TOKEN}"
        assert last.header("X-Api-Key") == KEY
        assert all(request.header("X-Api-Key") == KEY for request in proxy.requests)


def test_transforms_show_no_credentials() -> None:
    """No repr, label or display data of a transform contains literal credentials."""
    transform = TritonInference(
        f"http://{USER}:{PASSWORD}@host:8000", MODEL, auth_token=TOKEN, headers={"X-Api-Key": KEY}
    )
    with_failures = transform.with_exception_handling()
    for shown in (transform, with_failures):
        display = DisplayData.create_from(shown)
        assert_secret_free(repr(shown), str(shown), shown.label, [item.get_dict() for item in display.items])


def test_dead_letters_and_metrics_show_no_credentials(caplog: pytest.LogCaptureFixture) -> None:
    """Neither failures that leave the pipeline as data nor the names of counters show a credential."""
    caplog.set_level(logging.DEBUG)
    with FaultServer(always(Answer()), faults.answered(Answer(403, b"no"))) as server:
        transform = TritonInference(
            with_password(server.endpoint),
            MODEL,
            headers={"X-Api-Key": KEY},
            model_spec=model_spec(),
            retry={"max_retries": 0},
        ).with_exception_handling()
        pipeline = beam.Pipeline("FnApiRunner")
        _, failures = pipeline | beam.Create([np.ones(3, np.float32)]) | transform
        _ = failures | beam.Map(assert_failure_secret_free)
        result = pipeline.run()
        result.wait_until_finish()
        assert_secret_free(str(result.metrics().query()), caplog.text)


def assert_failure_secret_free(failure: Any) -> None:
    assert "403" in str(failure)
    assert_secret_free(str(failure))


def model_spec() -> ModelSpec:
    return ModelSpec(
        MODEL,
        "1",
        inputs=(TensorSpec("x", "FP32", (-1,)),),
        outputs=(TensorSpec("y", "FP32", (-1,)),),
        max_batch_size=64,
    )
