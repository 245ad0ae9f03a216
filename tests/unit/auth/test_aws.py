"""Requests signed by botocore, verified by the server as AWS does: from what it received."""

from __future__ import annotations

import pickle
from datetime import datetime, timezone

import numpy as np
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from beam_triton import ConfigurationError, TritonClient
from beam_triton.auth import AwsSignature
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.answers import Answer, Origin, Request, forward_to
from tests.support.fault_server import FaultServer

KEY_ID, KEY = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
ECHO = FakeModel(lambda given: {"y": given["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])})


def verifying(origin: Origin, service: str, region: str) -> Origin:
    """An origin that answers only requests whose signature is the one of their method, target and body."""

    def answer(request: Request) -> Answer:
        given = request.header("Authorization")
        signed = given.partition("SignedHeaders=")[2].partition(",")[0].split(";")
        received = AWSRequest(
            method=request.method,
            url=f"http://{request.header('Host')}{request.target}",
            headers={name: request.header(name) for name in signed},
            data=request.body,
        )
        received.context["timestamp"] = request.header("X-Amz-Date")
        signer = SigV4Auth(Credentials(KEY_ID, KEY), service, region)
        text = signer.string_to_sign(received, signer.canonical_request(received))
        expected = signer.signature(text, received)
        made_at = datetime.strptime(request.header("X-Amz-Date"), "%Y%m%dT%H%M%SZ")
        age = abs((datetime.now(timezone.utc) - made_at.replace(tzinfo=timezone.utc)).total_seconds())
        if given.endswith(f"Signature={expected}") and {"host"} <= set(signed) and age < 300:
            return origin(request)
        return Answer(403, b'{"message":"The request signature we calculated does not match"}')

    return answer


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)


@pytest.mark.parametrize("service", ["sagemaker", "execute-api"])
def test_every_request_carries_a_signature_that_the_server_accepts(service: str) -> None:
    """Metadata, health and inference; also one with a session token and compression."""
    auth = pickle.loads(pickle.dumps(AwsSignature("eu-west-1", service)))
    assert KEY.encode() not in pickle.dumps(auth)
    with FakeTriton({"echo": ECHO}) as triton:
        origin = forward_to(int(triton.endpoint.rpartition(":")[2]))
        with (
            FaultServer(verifying(origin, service, "eu-west-1")) as server,
            TritonClient(server.endpoint, auth=auth, compression="gzip") as client,
        ):
            assert client.is_server_ready()
            np.testing.assert_array_equal(client.infer("echo", {"x": X}).outputs["y"], X)


def test_session_token_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a role."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-the-role")
    headers = AwsSignature("eu-west-1")("GET", "http://h/ping", {"Host": "h"}, b"")
    assert headers["X-Amz-Security-Token"] == "of-the-role"


def test_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of these tests does look."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with (
        FaultServer(verifying(lambda request: Answer(), "sagemaker", "eu-west-1")) as server,
        TritonClient(server.endpoint, auth=AwsSignature("eu-west-1")) as client,
    ):
        assert not client.is_server_ready()


def test_missing_credentials_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at an instance's metadata service here."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(ConfigurationError, match="botocore finds no credentials"):
        AwsSignature("eu-west-1")("GET", "http://h/ping", {"Host": "h"}, b"")
    with pytest.raises(ConfigurationError, match="region must be a name"):
        AwsSignature("")
