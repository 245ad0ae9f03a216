"""Managed endpoints with a Triton behind them: one path for all requests, and media types of their own.

Triton speaks both doors itself (``--allow-vertex-ai``, ``--allow-sagemaker``), with binary tensors. An
endpoint's path says which door it is; a request of the protocol is translated where its head is written, once
for all requests of its kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from beam_triton.errors import ConfigurationError

_VERTEX_AI = re.compile(
    r"(.*/projects/[^/]+/locations/[^/]+/endpoints/[^/:]+)(:rawPredict|:predict)?|(.*):rawPredict"
)
_SAGEMAKER = re.compile(r"(.*)/(invocations|models/[^/]+/invoke)")
_SIZE = re.compile(r";\s*json-header-size=(\d{1,15})\s*(?:;|$)", re.ASCII)
_JSON_LENGTH = "inference-header-content-length"

Headers = Iterable[tuple[str, str]]


class Translated(NamedTuple):
    """A request as a door takes it: its method, its whole path, and its own header fields."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class VertexAi:
    """An endpoint of Vertex AI: Triton does what a header names, so it has everything that Triton has."""

    path: str
    name = "a Vertex AI endpoint"
    has_metadata = True

    def translate(self, method: str, path: str, headers: Headers) -> Translated:
        """The request to ``path`` of the protocol."""
        own = (("X-Vertex-Ai-Triton-Redirect", path.removeprefix("/")),)
        return Translated("POST", self.path, own + _with_media_type("vertex-ai", headers))


@dataclass(frozen=True)
class SageMaker:
    """An endpoint of SageMaker, or the container behind one, which has a readiness check as well."""

    path: str
    name = "a SageMaker endpoint"
    has_metadata = False

    def translate(self, method: str, path: str, headers: Headers) -> Translated:
        """The request to ``path`` of the protocol.

        Raises:
            ConfigurationError: SageMaker has nothing like it.
        """
        if path.endswith("/infer"):
            return Translated("POST", self.path, _with_media_type("sagemaker", headers))
        is_container = self.path == "/invocations" or self.path.startswith("/models/")
        if is_container and path.endswith(("/ready", "/live")):
            return Translated("GET", "/ping", ())
        raise ConfigurationError(
            f"{self.path} is {self.name}, which takes inference requests only: it has nothing like {path}"
        )


Door = VertexAi | SageMaker


def door_at(path: str) -> Door | None:
    """The door that a URL's path leads to; None for a server of the protocol."""
    vertex = _VERTEX_AI.fullmatch(path)
    if vertex is not None:
        return VertexAi(f"{vertex[1] or vertex[3]}:rawPredict")
    return SageMaker(path) if _SAGEMAKER.fullmatch(path) else None


def json_length_of(content_type: str | None, body: memoryview) -> int | None:
    """The bytes of JSON at the beginning of an answer that has no ``Inference-Header-Content-Length``.

    None where all of it is JSON. Media types of the doors say it; a front that passes neither them nor
    Triton's header on leaves a body whose JSON is its first value.
    """
    text = (content_type or "").lower()
    said = _SIZE.search(text)
    if said is not None:
        return int(said[1])
    if not text.startswith("application/octet-stream"):
        return None
    decoder, length = json.JSONDecoder(), 4096
    while True:
        try:
            # One character for each byte, so that the end counts bytes.
            return decoder.raw_decode(bytes(body[:length]).decode("latin-1"))[1]
        except (ValueError, RecursionError):
            if length >= len(body):
                return None
            length *= 8


def error_of_sagemaker(status: int, kind: str | None, body: memoryview) -> tuple[int, bytes | memoryview]:
    """Status and body of the container's own answer in an error of SageMaker; or a status that means it.

    ``kind`` is the header ``x-amzn-errortype``.
    """
    name = (kind or "").partition(":")[0]
    if name in ("ThrottlingException", "Throttling"):
        return 429, body
    if name in ("InternalFailure", "InternalDependencyException", "InternalServerException"):
        return 503, body
    if status != 424:
        return status, body
    try:
        document = json.loads(bytes(body))
    except (ValueError, RecursionError):
        return status, body
    if not isinstance(document, dict) or "OriginalStatusCode" not in document:
        return status, body
    original, message = document["OriginalStatusCode"], document.get("OriginalMessage")
    if type(original) is not int or not 400 <= original < 600:
        # The container did not answer in SageMaker's time.
        return 504, body
    return original, message.encode() if isinstance(message, str) and message else body


def _with_media_type(door: str, headers: Headers) -> tuple[tuple[str, str], ...]:
    fields = list(headers)
    length = next((value for name, value in fields if name.lower() == _JSON_LENGTH), None)
    if length is None:
        return tuple(fields)
    media_type = f"application/vnd.{door}-triton.binary+json;json-header-size={length}"
    return (
        ("Content-Type", media_type),
        *((name, value) for name, value in fields if name.lower() not in (_JSON_LENGTH, "content-type")),
    )
