"""Metadata, configuration, health and repository index: every request that is not inference.

They go through ``requests``, over the shared session, to one endpoint after another.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from functools import lru_cache, partial
from typing import Any, NamedTuple

import requests

from beam_triton.auth.hook import authorized
from beam_triton.dispatch.tracing import trace_headers
from beam_triton.errors import (
    InferenceError,
    ModelMismatchError,
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
from beam_triton.protocol.contract import agreed, differences
from beam_triton.protocol.paths import (
    MODEL_NAMES,
    REPOSITORY_INDEX,
    SERVER_METADATA,
    checked_version,
    model_config_path,
    model_path,
)
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.redirects import MAX_REDIRECTS, given_host_of, redirected
from beam_triton.transport.reference_counts import Lease

_logger = logging.getLogger(__name__)

_BINARY_EXTENSION = "binary_tensor_data"
_CONFIGURATION_EXTENSION = "model_configuration"
_MIN_SHARE_SECONDS = 0.05
# How long a model that the user has described waits for the server to say whether it takes binary tensors.
_ASIDE_SECONDS = 2.0


class ModelFindings(NamedTuple):
    """A model as its server describes it, and what the library makes of that, in sentences for people."""

    spec: ModelSpec
    notes: tuple[str, ...]


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

    def answer(self, method: str, path: str, body: bytes | None = None) -> requests.Response:
        """The first endpoint's answer as it is, whatever its status.

        Raises:
            TransportError, RemoteProtocolError: it gives none.
        """
        return self._send(method, self._options.urls[0], path, self._options.timeout_seconds, body)

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

    def get_of_model(
        self, path: str, *, what: str, model_name: str, model_version: str | int | None = None
    ) -> dict[str, Any]:
        """As `get`; where the model or version is not there or not ready, the error lists those that are.

        A version that is unloaded while another one is ready has been replaced: that is ModelNotFoundError.
        """
        try:
            return self.get(path, what=what, model_name=model_name)
        except (ModelNotFoundError, ModelNotReadyError) as error:
            version = checked_version(model_version)
            known, states = self._known_models(model_name)
            versions = _known_versions(states) if version else ""
            reworded = with_message(
                error,
                f"{error.message}{self._about_version()}; {known}{versions}",
            )
            if isinstance(reworded, ModelNotReadyError):
                reworded.is_unavailable = (
                    "UNAVAILABLE" in states.values()
                    if version is None
                    else states.get(version) in ("UNAVAILABLE", "UNLOADING")
                )
                if version is not None and reworded.is_unavailable and "READY" in states.values():
                    raise with_message(reworded, reworded.message, ModelNotFoundError) from error
            raise reworded from error

    def repository_index(self) -> list[dict[str, Any]]:
        """The models of the server's repository: name, version, state, reason."""
        # MLServer needs a body, which Triton takes, too.
        index = self._ask("POST", REPOSITORY_INDEX, "repository index", "", body=b"{}")
        if not isinstance(index, list):
            raise RemoteProtocolError("the server's repository index is not a JSON list")
        return [entry for entry in index if isinstance(entry, dict)]

    def listed_models(self) -> list[dict[str, Any]]:
        """As `repository_index`; of a server without one (KServe) the names of its models, in the state
        LISTED."""
        try:
            return self.repository_index()
        except InferenceError as error:
            if error.retryable or error.status in (401, 403):
                raise
            names = self._ask("GET", MODEL_NAMES, "list of models", "")
            if isinstance(names, dict):
                names = names.get("models")
            if not isinstance(names, list):
                raise
            return [{"name": name, "state": "LISTED"} for name in names if isinstance(name, str)]

    def takes_binary_tensors(self, *, is_described_by_user: bool = False) -> bool:
        """Whether tensors travel in binary: the option's value, or whether the server has the extension.

        A server of a model that the user has described is asked in passing: while it does not answer it is
        taken for a Triton, as the description is to work without a server in reach.
        """
        if self._options.binary is not None:
            return self._options.binary
        if any(url.door is not None for url in self._options.urls):
            # Only a Triton is known to stand behind one.
            return True
        if not is_described_by_user:
            return self._has_extension(_BINARY_EXTENSION)
        try:
            return self._has_extension(_BINARY_EXTENSION, within_seconds=_ASIDE_SECONDS)
        except TritonError:
            return True

    def model_spec(self, model_name: str, model_version: str | int | None) -> ModelSpec:
        """The model's inputs, outputs and limits; see `TritonClient.model_spec`.

        Where ``model_spec`` comes from a lock file, the served model as the lock allows it to be used.

        Raises:
            ModelMismatchError: the served model differs harmfully from the locked one.
        """
        found = self.findings(model_name, model_version)
        for note in found.notes:
            self.warn_once(f"model {model_name!r}: {note}")
        locked = self._options.spec_of(model_name)
        return found.spec if locked is None else self._held_to(locked, found.spec)

    def warn_once(self, text: str) -> None:
        """Log ``text`` about these servers, once in a process."""
        _warn_once(self._options.urls[0], text)

    def _held_to(self, locked: ModelSpec, served: ModelSpec) -> ModelSpec:
        outputs = self._options.outputs
        limit = self._options.batching.max_batch_size
        found = differences(locked, served, outputs=outputs, max_batch_size=limit)
        about = "; ".join(difference.text for difference in found)
        how = f"lock it again by python -m beam_triton lock {self._options.urls[0]} {locked.name}"
        if found and found[0].is_harmful:
            raise ModelMismatchError(
                f"model {locked.name!r} at {self._options.urls[0]} is not the one that {locked.lock_file} "
                f"describes: {about}. If that is meant, {how}, and start the job again"
            )
        if found:
            self.warn_once(
                f"model {locked.name!r} differs from that of {locked.lock_file}, without harm: "
                f"{about}. To use what is new, {how}"
            )
        return agreed(locked, served, outputs)

    def findings(self, model_name: str, model_version: str | int | None) -> ModelFindings:
        """The model's inputs, outputs and limits, and what was not said by the server itself."""
        get = partial(self.get_of_model, model_name=model_name, model_version=model_version)
        metadata = get(model_path(model_name, model_version), what="metadata")
        config = None
        if self._has_extension(_CONFIGURATION_EXTENSION):
            config = get(model_config_path(model_name, model_version), what="configuration")
        limit = self._options.batching.max_batch_size
        spec = ModelSpec.from_server(metadata, config, limit)
        server_limit = None if config is None else config.get("max_batch_size", 0)
        notes = [_batching_note(spec, limit, server_limit)]
        if not spec.inputs:
            notes.append("the server does not name the inputs: names and datatypes come from the elements")
        known = {output.name for output in spec.outputs}
        for name in (
            str(each["name"]) for each in metadata.get("outputs") or () if each["name"] not in known
        ):
            notes.append(f"output {name!r} is left out: its datatype is none of the protocol's")
        return ModelFindings(spec, tuple(filter(None, notes)))

    def _has_extension(self, name: str, within_seconds: float = math.inf) -> bool:
        if self._extensions is None:
            try:
                metadata = self._ask("GET", SERVER_METADATA, "server metadata", "", within_seconds)
            except InferenceError as error:
                # ModelMesh's REST proxy and some ingresses pass models on only.
                if error.status not in (404, 405, 501):
                    raise
                metadata = {}
            extensions = metadata.get("extensions") if isinstance(metadata, dict) else None
            found = extensions if isinstance(extensions, list) else []
            self._extensions = frozenset(entry for entry in found if isinstance(entry, str))
            if _BINARY_EXTENSION not in self._extensions and self._options.binary is None:
                self.warn_once(
                    f"the server does not announce binary tensors (no {_BINARY_EXTENSION} extension): they "
                    f"travel as JSON, which is slower; binary=True sends them in binary all the same",
                )
        return name in self._extensions

    def _known_models(self, model_name: str) -> tuple[str, dict[str, str]]:
        """What the server has, in words, and the states of the model's versions."""
        try:
            index = self.listed_models()
        except TritonError:
            return "the server does not list its models", {}
        names, states = set(), {}
        for entry in index:
            name, state = str(entry.get("name")), str(entry.get("state") or "UNAVAILABLE")
            names.add(_with_state(name, state))
            if name == model_name:
                states[str(entry.get("version") or "")] = state
        return f"the server has: {', '.join(sorted(names)) or 'no models'}", states

    def _about_version(self) -> str:
        version = self._options.model_version
        if version is None or str(version).isdigit():
            return ""
        return (
            f" (model_version={version!r}: Triton's versions are numbers, and it serves the newest where "
            f"none is named)"
        )

    def _ask(
        self,
        method: str,
        path: str,
        what: str,
        model_name: str,
        within_seconds: float = math.inf,
        *,
        body: bytes | None = None,
    ) -> Any:
        turns = self._turns(within_seconds)

        def ask_next() -> Any:
            url, share_seconds = next(turns)
            response = self._send(method, url, path, share_seconds, body)
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
                raise _naming_proxy(refusal, self._options.network.routed(url))
            try:
                document = json.loads(response.content)
            except (ValueError, RecursionError):
                foreign = RemoteProtocolError(
                    f"{url} is not a server of the Open Inference Protocol: {path} answered with "
                    f"{response.content[:60]!r} instead of JSON"
                )
                foreign.is_foreign = True
                raise foreign from None
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

    def _turns(self, within_seconds: float = math.inf) -> Iterator[tuple[EndpointUrl, float]]:
        """The endpoints in the order to ask them, each with its share of the time that is left."""
        # The sort is stable: all but the first keep the user's order.
        urls = sorted(self._options.urls, key=lambda url: url != self._answered_last)
        left_seconds = min(self._options.timeout_seconds, within_seconds)
        for index, url in enumerate(urls):
            started = time.monotonic()
            yield url, left_seconds / (len(urls) - index)
            # The last ones keep a moment even where the others overran their shares.
            left_seconds = max(left_seconds - (time.monotonic() - started), _MIN_SHARE_SECONDS)

    def _send(
        self, method: str, url: EndpointUrl, path: str, timeout_seconds: float, body: bytes | None = None
    ) -> requests.Response:
        deadline = time.monotonic() + timeout_seconds
        headers = self._options.header_values()
        given_host = given_host_of(headers)
        if body is not None:
            headers = {"Content-Type": "application/json", **headers}
        redirects, left_seconds, first = 0, timeout_seconds, url
        while True:
            send = partial(self._send_once, method, url, path, headers, body, left_seconds)
            try:
                response = resend(send, random.random)
            except requests.RequestException as error:
                foreign = RemoteProtocolError(f"{url}: the answer cannot be read: {error}")
                foreign.is_foreign = True
                raise foreign from error
            except TritonError as error:
                if isinstance(error, RemoteProtocolError):
                    error.is_foreign = True
                if redirects:
                    raise with_message(error, f"{error.message} (redirected there by {first})") from error
                raise
            location = response.headers.get("Location")
            step = redirected(url, path, method, response.status_code, location, given_host)
            redirects += 1
            if isinstance(step, str) or redirects > MAX_REDIRECTS:
                return response
            # requests itself would take the user's own headers along to any host.
            url, path = step
            left_seconds = max(deadline - time.monotonic(), _MIN_SHARE_SECONDS)

    def _send_once(
        self,
        method: str,
        url: EndpointUrl,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,
    ) -> requests.Response:
        method, target, own = url.translate(method, path)
        fields = {**url.authorize(headers), **dict(own)}
        fields.update(trace_headers(self._options.traces))
        if self._options.auth is not None and url.may_have_credentials:
            seen = {"Host": url.host_header, "Accept-Encoding": "identity", **fields}
            if method != "GET":
                seen["Content-Length"] = str(len(body or b""))
            target, fields = authorized(
                self._options.auth, method, url.base_url, target, seen, () if body is None else (body,)
            )
        return self._session.value.request(
            method,
            url.origin.url + target,
            headers=fields,
            data=body,
            timeout=timeout_seconds,
            allow_redirects=False,
        )


