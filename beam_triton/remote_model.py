"""One model on its servers: elements to HTTP requests, answers to tensors.

The codec of `protocol` meets the calls of `dispatch` here. `TritonClient` and the Beam transforms are thin
users of it.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, cast

from beam_triton.compression import compress, decompress
from beam_triton.dispatch.activity import ACTIVITY, OpenedModel
from beam_triton.dispatch.channel import ENDPOINT_SETS, CallOptions, Channel
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.endpoints import EndpointSetKey
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.dispatch.shared_memory import may_share
from beam_triton.doors import error_of_sagemaker, json_length_of
from beam_triton.errors import RemoteProtocolError
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.protocol import (
    EncodedRequest,
    InferRequestEncoder,
    InferResponse,
    ModelSpec,
    TensorSpec,
    decode_infer_response,
    error_from_response,
    join_responses,
)
from beam_triton.protocol.paths import (
    SERVER_READY,
    checked_version,
    infer_path,
    model_ready_path,
    model_statistics_path,
)
from beam_triton.server.lease import lease_server
from beam_triton.transport.exchange import Exchange

_request_numbers = itertools.count(1)
_process_name = ""


def new_request_id() -> str:
    """An id that no other request of any process has: a random name of this process, and a number.

    Servers repeat it in their answers and write it in their logs. All attempts of a request have the same.
    """
    return f"{_process_name}-{next(_request_numbers)}"


def _name_process() -> None:
    global _process_name
    _process_name = secrets.token_hex(8)


_name_process()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_name_process)


class RemoteModel:
    """A model that takes requests; holds references to the process's shared resources.

    Args:
        spec: the model's inputs, outputs and limits.
        options: how requests are made.
        binary: the server takes tensors in binary; otherwise they travel as JSON.
        describe: asks the server for ``spec`` again; None where the user has given it.

    Attributes:
        encoder: of requests for the model as it was described last. Whoever sends several requests keeps to
            one encoder, until `renewed` gives it another.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: InferenceOptions,
        *,
        binary: bool = True,
        describe: Callable[[], ModelSpec] | None = None,
    ) -> None:
        self._new_encoder = partial(
            InferRequestEncoder,
            outputs=options.outputs,
            parameters=_parameters(spec, options),
            classification=options.classification,
            input_parameters=options.input_parameters,
            binary=binary,
            new_id=new_request_id,
            padding=options.batching if options.batching.bucket_boundaries else None,
            shared_memory=_shares_memory(options),
        )
        self._describe = describe
        # The answer depends on these: models that are equal in them share it.
        self._question = (options.model_version, options.model_spec, tuple(options.outputs or ()))
        self.encoder = self._new_encoder(spec)
        self._compression = options.compression
        self._max_response_bytes = options.max_response_bytes
        self._path = infer_path(spec.name, options.model_version)
        # A door without them is not asked.
        statistics_path = (
            model_statistics_path(spec.name, options.model_version) if options.has_metadata else ""
        )
        self.channel = Channel(
            _endpoint_set_key(spec.name, options),
            options.pool,
            options.tls,
            CallOptions(
                timeout_seconds=options.timeout_seconds,
                max_response_bytes=options.max_response_bytes,
                slot_bytes=max(options.batching.max_batch_bytes, BatchingPolicy.max_batch_bytes),
                health_paths=(SERVER_READY, model_ready_path(spec.name, options.model_version)),
                statistics_path=statistics_path,
                instances=spec.instances,
                compressed_on_purpose=options.response_compression is not None,
                network=options.network,
                tracing=options.traces,
            ),
            options.header_values,
            options.auth,
            lease_server(options.endpoint),
        )
        if ACTIVITY.watchers:
            ACTIVITY.tell(OpenedModel(spec.name, spec.describe(), options.shown()))

    @property
    def spec(self) -> ModelSpec:
        """The model's inputs, outputs and limits, as they were described last."""
        return self.encoder.model

    @property
    def is_described_by_user(self) -> bool:
        """``model_spec`` was given: the server is never asked."""
        return self._describe is None

    def renewed(self, encoder: InferRequestEncoder) -> InferRequestEncoder | None:
        """The encoder for the model as it is now; None where it has not changed, or is not to be asked for.

        Waits for the server, which a process asks once in ten seconds at most.

        Raises:
            ConfigurationError: the options do not fit the model as it is now.
            TritonError: the server does not say.
        """
        known = encoder.model
        if self.spec.takes_and_gives_as(known):
            if self._describe is None:
                return None
            question = self.channel.endpoints.model_questions[self._question]
            spec = question.ask(known, self._describe, ModelSpec.takes_and_gives_as)
            if spec.takes_and_gives_as(known):
                return None
            self.encoder = self._new_encoder(spec)
        return self.encoder

    def infer(
        self,
        parts: Sequence[EncodedRequest],
        *,
        is_sequence: bool = False,
        expected: Sequence[TensorSpec] | None = None,
    ) -> InferResponse:
        """Send the parts of one batch, wait for their answers on the calling thread, and join them.

        A batch whose parts two versions have answered, as the server went over from one to the other, is sent
        once more. ``expected`` are the outputs that the answer must hold, those that the encoder requires by
        default.

        Raises:
            TritonError: the error of the first part that failed.
        """
        responses = self._responses(parts, is_sequence, expected)
        if not is_sequence and len({response.model_version for response in responses}) > 1:
            responses = self._responses(parts, is_sequence, expected)
        return join_responses(responses)

    def _responses(
        self, parts: Sequence[EncodedRequest], is_sequence: bool, expected: Sequence[TensorSpec] | None
    ) -> list[InferResponse]:
        dispatcher: Dispatcher[int] = Dispatcher(self.channel)
        read = self.read_response if expected is None else partial(self.read_response, expected=expected)
        try:
            for index, encoded in enumerate(parts):
                dispatcher.submit(index, self.http_request(encoded), read, is_sequence=is_sequence)
            dispatcher.drain()
            calls = [call for _, call in sorted(dispatcher.completed, key=itemgetter(0))]
        finally:
            dispatcher.cancel()
        error = next((call.error for call in calls if call.error is not None), None)
        if error is not None:
            # This frame becomes part of the error's traceback: nothing in it may refer to the error.
            del calls
            try:
                raise error
            finally:
                del error
        return [cast(InferResponse, call.result) for call in calls]

    def http_request(self, encoded: EncodedRequest) -> HttpRequest:
        """The HTTP request that carries an encoded body."""
        headers = _body_headers(encoded.content_type, encoded.json_length, self._compression)
        if self._compression is None:
            parts, length = encoded.parts, encoded.content_length
            return HttpRequest(
                "POST",
                self._path,
                headers,
                parts,
                length,
                encoded.request_id,
                encoded.rows,
                layout=encoded.layout,
            )
        body = compress(encoded.parts, self._compression)
        return HttpRequest("POST", self._path, headers, (body,), len(body), encoded.request_id, encoded.rows)

    def read_response(
        self,
        exchange: Exchange,
        *,
        expected: Sequence[TensorSpec] | None = None,
        places: Mapping[str, memoryview] | None = None,
    ) -> InferResponse:
        """The answer's tensors; ``places`` hold those that are in shared memory.

        Raises:
            InferenceError: the server refused.
            RemoteProtocolError: the answer cannot be read.
        """
        head, body = exchange.head, exchange.body
        assert head is not None
        if head.status != 200:
            status, refusal = error_of_sagemaker(head.status, head.get("x-amzn-errortype"), body)
            raise error_from_response(
                status,
                refusal,
                model_name=self.spec.name,
                retry_after=head.get("retry-after"),
                location=head.get("location"),
                now=datetime.now(timezone.utc),
            )
        encoding = head.get("content-encoding")
        if encoding is not None and encoding.lower() != "identity":
            body = memoryview(decompress(body, encoding.lower(), max_bytes=self._max_response_bytes))
        length = head.get("inference-header-content-length")
        if length is not None and not (length.isascii() and length.isdigit() and len(length) < 16):
            raise RemoteProtocolError(
                f"model {self.spec.name!r}: the answer's Inference-Header-Content-Length is {length[:60]!r}, "
                f"a whole number is expected"
            )
        json_length = json_length_of(head.get("content-type"), body) if length is None else int(length)
        response = decode_infer_response(
            body,
            json_length,
            expected=self.encoder.required_outputs if expected is None else expected,
            places=places,
        )
        # Results name the model that they are of, even where its server does not.
        return response if response.model_name else replace(response, model_name=self.spec.name)

    def close(self) -> None:
        """Release the shared resources. A second call does nothing."""
        self.channel.close()


