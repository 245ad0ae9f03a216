"""`TritonModelHandler`, the model behind Beam's ``RunInference``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from beam_triton.errors import TritonError, with_message
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import Batcher
from beam_triton.protocol import (
    EncodedRequest,
    InferRequestEncoder,
    InferResponse,
    PreparedElement,
    checked_parameters,
)
from beam_triton.protocol.paths import model_path
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.metrics import NAMESPACE, InferenceMetrics
from beam_triton.transforms.model_dofn import close_with, default_of, open_model
from beam_triton.transforms.results import prediction_result, rows_of
from beam_triton.transforms.row_inputs import InputReader, columns_of

# An element's index within Beam's batch, and its tensors.
_Item: TypeAlias = tuple[int, PreparedElement]

_NOT_PREPARED = PreparedElement((), (), 0)


class TritonModelHandler(ModelHandler[Any, PredictionResult, RemoteModel]):
    """Scores the elements of Beam's ``RunInference`` on a model of a Triton Inference Server.

    ::

        handler = TritonModelHandler("http://triton:8000", "digits", batching={"max_batch_size": 64})
        scored = images | RunInference(handler)

    An element is what `TritonInference` takes, without a key; for keyed ones Beam has
    ``KeyedModelHandler(handler)``. A result is ``PredictionResult(example, inference, model_id)``.

    `TritonInference` is faster and loses less: here no request of one batch is in flight while the next batch
    is collected, and with ``RunInference.with_exception_handling()`` one failed element makes its whole batch
    a dead letter (the message names the element). ``default_value`` avoids that: only the failed elements
    yield it.

    Batches are Beam's, and larger than a request: ``max_concurrent_requests`` requests of
    ``batching.max_batch_size`` elements, so that they are in flight together, and about as many times
    ``batching.max_batch_bytes`` at most. If neither that nor
    ``model_spec`` determines the size of a request, Beam finds the size of its batches itself, between 1 and
    10,000. With ``batching.linger_seconds`` Beam collects batches across bundles for that long, in its state
    (``max_batch_duration_secs``).

    ``RunInference(handler, inference_args={…})`` sends request parameters, over those of
    ``request_parameters``. The metrics of `TritonInference` and those of ``RunInference`` are both of
    the namespace ``beam_triton``.

    Args:
        endpoint: URL of the server, or a list of them for fail-over.
        model_name: the model.
        options: the keyword arguments that `InferenceOptions` describes.

    Raises:
        ConfigurationError: an option cannot work. Nothing is sent here.
    """

    def __init__(self, endpoint: str | Sequence[str], model_name: str, **options: Any) -> None:
        super().__init__()
        self._options = InferenceOptions.from_options({"endpoint": endpoint, **options})
        model_path(model_name)  # Refuses what is not a name.
        self._options.spec_of(model_name)
        self._model_name = model_name

    def __repr__(self) -> str:
        return f"TritonModelHandler({', '.join(map(str, self._options.urls))}, {self._model_name!r})"

    def load_model(self) -> RemoteModel:
        """Open the model and take a reference to the shared session.

        Beam does not say when it has finished with a model: the reference is released when the model is
        garbage. Beam keeps the last model of a process alive; idle eviction closes its connections.
        """
        model = open_model(self._options, self._model_name)
        close_with(model, model)
        return model

    def run_inference(
        self,
        batch: Sequence[Any],
        model: RemoteModel,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[PredictionResult]:
        """The results of a batch, in its order.

        Elements of one tensor signature share requests, as large as the model allows.

        Raises:
            TritonError: an element failed for good and there is no ``default_value``.
        """
        return self._score(batch, model, inference_args)

    def _score(
        self, batch: Sequence[Any], model: RemoteModel, inference_args: dict[str, Any] | None
    ) -> list[Any]:
        """The results of a batch; where a handler of other elements differs."""
        return score_batch(batch, model, self._options, inference_args)

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Arguments for Beam's ``BatchElements``."""
        arguments: dict[str, Any] = {}
        batching, model = self._options.batching, self._options.model_spec
        size = batching.max_batch_size or 0
        if model is not None:
            limit = max(1, model.max_batch_size)
            size = min(size or limit, limit)
        if size:
            # An element of more than its share of a request's bytes counts for several.
            share_bytes = max(1, batching.max_batch_bytes // size)
            size *= self._options.max_concurrent_requests
            # Beam's estimator would otherwise try other sizes, although their time says nothing here.
            arguments |= {"min_batch_size": size, "max_batch_size": size}
            arguments["element_size_fn"] = partial(_weight, share_bytes=share_bytes, most=size)
        if batching.linger_seconds:
            arguments["max_batch_duration_secs"] = batching.linger_seconds
        return arguments

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Refuse what cannot be request parameters.

        Raises:
            ConfigurationError: a name is reserved, or a value of another type than str, int, float, bool.
        """
        checked_parameters(inference_args)

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        """Bytes of the elements' own values; Beam would pickle the whole batch to find out."""
        return sum(map(_nbytes, batch))

    def get_metrics_namespace(self) -> str:
        return NAMESPACE


def score_batch(
    batch: Sequence[Any],
    model: RemoteModel,
    options: InferenceOptions,
    parameters: Mapping[str, Any] | None = None,
    *,
    keeps_errors: bool = False,
) -> list[Any]:
    """The results of a batch, in its order.

    With ``keeps_errors`` the error of an element that failed stands in its place, where there is no
    ``default_value``; otherwise the first one raises.
    """
    scorer = _BatchScorer(batch, model, options, parameters, keeps_errors)
    try:
        return scorer.results()
    finally:
        scorer.close()


@dataclass(eq=False, repr=False)
class _BatchScorer:
    """Scores one of Beam's batches."""

    batch: Sequence[Any]
    model: RemoteModel
    options: InferenceOptions
    parameters: Mapping[str, Any] | None
    keeps_errors: bool

    def __post_init__(self) -> None:
        self._metrics = InferenceMetrics(self.model.channel.pool)
        self.sender: BisectingSender[list[_Item]] = BisectingSender(
            self.model,
            self._metrics,
            encode=self._encode,
            on_answer=self._on_answer,
            on_failure=self._on_failure,
            renew=self._renew,
            has_default=self.options.default_value is not None,
        )
        self._use(self.sender.encoder)
        self._results: list[Any] = [None] * len(self.batch)

    def _use(self, encoder: InferRequestEncoder) -> None:
        """Take elements for the model as ``encoder`` has it; nothing is buffered afterwards."""
        self._encoder = encoder
        self._inputs_of = InputReader(encoder.element_model, None)
        self._default = default_of(self.options, encoder)
        self._batcher: Batcher[_Item] = Batcher(
            self.options.batching,
            encoder.model.max_batch_size,
            time.monotonic,
            self.model.channel.endpoints.learned,
        )

    def results(self) -> list[Any]:
        for index in range(len(self.batch)):
            request = self._add(index)
            if request is not None:
                self.sender.send(request)
                self.sender.take_ended()
        for request in self._batcher.drain():
            self.sender.send(request)
        self.sender.finish(len(self.batch))
        return self._results

    def _add(self, index: int) -> list[_Item] | None:
        """Buffer an element; the batch that is to be sent for it."""
        try:
            prepared = self._encoder.prepare(self._inputs_of(self.batch[index]))
        except TritonError as error:
            self.sender.fail([(index, _NOT_PREPARED)], error)
            return None
        return self._batcher.add(prepared.signature, (index, prepared), prepared.nbytes)

    def _renew(self, items: list[_Item]) -> list[list[_Item]]:
        """Batches of the same elements for the model as it is now, and of those that are buffered."""
        buffered = self._batcher.drain()
        if self._encoder is not self.sender.encoder:
            self._use(self.sender.encoder)
        indices = [index for each in (items, *buffered) for index, _ in each]
        return [*filter(None, map(self._add, indices)), *self._batcher.drain()]

    def close(self) -> None:
        """Abandon whatever is in flight, and let go of the batch.

        The sender refers back to this object: the elements would stay in memory until the garbage collector
        comes to look at old objects, which takes many batches.
        """
        self.sender.cancel()
        del self.sender

    def _encode(self, items: list[_Item]) -> EncodedRequest:
        return self._encoder.encode_batch([prepared for _, prepared in items], parameters=self.parameters)

    def _on_answer(self, items: list[_Item], response: InferResponse, is_batched: bool) -> None:
        rows = rows_of(response, is_batched, len(items))
        model_id = response.model_id
        for (index, _), row in zip(items, rows, strict=True):
            self._results[index] = prediction_result((self.batch[index], row, model_id))

    def _on_failure(self, items: list[_Item], error: TritonError) -> None:
        for index, _ in items:
            if self._default is not None:
                self._results[index] = self._default.result(self.batch[index])
            elif self.keeps_errors:
                self._results[index] = error
            else:
                self._metrics.flush()
                raise with_message(error, f"element {index} of its batch: {error.message}") from error


def _weight(element: Any, *, share_bytes: int, most: int) -> int:
    """How much of one of Beam's batches an element takes up, which is at least 1."""
    return min(max(1, _about_nbytes(element) // share_bytes), most)


def _about_nbytes(value: Any) -> int:
    """As `_nbytes`, but lists and tuples, keyed elements among them, are not made arrays."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    columns = columns_of(value)
    if columns is not None:
        return sum(map(_about_nbytes, columns.values()))
    if type(value) is tuple and len(value) == 2:
        return _about_nbytes(value[0]) + _about_nbytes(value[1])
    if isinstance(value, (list, tuple)):
        return len(value) * _about_nbytes(value[0]) if value else 0
    if isinstance(value, (str, bytes)):
        return len(value)
    nbytes = getattr(value, "nbytes", 8)
    return nbytes if isinstance(nbytes, int) else 8


def _nbytes(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    columns = columns_of(value)
    if columns is not None:
        return sum(map(_nbytes, columns.values()))
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    try:
        return np.asarray(value).nbytes
    except ValueError:
        # Such an element makes no array: it has failed, and nothing was sent for it.
        return 0