def _with_state(name: str, state: str) -> str:
    return name if state in ("READY", "LISTED") else f"{name} ({state.lower()})"


def _known_versions(states: Mapping[str, str]) -> str:
    versions = [_with_state(version, state) for version, state in sorted(states.items()) if version]
    return f"; versions of the model: {', '.join(versions)}" if versions else ""


def _naming_proxy(refusal: TritonError, url: EndpointUrl) -> TritonError:
    """A proxy that forwards answers for servers that it cannot reach."""
    proxy = url.origin.forwarding_proxy
    if proxy is None:
        return refusal
    return with_message(refusal, f"{refusal.message} (through the proxy {proxy})")


def _batching_note(spec: ModelSpec, limit: int | None, server_limit: int | None) -> str:
    """How elements are put into requests where the server does not say it, and what changes that; or "".

    ``limit`` is the option's, ``server_limit`` that of the configuration, None where there is none.
    """
    if server_limit:
        return ""
    if server_limit == 0:
        if spec.has_batch_dimension:
            return f"batches are made of the first dimension, up to {limit} as batching.max_batch_size says"
        return "the model has no batch dimension: batching.max_batch_size is not used" if limit else ""
    unsaid = f"the server does not report batch limits (no {_CONFIGURATION_EXTENSION} extension):"
    if limit:
        return f"{unsaid} requests hold up to {limit} elements, as batching.max_batch_size says"
    if spec.has_batch_dimension:
        return (
            f"{unsaid} the first dimension, -1 for all inputs and outputs, is taken for the batch, elements "
            f"come without it, and requests hold up to {spec.max_batch_size}. batching.max_batch_size sets "
            f"another number, model_spec another meaning"
        )
    open_inputs = bool(spec.inputs) and all(each.shape[:1] == (-1,) for each in spec.inputs)
    whole = [each.name for each in spec.outputs if each.shape[:1] != (-1,)]
    if open_inputs and whole:
        reason = f"output {', '.join(map(repr, whole))} has no batch dimension (-1) in the metadata"
    elif spec.inputs and all(each.shape[:1] == (1,) for each in spec.inputs):
        reason = "the first dimension is fixed at 1"
    else:
        reason = "the metadata show no batch dimension (a first one of -1)"
    return (
        f"{unsaid} {reason}, so that each element is sent alone; give batching.max_batch_size if the model "
        f"takes batches"
    )


@lru_cache(maxsize=1024)
def _warn_once(url: EndpointUrl, text: str) -> None:
    _logger.warning("%s: %s", url, text)
