"""Metadata, configuration, health and repository index: every request that is not inference.

They go through ``requests``, over the shared session, to one endpoint after another.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from typing import Any

import requests

from beam_triton.auth.hook import authorized
from beam_triton.dispatch.tracing import trace_headers
from beam_triton.errors import (
    ModelNotFoundError,
    ModelNotReadyError,
    RemoteProtocolError,
    TransportError,
    TritonError,
    with_message,
)
from beam_triton.options import InferenceOptions
from beam_triton.policy.retry import EndpointView, Limits, repeat, resend
from beam_triton.protocol import ModelSpec, error_from_response
from beam_triton.protocol.paths import REPOSITORY_INDEX, SERVER_METADATA, model_config_path, model_path
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.reference_counts import Lease

_logger = logging.getLogger(__name__)

_BINARY_EXTENSION = "binary_tensor_data"
_CONFIGURATION_EXTENSION = "model_configuration"
_MIN_SHARE_SECONDS = 0.05


class ControlPlane:
    """Asks the endpoints of ``options`` over the leased session, until one of them answers.

    Each has its turn within ``timeout_seconds``, the one that answered last before the others: a silent
    server costs its share of the time once, not for each request.
    """

    def __init__(self, options: InferenceOptions, session: Lease[requests.Session]) -> None:
        self._options = options
        self._session = session
        self._extensions: frozenset[str] | None = None
        self._answered_last: EndpointUrl | None = None

    def is_ok(self, path: str) -> bool:
        """Whether some endpoint answers 200; False where none can be reached or speaks HTTP."""
        for url, share_seconds in self._turns():
            try:
                if self._send("GET", url, path, share_seconds).status_code == 200:
                    self._answered_last = url
                    return True
            except (TransportError, RemoteProtocolError):
                continue
        return False

    def get(self, path: str, *, what: str, model_name: str = "") -> dict[str, Any]:
        """The JSON object at ``path``.

        Raises:
            InferenceError, TransportError: the last endpoint's error, those of the others with it.
            RemoteProtocolError: this is not a server of the Open Inference Protocol.
        """
        document = self._ask("GET", path, what, model_name)
        if not isinstance(document, dict):
            raise RemoteProtocolError(f"{what}: the server answered with JSON that is not an object")
        return document

    def get_of_model(self, path: str, *, what: str, model_name: str) -> dict[str, Any]:
        """As `get`; where the model is not there or not ready, the error lists those that are."""
        try:
            return self.get(path, what=what, model_name=model_name)
        except (ModelNotFoundError, ModelNotReadyError) as error:
            known = self._known_models()
            reworded = with_message(error, f"{error.message}; {known}")
            if isinstance(reworded, ModelNotReadyError):
                reworded.is_unavailable = f"{model_name} (unavailable)" in known
            raise reworded from error

    def repository_index(self) -> list[dict[str, Any]]:
        """The models of the server's repository: name, version, state, reason."""
        index = self._ask("POST", REPOSITORY_INDEX, "repository index", "")
        if not isinstance(index, list):
            raise RemoteProtocolError("the server's repository index is not a JSON list")
        return [entry for entry in index if isinstance(entry, dict)]

    def takes_binary_tensors(self) -> bool:
        """Whether the server has the binary tensor extension; False means JSON."""
        return self._has_extension(_BINARY_EXTENSION)

    def model_spec(self, model_name: str, model_version: str | int | None) -> ModelSpec:
        """The model's inputs, outputs and limits; see `TritonClient.model_spec`."""
        metadata = self.get_of_model(
            model_path(model_name, model_version), what="metadata", model_name=model_name
        )
        config = None
        if self._has_extension(_CONFIGURATION_EXTENSION):
            path = model_config_path(model_name, model_version)
            config = self.get_of_model(path, what="configuration", model_name=model_name)
        limit = self._options.batching.max_batch_size
        spec = ModelSpec.from_server(metadata, config, limit)
        if config is None:
            _logger.warning(
                "the server of %r does not report batch limits (no %s extension): %s",
                model_name,
                _CONFIGURATION_EXTENSION,
                f"batches hold up to {limit}, as batching.max_batch_size says"
                if limit
                else "each element is sent alone; give batching.max_batch_size if the model takes batches",
            )
        if not spec.inputs:
            _logger.warning(
                "the server of %r does not name the model's inputs: names and dtypes come from the elements",
                model_name,
            )
        return spec

    def _has_extension(self, name: str) -> bool:
        if self._extensions is None:
            extensions = self.get(SERVER_METADATA, what="server metadata").get("extensions")
            found = extensions if isinstance(extensions, list) else []
            self._extensions = frozenset(entry for entry in found if isinstance(entry, str))
            if _BINARY_EXTENSION not in self._extensions:
                _logger.warning(
                    "%s: no binary tensors (no %s extension): they travel as JSON, which is slower",
                    self._options.urls[0],
                    _BINARY_EXTENSION,
                )
        return name in self._extensions

    def _known_models(self) -> str:
        try:
            index = self.repository_index()
        except TritonError:
            return "the server does not list its models"
        names = set()
        for entry in index:
            name, state = str(entry.get("name")), str(entry.get("state") or "UNAVAILABLE")
            names.add(name if state == "READY" else f"{name} ({state.lower()})")
        return f"the server has: {', '.join(sorted(names)) or 'no models'}"

    def _ask(self, method: str, path: str, what: str, model_name: str) -> Any:
        turns = self._turns()

        def ask_next() -> Any:
            url, share_seconds = next(turns)
            response = self._send(method, url, path, share_seconds)
            if response.status_code != 200:
                refusal = error_from_response(
                    response.status_code,
                    response.content,
                    model_name=model_name,
                    what=what,
                    retry_after=response.headers.get("Retry-After"),
                    location=response.headers.get("Location"),
                    now=datetime.now(timezone.utc),
                )
                if not refusal.retryable:
                    # A server's refusal holds for all of them; that a server cannot be reached does not.
                    self._answered_last = url
                raise refusal
            try:
                document = json.loads(response.content)
            except (ValueError, RecursionError):
                raise RemoteProtocolError(
                    f"{url} is not a server of the Open Inference Protocol: {path} answered with "
                    f"{response.content[:60]!r} instead of JSON"
                ) from None
            self._answered_last = url
            return document

        return repeat(
            ask_next,
            self._options.retry,
            # Each endpoint has one turn, within its share of the time.
            lambda: Limits(math.inf, max_retries=len(self._options.urls) - 1),
            lambda seconds, error: None,
            random.random,
            EndpointView(has_alternative=True),
        )

    def _turns(self) -> Iterator[tuple[EndpointUrl, float]]:
        """The endpoints in the order to ask them, each with its share of the time that is left."""
        # The sort is stable: all but the first keep the user's order.
        urls = sorted(self._options.urls, key=lambda url: url != self._answered_last)
        left_seconds = self._options.timeout_seconds
        for index, url in enumerate(urls):
            started = time.monotonic()
            yield url, left_seconds / (len(urls) - index)
            # The last ones keep a moment even where the others overran their shares.
            left_seconds = max(left_seconds - (time.monotonic() - started), _MIN_SHARE_SECONDS)

    def _send(self, method: str, url: EndpointUrl, path: str, timeout_seconds: float) -> requests.Response:
        send = partial(self._send_once, method, url, path, timeout_seconds)
        try:
            return resend(send, random.random)
        except requests.RequestException as error:
            raise RemoteProtocolError(f"{url}: the answer cannot be read: {error}") from error

    def _send_once(
        self, method: str, url: EndpointUrl, path: str, timeout_seconds: float
    ) -> requests.Response:
        method, target, own = url.translate(method, path)
        headers = {**url.authorize(self._options.header_values()), **dict(own)}
        headers.update(trace_headers(self._options.traces))
        if self._options.auth is not None:
            fields = {"Host": url.host_header, "Accept-Encoding": "identity", **headers}
            if method != "GET":
                fields["Content-Length"] = "0"
            target, headers = authorized(self._options.auth, method, url.base_url, target, fields)
        return self._session.value.request(
            method, url.origin.url + target, headers=headers, timeout=timeout_seconds, allow_redirects=False
        )