@lru_cache(maxsize=256)
def _body_headers(
    content_type: str, json_length: int | None, compression: str | None
) -> tuple[tuple[str, str], ...]:
    headers = [("Content-Type", content_type)]
    if json_length is not None:
        headers.append(("Inference-Header-Content-Length", str(json_length)))
    if compression is not None:
        headers.append(("Content-Encoding", compression))
    return tuple(headers)


def is_in_use(model_name: str, options: InferenceOptions) -> bool:
    """Whether the model is open in this process already, with the same options."""
    return ENDPOINT_SETS.reference_count(_endpoint_set_key(model_name, options)) > 0


def _endpoint_set_key(model_name: str, options: InferenceOptions) -> EndpointSetKey:
    return EndpointSetKey(
        tuple(map(options.network.routed, options.urls)),
        model_name,
        options.max_concurrent_requests,
        options.timeout_seconds,
        options.retry,
        options.circuit_breaker,
        None if options.discovery is None else options.discovery_interval_seconds,
        checked_version(options.model_version) or "",
        options.politeness,
        options.shared_memory if _shares_memory(options) else "never",
    )


def _shares_memory(options: InferenceOptions) -> bool:
    return options.compression is None and may_share(
        map(options.network.routed, options.urls), options.shared_memory
    )


def _parameters(spec: ModelSpec, options: InferenceOptions) -> dict[str, Any]:
    """Those of the options; a background job has the model's lowest priority unless they name one."""
    parameters = options.parameters
    if options.politeness == "background" and spec.priority_levels:
        parameters.setdefault("priority", spec.priority_levels)
    return parameters
