"""`TritonClient`: a server of the Open Inference Protocol from plain Python, without Beam."""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from beam_triton.control_plane import ControlPlane, ModelFindings
from beam_triton.errors import (
    ConfigurationError,
    DeadlineExceededError,
    ModelNotReadyError,
    ServerOverloadedError,
    ServerUnavailableError,
    TritonError,
)
from beam_triton.options import InferenceOptions
from beam_triton.policy.circuit_breaker import max_hold_seconds
from beam_triton.policy.retry import Limits, repeat
from beam_triton.protocol import InferRequestEncoder, InferResponse, ModelSpec
from beam_triton.protocol.paths import (
    SERVER_LIVE,
    SERVER_METADATA,
    SERVER_READY,
    model_config_path,
    model_path,
    model_ready_path,
    model_statistics_path,
)
from beam_triton.remote_model import RemoteModel, new_request_id
from beam_triton.server.lease import lease_server
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transport.session import acquire_session

_logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 10.0
# A server that has just become ready does not wait for long.
_LONGEST_PAUSE_SECONDS = 5.0

Self = TypeVar("Self", bound="TritonClient")
T = TypeVar("T")


class TritonClient:
    """A client of one server, or of several that serve the same models.

    Thread-safe. Connections are shared with every user in the process that gives the same ``pool``,
    ``tls`` and ``trust_env``; circuit breakers and limits with those that give the same endpoints and
    policies as well.
    `close`, or the end of a ``with`` block, releases the references.

    Args:
        endpoint: URL such as ``http://triton:8000``, or a list of them for fail-over. A `WorkerTriton` is
            started here, and waited for.
        options: the keyword arguments that `InferenceOptions` describes.

    Raises:
        ConfigurationError: an option cannot work, or the `WorkerTriton` does not start. No server that runs
            elsewhere is asked anything here.

    Example::

        with TritonClient("http://triton:8000") as client:
            response = client.infer("digits", {"image": images})
            response.outputs["probabilities"]
    """

    def __init__(self, endpoint: str | Sequence[str] | WorkerTriton, **options: Any) -> None:
        self._options = InferenceOptions.from_options({"endpoint": endpoint, **options}, owner=type(self))
        self._server_lease = lease_server(self._options.endpoint)
        self._session_lease = acquire_session(self._options.pool, self._options.tls, self._options.network)
        self._parameters = self._options.parameters
        self._lock = threading.Lock()
        self._models: dict[tuple[str, str], RemoteModel] = {}
        self._is_closed = False
        self._control = ControlPlane(self._options, self._session_lease)

    @classmethod
    def from_inference_options(cls: type[Self], options: InferenceOptions) -> Self:
        """A client with options that are checked already."""
        return cls(**{option.name: getattr(options, option.name) for option in dataclasses.fields(options)})

    def __repr__(self) -> str:
        return f"TritonClient({self._options.servers})"

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def infer(
        self,
        model_name: str,
        inputs: Any,
        *,
        model_version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, Any] | None = None,
        classification: Mapping[str, int] | None = None,
        request_id: str = "",
    ) -> InferResponse:
        """Score a batch, and wait for the answer.

        More rows than the model takes at a time are sent as several requests at once.

        Args:
            inputs: input name to array-like *with* the batch dimension where the model has one, or
                the array itself for a model with one input.
            model_version, outputs, classification: replace the client's own.
            parameters: request parameters, over the client's own. A request with a ``sequence_id``
                is not repeated once it may have run.
            request_id: comes back as the response's ``id``; without it, a new one.

        Raises:
            LocalProtocolError: the inputs do not fit the model; the message has names, dtypes and shapes.
            InferenceError: the server refused; ModelNotFoundError lists the models that it has.
            TransportError: no answer within ``timeout_seconds``, attempts included.
        """
        model = self._model(model_name, model_version)
        encoder = model.encoder
        if outputs is not None or classification is not None:
            encoder = InferRequestEncoder(
                model.spec,
                outputs=outputs if outputs is not None else self._options.outputs,
                parameters=self._parameters,
                classification=classification or self._options.classification,
                input_parameters=self._options.input_parameters,
                binary=encoder.binary,
                new_id=new_request_id,
            )
        parts = encoder.encode_in_parts(inputs, parameters=parameters, request_id=request_id)
        is_sequence = "sequence_id" in self._parameters or "sequence_id" in (parameters or ())
        return model.infer(parts, is_sequence=is_sequence, expected=encoder.required_outputs)

    def is_server_live(self) -> bool:
        """Whether some endpoint answers its liveness check; False where none can be reached."""
        return self._control.is_ok(SERVER_LIVE)

    def is_server_ready(self) -> bool:
        """Whether some endpoint is ready for inference; False where none can be reached."""
        return self._control.is_ok(SERVER_READY)

    def is_model_ready(self, model_name: str, model_version: str | int | None = None) -> bool:
        """Whether the model is loaded and ready on some endpoint; False where none can be reached."""
        return self._control.is_ok(model_ready_path(model_name, self._version(model_version)))

    def server_metadata(self) -> dict[str, Any]:
        """``GET /v2``: the server's name, version and protocol extensions."""
        return self._control.get(SERVER_METADATA, what="server metadata")

    def model_metadata(self, model_name: str, model_version: str | int | None = None) -> dict[str, Any]:
        """The model's inputs and outputs as the protocol has them, with the batch dimension.

        Raises:
            ModelNotFoundError: the message lists the models that the server has.
        """
        version = self._version(model_version)
        path = model_path(model_name, version)
        return self._control.get_of_model(path, what="metadata", model_name=model_name, model_version=version)

    def model_config(self, model_name: str, model_version: str | int | None = None) -> dict[str, Any]:
        """The model's configuration, an extension of Triton's."""
        version = self._version(model_version)
        path = model_config_path(model_name, version)
        return self._control.get_of_model(
            path, what="configuration", model_name=model_name, model_version=version
        )

    def statistics(
        self, model_name: str | None = None, model_version: str | int | None = None
    ) -> dict[str, Any]:
        """Counts and durations that the server keeps, of one model or of all of them."""
        path = model_statistics_path(model_name, self._version(model_version) if model_name else None)
        return self._control.get(path, what="statistics", model_name=model_name or "")

    def repository_index(self) -> list[dict[str, Any]]:
        """The models of the server's repository: name, version, state, reason."""
        return self._control.repository_index()

    def model_spec(self, model_name: str, model_version: str | int | None = None) -> ModelSpec:
        """The model's inputs, outputs and limits, as the server reports them.

        A server without Triton's configuration extension does not report its batch limit: it is
        ``batching.max_batch_size`` then. Where that is not given either, a first dimension of -1 that all
        inputs and outputs have is the batch, of 32 elements at most; otherwise each element is sent alone. A
        line in the log says so. Where ``model_spec`` describes the model, the server is not asked here.

        Raises:
            ModelNotFoundError, ModelNotReadyError: with the models that there are, or the reason.
        """
        given = self._options.spec_of(model_name)
        if given is not None:
            return given
        return self._control.model_spec(model_name, self._version(model_version))

    def listed_models(self) -> list[dict[str, Any]]:
        """As `repository_index`; of a server without one, such as KServe's, the names of its models in the
        state ``LISTED``."""
        return self._control.listed_models()

    def takes_binary_tensors(self) -> bool:
        """Whether tensors travel in binary: as ``binary`` says, or as the server announces."""
        return self._control.takes_binary_tensors()

    def model_findings(self, model_name: str) -> ModelFindings:
        """The model's description, and in sentences what the library makes of what the server leaves open.

        Raises:
            ModelNotFoundError, ModelNotReadyError: as `model_spec`.
        """
        given = self._options.spec_of(model_name)
        if given is not None:
            source = "model_spec; the server is not asked"
            if given.lock_file:
                source = f"{given.lock_file}, which the served model has to fit"
            return ModelFindings(given, (f"described by {source}",))
        return self._control.findings(model_name, self._options.model_version)

    def wait_for_model_spec(self, model_name: str) -> ModelSpec:
        """As `model_spec`, tried again for ``timeout_seconds``, or longer as `open_model` does."""
        return _patiently(lambda: self.model_spec(model_name), self._options, self._options.timeout_seconds)

    def open_model(self, model_name: str, *, wait_seconds: float = 0.0) -> RemoteModel:
        """The model, ready for requests; its caller closes it.

        While the server cannot be reached or the model is not ready, tries again for ``wait_seconds``: a
        worker may start while its server restarts. A server that is there but not ready (it holds the
        request, as when it is scaled from zero, answers 502 to 504, or is loading the model) is waited for as
        long as requests wait for it (``max_wait_seconds`` of the circuit breaker), with a line in the log
        every 10 s.
        """
        return _patiently(lambda: self._opened(model_name, self._options), self._options, wait_seconds)

    def close(self) -> None:
        """Release the references to the shared session; a second call does nothing."""
        with self._lock:
            self._is_closed = True
            models, self._models = self._models, {}
        for model in models.values():
            model.close()
        self._session_lease.release()
        if self._server_lease is not None:
            self._server_lease.release()

    def _version(self, model_version: str | int | None) -> str | int | None:
        return self._options.model_version if model_version is None else model_version

    def _model(self, model_name: str, model_version: str | int | None) -> RemoteModel:
        version = self._version(model_version)
        key = (model_name, str(version))
        model = self._models.get(key)
        if model is None:
            self._check_open()
            options = dataclasses.replace(
                self._options, model_version=version, outputs=None, classification=None
            )
            opened = self._opened(model_name, options)
            with self._lock:
                model = opened if self._is_closed else self._models.setdefault(key, opened)
            if model is not opened or self._is_closed:
                # Another thread was faster, or has closed this client.
                opened.close()
                self._check_open()
        return model

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigurationError(f"{self!r} is closed: create another one, or close it later")

    def _opened(self, model_name: str, options: InferenceOptions) -> RemoteModel:
        given = options.spec_of(model_name)
        if given is not None and not (given.lock_file and options.has_metadata):
            if given.lock_file:
                self._control.warn_once(
                    f"the server does not describe its model: {given.lock_file} is used without a comparison"
                )
            return RemoteModel(
                given, options, binary=self._control.takes_binary_tensors(is_described_by_user=True)
            )
        spec = self._control.model_spec(model_name, options.model_version)
        describe = partial(_described_again, model_name, options)
        return RemoteModel(spec, options, binary=self._control.takes_binary_tensors(), describe=describe)


