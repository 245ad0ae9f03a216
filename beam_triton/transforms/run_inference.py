"""`TritonModelHandler`, the model behind Beam's ``RunInference``."""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from beam_triton.errors import ConfigurationError, ServerOverloadedError, TritonError, with_message
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import Batcher
from beam_triton.protocol import (
    EncodedRequest,
    InferRequestEncoder,
    InferResponse,
    PreparedElement,
    checked_parameters,
)
from beam_triton.protocol.paths import checked_version, model_path
from beam_triton.remote_model import RemoteModel
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.metrics import NAMESPACE, InferenceMetrics
from beam_triton.transforms.model_dofn import close_with, default_of, open_model
from beam_triton.transforms.results import prediction_result, rows_of
from beam_triton.transforms.row_inputs import Columns, InputReader, checked_inputs, columns_of
from beam_triton.validation import positive_integer

# An element's index within Beam's batch, and its tensors.
_Item: TypeAlias = tuple[int, PreparedElement]

Shared = TypeVar("Shared")

_NOT_PREPARED = PreparedElement((), (), 0)

# The size of a request while nothing says it: Beam's batch is made before a server has been asked.
_ELEMENTS_PER_REQUEST = 64

# Arguments of Beam's own handlers that this one does not take, and what to do instead.
_BATCH_SIZE = 'Beam\'s batches are made of requests: give batching={"max_batch_size": …} for their size'
_ON_THE_SERVER = "The model is on the server, and a worker holds connections to it only: leave it out"
_BEAM_ARGUMENTS = {
    "min_batch_size": _BATCH_SIZE,
    "max_batch_size": _BATCH_SIZE,
    "max_batch_duration_secs": 'Give batching={"linger_seconds": …}',
    "large_model": _ON_THE_SERVER,
    "model_copies": _ON_THE_SERVER,
}


