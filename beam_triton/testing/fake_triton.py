"""`FakeTriton`: a test double of a Triton server, for any operating system.

A thread with sockets that speaks the protocol as Triton 2.51 does, with Python functions as its models, and
misbehaves when a test asks for it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote

from beam_triton.compression import compress, decompress
from beam_triton.errors import ConfigurationError, RemoteProtocolError
from beam_triton.protocol import ModelSpec
from beam_triton.protocol.datatypes import Array
from beam_triton.testing.fake_model import FakeModel, ServedModel, model_config, model_metadata
from beam_triton.testing.http_server import Connection, HttpServer
from beam_triton.testing.ports import free_port
from beam_triton.testing.server_codec import (
    RefusedError,
    decode_infer_request,
    encode_infer_answer,
)

_MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/(\d+))?(?:/(infer|ready|config|stats))?")
_REPOSITORY_PATH = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")
_GET_PATHS = re.compile(r"/v2|/v2/health/(live|ready)|/v2/models/stats|" + _MODEL_PATH.pattern)
_POST_PATHS = re.compile(r"/v2/repository/index|" + _REPOSITORY_PATH.pattern)
_EXTENSIONS = (
    *("classification", "model_repository", "model_configuration"),
    *("binary_tensor_data", "parameters", "statistics"),
)
# Triton cannot take more either: it counts in 32 bits.
_MAX_BODY_BYTES = 1 << 31


class _Fault(NamedTuple):
    """Misbehaves on a connection whose request was read. ``status`` is None where it gives no answer."""

    play: Callable[[Connection], None]
    status: int | None = None


@dataclass
class RecordedRequest:
    """An inference request that a `FakeTriton` received; each attempt of a client is one.

    ``inputs``, ``parameters``, ``id`` and ``batch_size`` are empty where the request could not be read.
    ``status`` is the status of the answer, None until it is sent and where none was.
    """

    model_name: str
    model_version: str
    headers: dict[str, str]
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    batch_size: int = 0
    status: int | None = None


class FakeTriton:
    """A server on 127.0.0.1 that answers as Triton does; its models are Python functions.

    ::

        double = FakeModel(
            lambda inputs: {"y": 2 * inputs["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])}
        )
        with FakeTriton({"double": double}) as triton:
            triton.fail_next(2, status=503)
            with TestPipeline() as p:
                results = p | beam.Create(elements) | TritonInference(triton.endpoint, "double")
        assert [request.status for request in triton.requests] == [503, 503, 200]

    It serves metadata, configuration, health, statistics, the repository index, loading and unloading, and
    inference with binary and JSON tensors of all datatypes, classification and compression included. It
    refuses what Triton refuses, with Triton's statuses. It has no gRPC, metrics page, decoupled models,
    sequence batching, queue limits or shared memory: `LocalTriton` has them.

    Args:
      models: model name to `FakeModel`.
      port: the port; None takes a free one. It stays the same when the server is stopped and started.
      delay_seconds: how long each inference request waits before its model runs; may be set at any time.

    Raises:
      ConfigurationError: a name or model cannot be served, or, when started, the port is in use.

    Thread-safe. ``is_ready`` is what the server's readiness check says and may be set.
    """

    def __init__(
        self, models: Mapping[str, FakeModel], *, port: int | None = None, delay_seconds: float = 0.0
    ) -> None:
        for name, model in models.items():
            if not isinstance(model, FakeModel):
                raise ConfigurationError(f"model {name!r} must be a FakeModel, not {type(model).__name__}")
        self._models = {name: ServedModel(name, model) for name, model in models.items()}
        self._port = free_port() if port is None else port
        self._lock = threading.Lock()
        self._server: HttpServer | None = None
        self._faults: deque[_Fault] = deque()
        self._requests: list[RecordedRequest] = []
        self._connections_opened = 0
        self.delay_seconds = delay_seconds
        self.is_ready = True

    def __repr__(self) -> str:
        state = "running" if self._server is not None else "not running"
        return f"<FakeTriton {', '.join(self._models)} {state} port={self._port}>"

    def __enter__(self) -> FakeTriton:
        return self.start()

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:PORT``; the same after every restart."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def requests(self) -> list[RecordedRequest]:
        """The inference requests since the first start, in the order of their arrival."""
        with self._lock:
            return list(self._requests)

    @property
    def connections_opened(self) -> int:
        """The connections that clients have opened since the first start."""
        return self._connections_opened

    def start(self) -> FakeTriton:
        """Starts the server; does nothing if it runs."""
        with self._lock:
            if self._server is None:
                try:
                    self._server = HttpServer(self._port, self._answer, self._count_connection)
                except OSError as error:
                    raise ConfigurationError(
                        f"FakeTriton cannot listen on port {self._port} of 127.0.0.1: {error}"
                    ) from error
        return self

    def stop(self) -> None:
        """Ends the server as a crash does: connections are closed, requests in flight get no answer.

        Until `start`, connections are refused. Models stay loaded or not, and faults stay ordered.
        """
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.stop()

    def restart(self) -> None:
        """Stops the server if it runs, and starts it on the same port."""
        self.stop()
        self.start()

    def fail_next(
        self, count: int = 1, *, status: int = 503, message: str = "", retry_after: float | str | None = None
    ) -> None:
        """The next ``count`` inference requests get an error answer, and no model runs.

        ``message`` is the ``error`` of its body, ``retry_after`` its ``Retry-After`` header: seconds, or an
        HTTP date. Faults wait in the order of their calls, and each request takes the next.
        """
        text = message or f"FakeTriton answers {status} because the test asked for it"
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

        self._add_faults(
            count, _Fault(lambda connection: _send_error(connection, status, text, headers), status)
        )

    def drop_next(self, count: int = 1) -> None:
        """The next ``count`` inference requests are read, and their connections closed without an answer."""
        self._add_faults(count, _Fault(Connection.drop))

    def hang_next(self, count: int = 1) -> None:
        """The next ``count`` inference requests get no answer until the client leaves or the server stops."""
        self._add_faults(count, _Fault(_hang))

    def _add_faults(self, count: int, fault: _Fault) -> None:
        with self._lock:
            self._faults.extend([fault] * count)

    def load_model(self, model_name: str) -> None:
        """Loads a model again after `unload_model`."""
        self._model_to_control(model_name).is_loaded = True

    def unload_model(self, model_name: str) -> None:
        """Until `load_model`, requests for the model are refused, and it is not ready."""
        self._model_to_control(model_name).is_loaded = False

    def _model_to_control(self, model_name: str) -> ServedModel:
        if model_name not in self._models:
            raise ConfigurationError(f"FakeTriton has no model {model_name!r}; it has {list(self._models)}")
        return self._models[model_name]

    def _count_connection(self) -> None:
        with self._lock:
            self._connections_opened += 1

    def _answer(self, connection: Connection, body: bytes) -> None:
        path, is_get = connection.path, connection.command == "GET"
        model_path = _MODEL_PATH.fullmatch(path)
        try:
            if model_path is not None and model_path[3] == "infer" and not is_get:
                self._infer(connection, unquote(model_path[1]), model_path[2], body)
                return
            document = self._document(path) if is_get else self._control(path)
        except RefusedError as error:
            _send_error(connection, error.status, error.message)
        else:
            text = b"" if document is None else _json(document)
            connection.send(200, [text], {"Content-Type": "application/json"})

    def _infer(self, connection: Connection, name: str, version: str | None, body: bytes) -> None:
        """Answers an inference request, or plays the fault that waits for it."""
        headers = dict(connection.headers.items())
        recorded = RecordedRequest(name, version or "", headers)
        refused = None
        try:
            model, spec = self._find(name, version)
            request = decode_infer_request(spec, *_plain_body(body, connection))
            recorded.id, recorded.parameters = request.id, request.parameters
            recorded.inputs, recorded.batch_size = request.inputs, request.batch_size
        except RefusedError as error:
            refused = error
        with self._lock:
            self._requests.append(recorded)
            fault = self._faults.popleft() if self._faults else None
        if self.delay_seconds > 0 and not connection.wait(self.delay_seconds):
            connection.drop()
            return
        if fault is not None:
            # Before the client can have the answer, and its test look at the record.
            recorded.status = fault.status
            fault.play(connection)
            return
        try:
            if refused is not None:
                raise refused
            answer = encode_infer_answer(spec, request, model.run(spec, request), model.labels)
        except RefusedError as error:
            recorded.status = error.status
            raise
        recorded.status = 200
        _send_answer(connection, answer.parts, answer.json_bytes)

    def _find(self, name: str, version: str | None) -> tuple[ServedModel, ModelSpec]:
        unknown = f"Request for unknown model: '{name}'"
        model = self._models.get(name)
        if model is None:
            raise RefusedError(404, f"{unknown} is not found")
        if version is not None and version not in model.specs:
            raise RefusedError(404, f"{unknown} version {version} is not found")
        if not model.is_loaded:
            if version is None:
                raise RefusedError(404, f"{unknown} has no available versions")
            raise RefusedError(503, f"{unknown} version {version} is not at ready state")
        return model, model.spec if version is None else model.specs[version]

    def _document(self, path: str) -> Any:
        """What a GET answers with, None for an empty body. Raises RefusedError."""
        if path == "/v2":
            return {"name": "triton", "version": "2.51.0", "extensions": list(_EXTENSIONS)}
        if path == "/v2/health/live":
            return None
        if path == "/v2/health/ready":
            if not self.is_ready:
                raise RefusedError(400, "Server is not ready")
            return None
        if path == "/v2/models/stats":
            loaded = [model for model in self._models.values() if model.is_loaded]
            return {"model_stats": [model.statistics(each) for model in loaded for each in model.specs]}
        match = _MODEL_PATH.fullmatch(path)
        if match is None:
            raise _no_such_path(_POST_PATHS, path)
        name, version, what = unquote(match[1]), match[2], match[3]
        if what == "infer":
            raise RefusedError(405, "Method Not Allowed")
        try:
            model, spec = self._find(name, version)
        except RefusedError:
            if what == "ready":
                raise RefusedError(400, "Model version not ready") from None
            if what == "stats":
                exists = name in self._models and self._models[name].is_loaded
                about = (
                    f"version is not available for model '{name}'" if exists else f"'{name}' is not available"
                )
                raise RefusedError(400, f"requested model {about}") from None
            raise
        if what == "ready":
            return None
        if what == "stats":
            versions = list(model.specs) if version is None else [version]
            return {"model_stats": [model.statistics(each) for each in versions]}
        if what == "config":
            return model_config(spec)
        return model_metadata(spec, [version] if version else spec.versions)

    def _control(self, path: str) -> Any:
        """What a POST that is no inference answers with, None for an empty body. Raises RefusedError."""
        if path == "/v2/repository/index":
            return [
                {"name": name, "version": version, **_state(model)}
                for name, model in sorted(self._models.items())
                for version in model.specs
            ]
        match = _REPOSITORY_PATH.fullmatch(path)
        if match is None:
            raise _no_such_path(_GET_PATHS, path)
        name, action = unquote(match[1]), match[2]
        if name in self._models:
            self._models[name].is_loaded = action == "load"
        elif action == "load":
            raise RefusedError(500, f"failed to load '{name}', failed to poll from model repository")
        return None


def _no_such_path(of_other_method: re.Pattern[str], path: str) -> RefusedError:
    if of_other_method.fullmatch(path):
        return RefusedError(405, "Method Not Allowed")
    return RefusedError(404, "Not Found")


def _state(model: ServedModel) -> dict[str, str]:
    return {"state": "READY"} if model.is_loaded else {"state": "UNAVAILABLE", "reason": "unloaded"}


def _hang(connection: Connection) -> None:
    connection.wait(float("inf"))
    connection.drop()


def _plain_body(body: bytes, connection: Connection) -> tuple[bytes, int | None]:
    """An inference request's body without its compression, and the length of its JSON if it has one."""
    encoding = connection.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        if encoding not in ("gzip", "deflate"):
            raise RefusedError(501, "Unsupported compression type")
        try:
            body = decompress(body, encoding, max_bytes=_MAX_BODY_BYTES)
        except RemoteProtocolError as error:
            raise RefusedError(400, error.message) from None
    length = connection.headers.get("Inference-Header-Content-Length")
    if length is None:
        return body, None
    if not length.strip().isdigit():
        raise RefusedError(400, f"invalid Inference-Header-Content-Length {length!r}")
    return body, int(length)


def _send_answer(connection: Connection, parts: Sequence[bytes | memoryview], json_bytes: int | None) -> None:
    headers = {"Content-Type": "application/json"}
    if json_bytes is not None:
        headers["Content-Type"] = "application/octet-stream"
        headers["Inference-Header-Content-Length"] = str(json_bytes)
    encoding = _best_encoding(connection.headers.get("Accept-Encoding", ""))
    if encoding != "identity":
        headers["Content-Encoding"] = encoding
        parts = [compress(parts, encoding)]
    connection.send(200, parts, headers)


def _send_error(
    connection: Connection, status: int, message: str, headers: Mapping[str, str] | None = None
) -> None:
    connection.send(
        status, [_json({"error": message})], {"Content-Type": "application/json", **(headers or {})}
    )


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _best_encoding(accepted: str) -> str:
    """The encoding of an answer: that of the highest q, and the first of equals, as Triton chooses."""
    best, best_quality = "identity", 0.0
    for item in accepted.split(","):
        name, _, quality = item.strip().partition(";q=")
        if name in ("identity", "gzip", "deflate") and float(quality or 1) > best_quality:
            best, best_quality = name, float(quality or 1)
    return best
