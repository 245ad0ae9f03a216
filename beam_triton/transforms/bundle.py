"""The elements of one bundle: buffered by signature, sent in batches, given back one by one.

Each output keeps the timestamp, windows and pane of its own element.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate, chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from apache_beam import pvalue
from apache_beam.transforms.window import BoundedWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.errors import TritonError, UnexpectedOutputError, with_message
from beam_triton.policy.batching import Batcher, BatchingPolicy
from beam_triton.policy.learned_size import LearnedSizes
from beam_triton.protocol import EncodedRequest, InferRequestEncoder, InferResponse, PreparedElement
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.exception_handling import DeadLetters
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.results import DefaultValue, Outputs, PredictionResults, split_key
from beam_triton.transforms.row_results import RowResults

# A buffered element, its tensors, and its index within the bundle.
_Item: TypeAlias = tuple[WindowedValue, PreparedElement, int]


@dataclass(eq=False, slots=True)
class ElementBatch:
    """A batch in columns: elements, their prepared tensors, their indices within the bundle.

    Columns, because a tuple per element would be one more object for the garbage collector to visit over and
    over while thousands of elements wait for their answers.
    """

    windowed_values: list[WindowedValue]
    tensors: list[Any]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.windowed_values)

    def __getitem__(self, part: slice) -> ElementBatch:
        return ElementBatch(self.windowed_values[part], self.tensors[part], self.indices[part])


class ArrayBatch(ElementBatch):
    """The open batch of the most common elements: arrays of one dtype and shape that need no conversion.

    Comparing an array with the last one costs a fifth of preparing and batching it in general (0.2 us instead
    of 0.9), and most pipelines hold nothing else. Stays empty where batches may linger, as `Batcher` keeps
    their time.
    """

    __slots__ = ("_limits", "_lingers", "_nbytes", "dtype", "shape", "size")

    def __init__(self, policy: BatchingPolicy, model_limit: int, learned: LearnedSizes | None = None) -> None:
        super().__init__([], [], [])
        self._limits = policy.limits(model_limit, learned)
        self._lingers = policy.linger_seconds > 0
        self._nbytes = 0
        self.dtype: np.dtype[Any] | None = None
        self.shape: tuple[int, ...] | None = None
        self.size = 0

    def begin(self, array: npt.NDArray[Any]) -> bool:
        """Collect arrays of ``array``'s dtype and shape from now on.

        False while others are being collected, and for arrays so large that a batch holds only one.
        """
        if self.indices or self._lingers:
            return False
        self._nbytes = max(array.nbytes, 1)
        self._limit_size()
        if self.size < 2:
            return False
        self.dtype, self.shape = array.dtype, array.shape
        return True

    def take(self) -> ElementBatch:
        """The collected batch; an empty one begins."""
        batch = ElementBatch(self.windowed_values, self.tensors, self.indices)
        self.windowed_values, self.tensors, self.indices = [], [], []
        self._limit_size()
        if self.size < 2:
            self.dtype = self.shape = None
        return batch

    def _limit_size(self) -> None:
        rows, nbytes = self._limits.next_batch()
        self.size = min(rows, nbytes // self._nbytes)


@dataclass(frozen=True, eq=False)
class JoinableBatch:
    """The last batch of a bundle, as `beam_triton.dispatch.joint_requests.Joinable`."""

    key: Hashable
    rows: int
    nbytes: int
    max_rows: int
    max_bytes: int
    tensors: list[Any]
    new_request: Callable[[list[Any]], HttpRequest]

    def join(self, others: Sequence[JoinableBatch]) -> HttpRequest:
        """The request of this batch and of ``others``."""
        return self.new_request([*self.tensors, *chain.from_iterable(each.tensors for each in others)])

    def divide(self, result: InferResponse, rows: Sequence[int]) -> list[InferResponse]:
        """The answer's rows for each batch.

        Raises:
            UnexpectedOutputError: an output has not one row for each element.
        """
        for name, array in result.outputs.items():
            if array.ndim == 0 or len(array) != sum(rows):
                raise UnexpectedOutputError(
                    f"output {name!r} has shape {list(array.shape)}, not a row for each of the {sum(rows)} "
                    f"elements"
                )
        stops = list(accumulate(rows))
        return [
            replace(
                result,
                outputs={name: array[stop - count : stop] for name, array in result.outputs.items()},
            )
            for stop, count in zip(stops, rows, strict=True)
        ]


@dataclass(eq=False, repr=False)
class BundleScorer:
    """Scores the elements of one bundle.

    Args:
        model: the model to score on.
        batching: which elements share a request.
        metrics: gets everything that ends.
        results: takes the inputs out of elements, and makes results of answers.
        dead_letters: failed elements leave as these; the first one that does not, raises.
        make_default: makes what an element that failed for good yields instead, if anything.
        shared_by: equal for scorers whose last batches may share requests while the server is busy.
    """

    model: RemoteModel
    batching: BatchingPolicy
    metrics: InferenceMetrics
    _: KW_ONLY
    results: PredictionResults | RowResults
    dead_letters: DeadLetters | None
    make_default: Callable[[InferRequestEncoder], DefaultValue | None]
    shared_by: Hashable = None

    def __post_init__(self) -> None:
        self._lingers = self.batching.linger_seconds > 0
        self._sender: BisectingSender[ElementBatch] = BisectingSender(
            self.model,
            self.metrics,
            encode=self._encode,
            on_answer=self._on_answer,
            on_failure=self._on_failure,
            renew=self._renew,
            has_default=self.make_default(self.model.encoder) is not None,
        )
        self._ended = self._sender.ended
        self._learned = self.model.channel.endpoints.learned
        self._use(self._sender.encoder)
        self._taken = 0
        self._outputs: list[Iterable[Any]] = []

    def _use(self, encoder: InferRequestEncoder) -> None:
        """Take elements for the model as ``encoder`` has it; nothing is buffered afterwards."""
        self._encoder = encoder
        self._prepare = encoder.prepare
        self._inputs_of = self.results.reader(encoder)
        self._default = self.make_default(encoder)
        self._arrays = ArrayBatch(self.batching, encoder.model.max_batch_size, self._learned)
        # Created for the first element that is not one of many equal arrays.
        self._batcher: Batcher[_Item] | None = None

    def add(self, windowed_value: WindowedValue, index: int | None = None) -> Iterable[Any]:
        """Take an element; outputs that are ready, each with the windows of its own element.

        ``index`` is the element's within its bundle, where not all of the bundle's come here.
        """
        element = windowed_value.value
        if index is None:
            index = self._taken
        self._taken += 1
        inputs = element[1] if type(element) is tuple and len(element) == 2 else element
        arrays = self._arrays
        if (
            type(inputs) is np.ndarray
            and inputs.shape == arrays.shape
            and inputs.dtype == arrays.dtype
            and inputs.flags.c_contiguous
        ):
            arrays.windowed_values.append(windowed_value)
            arrays.tensors.append(inputs)
            arrays.indices.append(index)
            if len(arrays.indices) == arrays.size:
                self._sender.send(arrays.take())
        else:
            self._add_any(windowed_value, inputs, index)
        if self._lingers:
            self._send_expired()
            self._sender.step()
        if self._ended:
            self._sender.take_ended()
        # Not None: Beam's wrappers of a DoFn (dead letters, time limits) iterate what it gives.
        return self._take_outputs() if self._outputs else ()

    def _add_any(self, windowed_value: WindowedValue, inputs: Any, index: int) -> None:
        try:
            prepared = self._prepare(self._inputs_of(inputs))
        except TritonError as error:
            self._sender.fail(ElementBatch([windowed_value], [None], [index]), error)
            return
        unchanged = prepared[1][0] if len(prepared[1]) == 1 and self._encoder.padding is None else None
        if unchanged is inputs and isinstance(inputs, np.ndarray) and self._arrays.begin(inputs):
            self._arrays.windowed_values.append(windowed_value)
            self._arrays.tensors.append(inputs)
            self._arrays.indices.append(index)
            return
        if self._batcher is None:
            self._batcher = self._new_batcher()
        items = self._batcher.add(prepared[0], (windowed_value, prepared, index), prepared[2])
        if items is not None:
            self._sender.send(_batch_of(items))

    def finish(self) -> Iterable[Any]:
        """Send what is buffered, wait for everything, and give the remaining outputs.

        Raises:
            AssertionError: an element was lost or came out twice.
        """
        self.send_buffered()
        self._sender.finish(self._taken)
        return self._take_outputs()

    def send_buffered(self) -> None:
        """Send what is buffered; waits only for slots."""
        limit, early = self._arrays.size, 0
        rests = [self._arrays.take()] if self._arrays.indices else []
        if self._batcher is not None:
            limit = max(limit, self._batcher.usual_limit())
            rests += map(_batch_of, self._batcher.drain())
            early = self._batcher.left_early
        self.metrics.bundle_drained(len(rests), limit, early=early, pads=self._encoder.padding is not None)
        for batch in rests:
            self._sender.send(batch, self._joinable(batch))

    def cancel(self) -> None:
        """Abandon whatever is in flight. A second call does nothing."""
        self._sender.cancel()

    def _take_outputs(self) -> Iterable[Any]:
        outputs, self._outputs = self._outputs, []
        return outputs[0] if len(outputs) == 1 else Outputs(chain.from_iterable, outputs)

    def _send_expired(self) -> None:
        for items in self._batcher.expired() if self._batcher is not None else ():
            self._sender.send(_batch_of(items))

    def _new_batcher(self) -> Batcher[_Item]:
        limit = self._encoder.model.max_batch_size
        return Batcher(self.batching, limit, time.monotonic, self._learned)

    def _joinable(self, batch: ElementBatch) -> JoinableBatch | None:
        """By which a bundle's last batch may share a request with those of other bundles."""
        if self.shared_by is None:
            return None
        model, tensors = self._encoder.model, batch.tensors
        max_rows, max_bytes = self.batching.limits(model.max_batch_size, self._learned).next_batch()
        first = tensors[0]
        is_array = type(first) is np.ndarray
        nbytes = sum(each.nbytes for each in tensors)
        if len(tensors) >= max_rows or nbytes >= max_bytes:
            return None
        signature = (first.dtype, first.shape) if is_array else first.signature
        padding = self._encoder.padding
        if padding is not None and not padding.is_fixed(signature):
            # What an answer is cut by depends on the elements of the request.
            return None
        key = (self.shared_by, model, signature)
        return JoinableBatch(key, len(tensors), nbytes, max_rows, max_bytes, tensors, self._new_request)

    def _new_request(self, tensors: list[Any]) -> HttpRequest:
        return self.model.http_request(self._encoded(tensors))

    def _encode(self, batch: ElementBatch, copies: int) -> EncodedRequest:
        tensors = batch.tensors
        return self._encoded([*tensors, *[tensors[-1]] * copies] if copies else tensors)

    def _encoded(self, tensors: list[Any]) -> EncodedRequest:
        if type(tensors[0]) is np.ndarray:
            return self._encoder.encode_arrays(tensors)
        return self._encoder.encode_batch(tensors)

    def _renew(self, batch: ElementBatch) -> list[ElementBatch]:
        """Batches of the same elements for the model as it is now, and of those that are buffered."""
        outdated = [batch]
        if self._encoder is not self._sender.encoder:
            outdated += [self._arrays, *map(_batch_of, self._batcher.drain() if self._batcher else ())]
            self._use(self._sender.encoder)
        batcher = self._new_batcher()
        renewed = []
        for each in outdated:
            for windowed_value, index in zip(each.windowed_values, each.indices, strict=True):
                try:
                    prepared = self._prepare(self._inputs_of(split_key(windowed_value.value)[2]))
                except TritonError as error:
                    self._sender.fail(ElementBatch([windowed_value], [None], [index]), error)
                    continue
                items = batcher.add(prepared[0], (windowed_value, prepared, index), prepared[2])
                if items is not None:
                    renewed.append(_batch_of(items))
        return renewed + list(map(_batch_of, batcher.drain()))

    def _on_answer(self, batch: ElementBatch, response: InferResponse, is_batched: bool) -> None:
        self._outputs.append(self.results.of_answer(batch.windowed_values, response, is_batched))

    def _on_failure(self, batch: ElementBatch, error: TritonError) -> None:
        for windowed_value, index in zip(batch.windowed_values, batch.indices, strict=True):
            if self._default is not None:
                result = self.results.default(windowed_value.value, self._default)
                self._outputs.append((windowed_value.with_value(result),))
                continue
            self._outputs.append((dead_letter(self.dead_letters, windowed_value, index, error),))