def _described_again(model_name: str, options: InferenceOptions) -> ModelSpec:
    """The model as its server describes it now; waits for it for as long as requests do."""
    with TritonClient.from_inference_options(options) as client:
        return _patiently(
            lambda: client._control.model_spec(model_name, options.model_version),
            options,
            max_hold_seconds(options.circuit_breaker),
        )


def _patiently(operation: Callable[[], T], options: InferenceOptions, wait_seconds: float) -> T:
    """Call ``operation`` until it succeeds, for ``wait_seconds``; longer where a server is starting."""
    started = time.monotonic()
    give_up_at = started + wait_seconds
    ended = threading.Event()
    reason = "no answer yet"

    def attempt() -> T:
        nonlocal give_up_at, reason
        try:
            return operation()
        except TritonError as error:
            reason = error.message
            if wait_seconds and _is_starting(error):
                give_up_at = started + max(wait_seconds, max_hold_seconds(options.circuit_breaker))
            raise

    def log() -> None:
        # On a thread of its own: a server that is starting may hold a request for longer than this.
        while not ended.wait(_LOG_EVERY_SECONDS):
            waited_seconds = time.monotonic() - started
            _logger.warning("waiting for %s for %.0f s so far: %s", options.servers, waited_seconds, reason)

    logger = threading.Thread(target=log, name="beam_triton-waiting", daemon=True)
    logger.start()
    try:
        return repeat(
            attempt,
            options.retry,
            lambda: Limits(give_up_at - time.monotonic(), max_retries=sys.maxsize),
            lambda seconds, _: time.sleep(min(seconds, _LONGEST_PAUSE_SECONDS)),
            random.random,
        )
    finally:
        ended.set()
        logger.join()


def _is_starting(error: TritonError) -> bool:
    """Whether a server is there, and will be able to answer later."""
    if isinstance(error, ModelNotReadyError):
        return not error.is_unavailable
    return isinstance(error, DeadlineExceededError | ServerUnavailableError | ServerOverloadedError)
