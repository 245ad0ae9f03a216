"""A bundle's elements on their way: buffered by signature, sent in batches, told apart again.

Elements in are results plus failures; `BundleScorer.finish` checks it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from apache_beam import pvalue
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.errors import ConfigurationError, TritonError, with_message
from beam_triton.policy.batching import Batcher, BatchingPolicy
from beam_triton.protocol import EncodedRequest, InferResponse, PreparedElement
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.element_batch import ElementBatch
from beam_triton.transforms.elements import model_inputs, split_key
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.results import DefaultValue, failure_of, prediction_result, rows_of
from beam_triton.transforms.uniform_batch import ArrayBatch

FAILURES_TAG = "failures"

_MADE_AT_A_TIME = 64

# An element that waits for others of its signature, its tensors, and its number within the bundle.
_Item: TypeAlias = tuple[WindowedValue, PreparedElement, int]


class BundleScorer:
    """Scores the elements of one bundle.

    Args:
        model: where to.
        batching: how many together.
        metrics: told of everything that ends.
        tags_failures: failed elements leave as outputs tagged ``failures``; otherwise the first one
            raises.
        default: what an element yields instead that failed for good.
    """

    def __init__(
        self,
        model: RemoteModel,
        batching: BatchingPolicy,
        metrics: InferenceMetrics,
        *,
        tags_failures: bool,
        default: DefaultValue | None,
    ) -> None:
        self._model = model
        self._prepare = model.encoder.prepare
        self._metrics = metrics
        self._tags_failures = tags_failures
        self._default = default
        self._batcher: Batcher[_Item] = Batcher(batching, model.spec.max_batch_size, time.monotonic)
        self._lingers = batching.linger_seconds > 0
        self._in_flight: BisectingSender[ElementBatch] = BisectingSender(
            model, metrics, encode=self._encode, on_answer=self._succeed, on_failure=self._fail_all
        )
        self._ended = self._in_flight.ended
        self._uniform = ArrayBatch(batching, model.spec.max_batch_size)
        self._taken = 0
        self._given = 0
        self._outputs: list[Iterable[Any]] = []

    def add(self, windowed_value: WindowedValue) -> Iterable[Any] | None:
        """Take an element; outputs that are ready, each with the windows of its own element."""
        element = windowed_value.value
        number = self._taken
        self._taken = number + 1
        inputs = element[1] if type(element) is tuple and len(element) == 2 else element
        uniform = self._uniform
        if (
            type(inputs) is np.ndarray
            and inputs.shape == uniform.shape
            and inputs.dtype == uniform.dtype
            and inputs.flags.c_contiguous
        ):
            uniform.windowed_values.append(windowed_value)
            uniform.tensors.append(inputs)
            uniform.numbers.append(number)
            if len(uniform.numbers) == uniform.size:
                self._in_flight.send(uniform.take())
        else:
            self._add_any(windowed_value, inputs, number)
        if self._lingers:
            self._send_expired()
        if self._ended:
            self._in_flight.take_ended()
        return self._take_outputs() if self._outputs else None

    def _add_any(self, windowed_value: WindowedValue, inputs: Any, number: int) -> None:
        try:
            prepared = self._prepare(model_inputs(inputs))
        except TritonError as error:
            self._fail(windowed_value, number, error)
            return
        passed_on = prepared[1][0] if len(prepared[1]) == 1 else None
        if passed_on is inputs and isinstance(inputs, np.ndarray) and self._uniform.begin(inputs):
            self._uniform.windowed_values.append(windowed_value)
            self._uniform.tensors.append(inputs)
            self._uniform.numbers.append(number)
            return
        items = self._batcher.add(prepared[0], (windowed_value, prepared, number), prepared[2])
        if items is not None:
            self._in_flight.send(_batch_of(items))

    def finish(self) -> Iterable[Any]:
        """Send what is buffered, wait for everything, and give the remaining outputs.

        Raises:
            AssertionError: an element was lost or came out twice.
        """
        for batch in (self._uniform.take(), *map(_batch_of, self._batcher.drain())):
            if len(batch):
                self._in_flight.send(batch)
        self._in_flight.finish()
        self._metrics.flush()
        if self._given != self._taken:
            raise AssertionError(
                f"beam_triton lost count: {self._taken} elements came in, {self._given} went out. "
                f"The bundle fails so that the runner repeats it; please report this."
            )
        return self._take_outputs()

    def cancel(self) -> None:
        """Let go of whatever is in flight. A second call does nothing."""
        self._in_flight.cancel()

    def _take_outputs(self) -> Iterable[Any]:
        outputs, self._outputs = self._outputs, []
        return chain.from_iterable(outputs)

    def _send_expired(self) -> None:
        for items in self._batcher.expired():
            self._in_flight.send(_batch_of(items))
        self._in_flight.step()

    def _encode(self, batch: ElementBatch) -> EncodedRequest:
        tensors = batch.tensors
        if type(tensors[0]) is np.ndarray:
            return self._model.encoder.encode_arrays(tensors)
        return self._model.encoder.encode_batch(tensors)

    def _succeed(self, batch: ElementBatch, response: InferResponse) -> None:
        rows = rows_of(response, self._model.spec, len(batch))
        model_id = f"{response.model_name}:{response.model_version}"
        self._outputs.append(chain.from_iterable(_results(batch.windowed_values, rows, model_id)))
        self._given += len(batch)
        self._metrics.count("elements", len(batch))

    def _fail_all(self, batch: ElementBatch, error: TritonError) -> None:
        for windowed_value, number in zip(batch.windowed_values, batch.numbers, strict=True):
            self._fail(windowed_value, number, error)

    def _fail(self, windowed_value: WindowedValue, number: int, error: TritonError) -> None:
        if isinstance(error, ConfigurationError):
            # A secret that this worker cannot read is no element's fault: the runner tries again.
            raise error
        is_keyed, key, example = split_key(windowed_value.value)
        self._metrics.count("elements")
        self._given += 1
        if self._default is not None:
            self._metrics.count("default_values")
            result: Any = self._default.result(example)
            self._outputs.append((windowed_value.with_value((key, result) if is_keyed else result),))
            return
        self._metrics.count("failures")
        if not self._tags_failures:
            about = f"element {number} of its bundle" + (f", key {key!r}" if is_keyed else "")
            raise with_message(error, f"{about}: {error.message}") from error
        failure = windowed_value.with_value(failure_of(windowed_value.value, error))
        self._outputs.append((pvalue.TaggedOutput(FAILURES_TAG, failure),))


def _batch_of(items: list[_Item]) -> ElementBatch:
    windowed_values, tensors, numbers = map(list, zip(*items, strict=True))
    return ElementBatch(windowed_values, tensors, numbers)


def _results(
    windowed_values: list[WindowedValue], rows: Iterator[dict[str, Any]], model_id: str
) -> Iterator[list[WindowedValue]]:
    """Results in the windows of their elements, some at a time.

    The next ones are made when these have gone downstream: of a thousand that wait, the garbage collector
    looks at each again and again, which with batches of 1,024 was a third of all time.
    """
    for start in range(0, len(windowed_values), _MADE_AT_A_TIME):
        part = windowed_values[start : start + _MADE_AT_A_TIME]
        yield [
            windowed_value.with_value(
                prediction_result((element, row, model_id))
                if type(element := windowed_value.value) is not tuple
                else _result_of_tuple(element, row, model_id)
            )
            # Not strict: that would take a row of the next part.
            for windowed_value, row in zip(part, rows, strict=False)
        ]


def _result_of_tuple(element: tuple[Any, ...], row: dict[str, Any], model_id: str) -> Any:
    """A keyed element's result beside its key."""
    if len(element) == 2:
        return element[0], prediction_result((element[1], row, model_id))
    return prediction_result((element, row, model_id))