def dead_letter(
    dead_letters: DeadLetters | None, windowed_value: WindowedValue, index: int | None, error: TritonError
) -> Any:
    """The output of a failed element, the one of that index within its bundle where that matters.

    Raises:
        TritonError: such failures do not become dead letters.
    """
    failure = dead_letters.of(windowed_value.value, error) if dead_letters is not None else None
    if dead_letters is None or failure is None:
        is_keyed, key, _ = split_key(windowed_value.value)
        about = [] if index is None else [f"element {index} of its bundle"]
        if is_keyed:
            about.append(f"key {key!r}")
        raise with_message(error, f"{', '.join(about)}: {error.message}") from error
    return pvalue.TaggedOutput(dead_letters.tag, windowed_value.with_value(failure))


def _batch_of(items: list[_Item]) -> ElementBatch:
    windowed_values, tensors, indices = map(list, zip(*items, strict=True))
    return ElementBatch(windowed_values, tensors, indices)


class _OwnWindows(tuple[BoundedWindow, ...]):
    """Windows that Beam cannot multiply.

    Beam takes a WindowedValue that ``process`` yields to be one of several made once per window, and so
    repeats its windows (``windows *= k``) when the current element has k of them. Results here belong to
    other elements and are made once. Keeping them until ``finish_bundle``, where Beam does not do this, would
    hold a whole bundle's results in memory wherever windows slide.
    """

    __slots__ = ()

    def __mul__(self, count: Any) -> _OwnWindows:
        return self


def with_own_windows(outputs: Iterable[Any]) -> Iterable[Any]:
    """The same outputs, safe to yield from ``process`` whatever the current element's windows."""
    return Outputs(_each_with_own_windows, outputs)


def _each_with_own_windows(outputs: Iterable[Any]) -> Iterator[Any]:
    for output in outputs:
        if isinstance(output, pvalue.TaggedOutput):
            yield pvalue.TaggedOutput(output.tag, _with_fixed_windows(output.value))
        else:
            yield _with_fixed_windows(output)


def _with_fixed_windows(value: WindowedValue) -> WindowedValue:
    return WindowedValue(value.value, value.timestamp, _OwnWindows(value.windows), value.pane_info)
