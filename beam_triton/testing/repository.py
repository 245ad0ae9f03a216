"""The few calls to a server that starting, loading and unloading need, over the standard library alone."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any, cast
from urllib.parse import quote

from beam_triton.errors import DeadlineExceededError, InferenceError


def is_ready(port: int, *, timeout_seconds: float = 2.0) -> bool:
    """Whether the server on 127.0.0.1 says that all its models can serve."""
    try:
        status, _ = _call("GET", port, "/v2/health/ready", timeout_seconds=timeout_seconds)
    except (OSError, http.client.HTTPException):
        return False
    return status == 200


def load_model(port: int, model_name: str, *, timeout_seconds: float) -> None:
    """Loads or reloads a model; returns when it can serve. Raises `InferenceError` with the reason."""
    _act(port, model_name, "load", timeout_seconds)


def unload_model(port: int, model_name: str, *, timeout_seconds: float) -> None:
    """Unloads a model; returns when its last version is gone, requests in flight included.

    Raises `InferenceError` with the server's reason, and `DeadlineExceededError`.
    """
    deadline = time.monotonic() + timeout_seconds
    _act(port, model_name, "unload", timeout_seconds)
    while any(
        row["name"] == model_name and row.get("state") not in (None, "UNAVAILABLE") for row in index(port)
    ):
        if time.monotonic() > deadline:
            raise DeadlineExceededError(
                f"model {model_name!r} still serves requests {timeout_seconds} s after it was told to unload"
            )
        time.sleep(0.02)


def index(port: int) -> list[dict[str, Any]]:
    """The server's list of models: ``name``, and ``version``, ``state`` and ``reason`` where it has them."""
    status, body = _call("POST", port, "/v2/repository/index", body=b"{}", timeout_seconds=10.0)
    if status != 200:
        raise InferenceError(f"the repository index cannot be read: {_message(body)}", status=status)
    return cast("list[dict[str, Any]]", json.loads(body))


def _act(port: int, model_name: str, action: str, timeout_seconds: float) -> None:
    path = f"/v2/repository/models/{quote(model_name, safe='')}/{action}"
    status, body = _call("POST", port, path, body=b"{}", timeout_seconds=timeout_seconds)
    if status != 200:
        message = _message(body)
        raise InferenceError(
            f"the server did not {action} model {model_name!r}: {message}",
            status=status,
            server_message=message,
            model_name=model_name,
        )


def _call(
    method: str, port: int, path: str, *, timeout_seconds: float, body: bytes | None = None
) -> tuple[int, bytes]:
    # http.client, because urllib.request would send loopback requests to a proxy named in the environment.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode("utf-8", "replace")