class TritonModelHandler(ModelHandler[Any, PredictionResult, "HeldModel"]):
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

    **Batches** are Beam's, and larger than a request: the elements of ``max_concurrent_requests`` requests,
    so that they are in flight together. A request holds ``batching.max_batch_size`` elements; where neither
    that nor ``model_spec`` says it, 64 are reckoned with. ``max_batch_weight`` bounds a batch by bytes. With
    ``batching.linger_seconds`` Beam collects batches across bundles for that long
    (``max_batch_duration_secs``): in its state, behind a shuffle, one batch of a process at a time, and
    bounded by the number of elements alone.

    **Model updates** (``model_metadata_pcoll``, ``watch_model_pattern``, ``KeyModelPathMapping``) switch to
    another model of the same server. The path of a model is one of

    - ``digits``: the version that the server chooses,
    - ``digits/versions/3``,
    - a file in a version's folder of a model repository, such as ``gs://models/digits/3/model.onnx``.

    An empty one changes nothing. A model that cannot be opened fails every batch, each of which tries to open
    it again; the earlier model answers none of them.

    **Many models** (``KeyedModelHandler([KeyModelMapping(keys, handler), …])``) are cheap, and need no
    ``max_models_per_worker_hint``. Every process opens its own, also where Beam shares a model across
    processes.

    ``RunInference(handler, inference_args={…})`` sends request parameters, over those of
    ``request_parameters``. The metrics of `TritonInference` and those of ``RunInference`` are both of
    the namespace ``beam_triton``.

    Args:
        endpoint: URL of the server, a list of them for fail-over, or a `WorkerTriton`.
        model_name: the model.
        inputs: input name to the column of a row that feeds it, where that has another name; or to a list of
            columns of one value each, which make up the tensor.
        max_batch_weight: the weight of one of Beam's batches at most; by default the bytes that
            ``max_concurrent_requests`` requests of ``batching.max_batch_bytes`` hold (128 MiB). A heavier
            element is a batch alone.
        element_size_fn: an element's weight, a whole number; by default its bytes, about. Under a
            ``KeyedModelHandler`` an element is ``(key, element)``.
        rate_limiter: one of Beam's (``EnvoyRateLimiter``), or whatever has its method
            ``allow(hits_added=n) -> bool``. It is asked before each of Beam's batches, with the number of its
            elements, and may wait; copies of this handler in a process share it.
        env_vars: environment variables that workers set before they open the model.
        options: the keyword arguments that `InferenceOptions` describes.

    Raises:
        ConfigurationError: an option cannot work. Nothing is sent here.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        *,
        inputs: Mapping[str, Columns] | None = None,
        max_batch_weight: int | None = None,
        element_size_fn: Callable[[Any], int] | None = None,
        rate_limiter: Any = None,
        env_vars: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name in options:
            if name in _BEAM_ARGUMENTS:
                raise ConfigurationError(f"TritonModelHandler takes no {name}. {_BEAM_ARGUMENTS[name]}")
        self._options = InferenceOptions.from_options({"endpoint": endpoint, **options}, owner=self._owner)
        model_path(model_name)  # Refuses what is not a name.
        self._options.spec_of(model_name)
        self._model_name = model_name
        self._columns_of_inputs = checked_inputs(inputs)
        if max_batch_weight is not None:
            positive_integer("max_batch_weight", max_batch_weight)
        if element_size_fn is not None and not callable(element_size_fn):
            raise ConfigurationError(
                f"element_size_fn must be a function that takes an element, not {element_size_fn!r}"
            )
        if rate_limiter is not None and not callable(getattr(rate_limiter, "allow", None)):
            raise ConfigurationError(
                f"rate_limiter must have a method allow(hits_added=n), as Beam's RateLimiter has; "
                f"{type(rate_limiter).__name__} has none"
            )
        max_bytes = self._options.max_concurrent_requests * self._options.batching.max_batch_bytes
        self._max_weight = max_batch_weight or max_bytes
        self._element_size_fn = element_size_fn or _about_nbytes
        self._rate_limiter = rate_limiter
        self._env_vars = dict(env_vars or {})
        # Copies of a handler, which Beam makes for each thread, have the same.
        self._id = uuid.uuid4().hex
        self._path = ""
        self._is_updated = False
        self._held: HeldModel | None = None

    @property
    def _owner(self) -> type:
        """The class whose keyword arguments a user has given."""
        return TritonModelHandler

    def __repr__(self) -> str:
        return f"TritonModelHandler({self._options.servers}, {self._model_name!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def load_model(self) -> HeldModel:
        """The model, opened; it has a reference to the shared session.

        Beam does not say when it has finished with a model: the reference is released when the model is
        garbage. Beam keeps the last model of a process alive; idle eviction closes its connections.

        Raises:
            TritonError: there is no such model, or no server. Not after an update: `run_inference` raises it
                then, because Beam would go on with the earlier model.
        """
        model = self._shared_model()
        if not self._is_updated:
            model.opened()
        return model

    def run_inference(
        self,
        batch: Sequence[Any],
        model: HeldModel,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[PredictionResult]:
        """The results of a batch, in its order.

        Elements of one tensor signature share requests, as large as the model allows.

        Raises:
            ConfigurationError: an update has given what is not the path of a model.
            ServerOverloadedError: the rate limiter refused.
            TritonError: an element failed for good and there is no ``default_value``, or the model of an
                update cannot be opened.
        """
        # Beam's argument may be the model of another process, or an earlier one that an update has failed to
        # replace: that of this process is found by its path.
        opened = self._model_here().opened()
        if self._rate_limiter is not None and batch:
            self._wait_for_rate(len(batch))
        return self._score(batch, opened, inference_args)

    def _score(
        self, batch: Sequence[Any], model: RemoteModel, inference_args: dict[str, Any] | None
    ) -> list[Any]:
        """The results of a batch; where a handler of other elements differs."""
        return score_batch(batch, model, self._options, inference_args, inputs=self._columns_of_inputs)

    def update_model_path(self, model_path: str | None = None) -> None:
        """Use the model of this path from the next batch on; an empty path changes nothing."""
        self._is_updated = True
        if model_path and model_path != self._path:
            # Read where the model is opened: an error here would leave Beam with the earlier model.
            self._path = model_path
            self._held = None

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Arguments for Beam's ``BatchElements``."""
        batching, model = self._options.batching, self._options.model_spec
        size = batching.max_batch_size or 0
        if model is not None:
            limit = max(1, model.max_batch_size)
            size = min(size or limit, limit)
        size = (size or _ELEMENTS_PER_REQUEST) * self._options.max_concurrent_requests
        arguments: dict[str, Any] = {
            # Beam's estimator would otherwise try other sizes, although their time says nothing here.
            "min_batch_size": size,
            "max_batch_size": size,
            "element_size_fn": partial(
                _share, weight_of=self._element_size_fn, max_weight=self._max_weight, size=size
            ),
        }
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

    def _shared_model(self) -> HeldModel:
        path = self._path
        return _of_process((self._id, path), partial(HeldModel, self._options, self._model_name, path))

    def _model_here(self) -> HeldModel:
        """This process's model; Beam holds it, or else this handler does."""
        if (self._id, self._path) not in _IN_PROCESS:
            self._held = self._shared_model()
        return self._shared_model()

    def _wait_for_rate(self, elements: int) -> None:
        self._rate_limiter = _of_process((self._id, "//rate_limiter"), lambda: self._rate_limiter)
        if not self._rate_limiter.allow(hits_added=elements):
            raise ServerOverloadedError(
                f"the rate limiter does not allow {elements} elements now: let it wait "
                f"(EnvoyRateLimiter(block_until_allowed=True)), or raise its limit"
            )


class HeldModel:
    """A model of a process, as ``RunInference`` holds it: opened by whoever needs it first.

    One that cannot be opened is tried again by the next.
    """

    def __init__(self, options: InferenceOptions, model_name: str, path: str) -> None:
        self._options = options
        self._model_name = model_name
        self._path = path
        self._lock = threading.Lock()
        self._model: RemoteModel | None = None

    def opened(self) -> RemoteModel:
        """The model, ready for requests.

        Raises:
            ConfigurationError: the path is not that of a model.
            TritonError: it cannot be opened.
        """
        with self._lock:
            if self._model is None:
                name, options = self._model_name, self._options
                if self._path:
                    name, version = name_and_version(self._path)
                    options = options.of_model(name, version)
                self._model = open_model(options, name)
                close_with(self._model, self._model)
            return self._model

    def close(self) -> None:
        """Release the reference to the shared session; the next use opens the model again."""
        with self._lock:
            if self._model is not None:
                self._model.close()
            self._model = None


# What copies of a handler share in a process, while one of them or Beam holds it.
_IN_PROCESS: weakref.WeakValueDictionary[tuple[str, str], Any] = weakref.WeakValueDictionary()
_in_process_lock = threading.Lock()


def _of_process(key: tuple[str, str], make: Callable[[], Shared]) -> Shared:
    with _in_process_lock:
        found = _IN_PROCESS.get(key)
        if found is None:
            found = _IN_PROCESS[key] = make()
        return cast(Shared, found)


def name_and_version(path: str) -> tuple[str, str | None]:
    """The model and version that an update's path names; None leaves the version to the server.

    Raises:
        ConfigurationError: it names none.
    """
    parts = path.split("/")
    is_file = "://" in path or path.startswith("/")
    if len(parts) > 2 and parts[-2].isdecimal() and parts[-3] not in ("", "versions"):
        return parts[-3], parts[-2]
    name, separator, version = path.rpartition("/versions/")
    if not separator:
        name, version = path, ""
    if is_file or not name or "/" in version:
        raise ConfigurationError(
            f"RunInference was given the model path {path!r}: give a model's name, name/versions/3, or a "
            f"file in a version's folder of a model repository, such as gs://models/name/3/model.onnx. "
            f"Another server needs another RunInference"
        )
    return name, checked_version(version)


def score_batch(
    batch: Sequence[Any],
    model: RemoteModel,
    options: InferenceOptions,
    parameters: Mapping[str, Any] | None = None,
    *,
    inputs: Mapping[str, Columns] | None = None,
    keeps_errors: bool = False,
) -> list[Any]:
    """The results of a batch, in its order; ``inputs`` as for `InputReader`.

    With ``keeps_errors`` the error of an element that failed stands in its place, where there is no
    ``default_value``; otherwise the first one raises.
    """
    scorer = _BatchScorer(batch, model, options, parameters, inputs, keeps_errors)
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
    inputs: Mapping[str, Columns] | None
    keeps_errors: bool

    def __post_init__(self) -> None:
        self._metrics = InferenceMetrics(self.model.channel)
        self._sender: BisectingSender[list[_Item]] = BisectingSender(
            self.model,
            self._metrics,
            encode=self._encode,
            on_answer=self._on_answer,
            on_failure=self._on_failure,
            renew=self._renew,
            has_default=self.options.default_value is not None,
        )
        self._use(self._sender.encoder)
        self._results: list[Any] = [None] * len(self.batch)

    def _use(self, encoder: InferRequestEncoder) -> None:
        """Take elements for the model as ``encoder`` has it; nothing is buffered afterwards."""
        self._encoder = encoder
        self._inputs_of = InputReader(encoder.element_model, self.inputs)
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
                self._sender.send(request)
                self._sender.take_ended()
        limit, rests = self._batcher.usual_limit(), self._batcher.drain()
        self._metrics.bundle_drained(
            len(rests), limit, early=self._batcher.left_early, pads=self._encoder.padding is not None
        )
        for request in rests:
            self._sender.send(request)
        self._sender.finish(len(self.batch))
        return self._results

    def _add(self, index: int) -> list[_Item] | None:
        """Buffer an element; the batch that is to be sent for it."""
        try:
            prepared = self._encoder.prepare(self._inputs_of(self.batch[index]))
        except TritonError as error:
            if type(self.batch[index]) is tuple and len(self.batch[index]) == 2:
                hint = "for (key, element) use RunInference(KeyedModelHandler(handler))"
                error = with_message(error, f"{error.message}; {hint}")
            self._sender.fail([(index, _NOT_PREPARED)], error)
            return None
        return self._batcher.add(prepared.signature, (index, prepared), prepared.nbytes)

    def _renew(self, items: list[_Item]) -> list[list[_Item]]:
        """Batches of the same elements for the model as it is now, and of those that are buffered."""
        buffered = self._batcher.drain()
        if self._encoder is not self._sender.encoder:
            self._use(self._sender.encoder)
        indices = [index for each in (items, *buffered) for index, _ in each]
        return [*filter(None, map(self._add, indices)), *self._batcher.drain()]

    def close(self) -> None:
        """Abandon whatever is in flight, and let go of the batch.

        The sender refers back to this object: the elements would stay in memory until the garbage collector
        comes to look at old objects, which takes many batches.
        """
        self._sender.cancel()
        del self._sender

    def _encode(self, items: list[_Item], copies: int) -> EncodedRequest:
        prepared = [each for _, each in items]
        return self._encoder.encode_batch(prepared + prepared[-1:] * copies, parameters=self.parameters)

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


def _share(element: Any, *, weight_of: Callable[[Any], int], max_weight: int, size: int) -> int:
    """How many of a batch's ``size`` places an element takes up.

    Beam would send an empty batch before an element of more than all.
    """
    return min(max(1, weight_of(element) * size // max_weight), size)


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
