"""Access tokens of Google Cloud, by google-auth's own classes against a token server on this machine."""

from __future__ import annotations

import json
import logging
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt
from google.oauth2 import service_account

from beam_triton import ConfigurationError, TritonClient
from beam_triton.auth import GoogleCredentials
from beam_triton.testing import FakeModel, FakeTriton
from tests.support import faults
from tests.support.answers import Answer, Request, forward_to
from tests.support.fault_server import FaultServer, serve

X = np.arange(8, dtype=np.float32).reshape(2, 4)
ECHO = FakeModel(lambda given: {"y": given["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])})
NAME = "beam_triton-google-credentials"


class TokenServer:
    """Gives out ``token-1``, ``token-2`` and so on, each after a moment."""

    def __init__(self, lives_seconds: float = 3600, delay_seconds: float = 0.0) -> None:
        self.lives_seconds = lives_seconds
        self.delay_seconds = delay_seconds
        self.given = 0

    def __call__(self, request: Request) -> Answer:
        time.sleep(self.delay_seconds)
        self.given += 1
        token = {
            "access_token": f"token-{self.given}",
            "expires_in": self.lives_seconds,
            "token_type": "Bearer",
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        }
        return Answer(body=json.dumps(token).encode(), headers=(("Content-Type", "application/json"),))


def service_account_at(endpoint: str) -> service_account.Credentials:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    credentials: service_account.Credentials = service_account.Credentials.from_service_account_info(
        {
            "client_email": "worker@project.iam.gserviceaccount.com",
            "private_key": pem.decode(),
            "private_key_id": "1",
            "token_uri": f"{endpoint}/token",
        }
    )
    return credentials


def sent_by(auth: GoogleCredentials) -> str:
    return auth("POST", "http://server/v2", {}, b"").get("authorization", "")


@pytest.fixture
def tokens() -> Iterator[tuple[TokenServer, FaultServer]]:
    token_server = TokenServer()
    with FaultServer(token_server) as server:
        yield token_server, server


def test_token_of_a_service_account_is_sent_with_every_request(
    tokens: tuple[TokenServer, FaultServer],
) -> None:
    """One token for all, got by a signed assertion for the scope of the platform."""
    _, server = tokens
    auth = GoogleCredentials(service_account_at(server.endpoint))
    with (
        FakeTriton({"echo": ECHO}) as triton,
        FaultServer(forward_to(int(triton.endpoint.rpartition(":")[2]))) as front,
        TritonClient(front.endpoint, auth=auth) as client,
    ):
        client.infer("echo", {"x": X})
        client.infer("echo", {"x": X})
        sent = {request.header("Authorization") for request in front.requests}
        assert sent == {"Bearer token-1"} and len(front.requests) >= 5
    (asked,) = server.requests
    claims: Any = jwt.decode(parse_qs(asked.body.decode())["assertion"][0], verify=False)
    assert claims["scope"] == "https://www.googleapis.com/auth/cloud-platform"


def test_default_credentials_of_the_worker_are_found(
    tokens: tuple[TokenServer, FaultServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here those of a workload identity pool, named by GOOGLE_APPLICATION_CREDENTIALS."""
    _, server = tokens
    (tmp_path / "subject").write_text("subject-token")
    pool = "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q"
    document = {
        "type": "external_account",
        "audience": pool,
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": f"{server.endpoint}/token",
        "credential_source": {"file": str(tmp_path / "subject")},
    }
    (tmp_path / "credentials.json").write_text(json.dumps(document))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "credentials.json"))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    auth = pickle.loads(pickle.dumps(GoogleCredentials()))
    assert sent_by(auth) == "Bearer token-1"
    assert b"subject-token" in server.requests[0].body


def test_renewal_keeps_no_request_waiting() -> None:
    """Tokens that live for two seconds are renewed beside the requests, by a slow token server."""
    with FaultServer(TokenServer(lives_seconds=2, delay_seconds=0.4)) as server:
        auth = GoogleCredentials(service_account_at(server.endpoint))
        sent_by(auth)
        longest, seen, until = 0.0, set(), time.monotonic() + 4
        while time.monotonic() < until:
            started = time.monotonic()
            seen.add(sent_by(auth))
            longest = max(longest, time.monotonic() - started)
            time.sleep(0.02)
    assert len(seen) >= 3 and longest < 0.3, f"{longest:.2f} s, {seen}"


def test_refused_token_is_replaced(tokens: tuple[TokenServer, FaultServer]) -> None:
    """A 401 for a token that was revoked: the request goes out again with a new one."""
    _, server = tokens
    with FakeTriton({"echo": ECHO}) as triton:
        port = int(triton.endpoint.rpartition(":")[2])
        with (
            FaultServer(forward_to(port), when=lambda line: b"/infer" in line) as front,
            TritonClient(
                front.endpoint,
                auth=GoogleCredentials(service_account_at(server.endpoint)),
                retry={"max_retries": 0},
            ) as client,
        ):
            front.play([faults.answered(Answer(401)), serve])
            client.infer("echo", {"x": X})
            assert [request.header("Authorization") for request in front.requests][-2:] == [
                "Bearer token-1",
                "Bearer token-2",
            ]


def test_token_server_that_is_down_for_a_moment_is_tried_again(
    tokens: tuple[TokenServer, FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request waits; google-auth's own retries are part of that."""
    _, server = tokens
    server.play([faults.answered(Answer(503))] * 4)
    assert sent_by(GoogleCredentials(service_account_at(server.endpoint))) == "Bearer token-1"


def test_refusal_of_the_token_server_is_told_without_its_words(
    tokens: tuple[TokenServer, FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    """They may repeat what they were sent."""
    caplog.set_level(logging.DEBUG, logger="beam_triton")
    _, server = tokens
    server.play(faults.answered(Answer(400, b'{"error":"invalid_grant","error_description":"k3y"}')))
    auth = GoogleCredentials(service_account_at(server.endpoint))
    with pytest.raises(ConfigurationError, match=r"token could not be fetched \(RefreshError\)") as caught:
        sent_by(auth)
    assert "k3y" not in f"{caught.value!r}{caught.value.__context__!r}{caplog.text}{auth!r}"
    server.play(())
    auth.renew()
    assert sent_by(auth) == "Bearer token-1"


def test_missing_credentials_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the places where google-auth looks."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ConfigurationError, match="no application default credentials on this worker"):
        sent_by(GoogleCredentials())


def test_thread_ends_with_its_credentials(tokens: tuple[TokenServer, FaultServer]) -> None:
    """A process that opens many models keeps no thread of those that it has closed."""
    _, server = tokens
    auth = GoogleCredentials(service_account_at(server.endpoint))
    sent_by(auth)
    before = sum(thread.name == NAME for thread in threading.enumerate())
    del auth
    until = time.monotonic() + 5
    while time.monotonic() < until and sum(thread.name == NAME for thread in threading.enumerate()) >= before:
        time.sleep(0.02)
    assert sum(thread.name == NAME for thread in threading.enumerate()) < before


@pytest.mark.parametrize("given", ["token", 3])
def test_what_is_not_credentials_is_refused(given: Any) -> None:
    """At construction, without the value."""
    with pytest.raises(ConfigurationError, match="takes credentials of google-auth"):
        GoogleCredentials(given)
