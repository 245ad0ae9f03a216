"""Rows that travel as columns: slices of a batch in flight, and their outcomes.

Where elements come as arrays of many rows there is nothing to pay for a single one: a batch is sent in
slices, without a copy.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from beam_triton.errors import RemoteProtocolError, TritonError, UnexpectedOutputError, with_message
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.protocol import EncodedRequest, InferRequestEncoder, InferResponse
from beam_triton.protocol.datatypes import Array
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.exception_handling import DeadLetters, ExceptionClasses
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import ModelDoFn, default_of
from beam_triton.transforms.results import DEFAULT_MODEL_ID, DefaultValue
from beam_triton.transforms.row_results import OutputColumn, check_outputs

Inputs = Array | dict[str, Array]


class ScoredPart(NamedTuple):
    """The results of some rows of a batch: output name to array, rows along the first dimension.

    ``model_version`` is that of the answer, "" where its server does not say, or a default value stands in.
    """

    indices: range
    outputs: Mapping[str, Array]
    model_id: str
    model_version: str = ""


class ScoredBatch:
    """Rows that travel as columns, and their outcomes; ``context`` belongs to the owner.

    Attributes:
        inputs: the model's one input, or input name to array; rows lie along the first dimension.
        numbers: those of the rows in what they were taken from, ascending.
        joined: output name to the array of all rows, of which those of the parts are views; an output whose
            parts differ in shape is not in it.
        parts: the results, in the rows' order once all are there.
        failures: rows that failed for good, and why.
    """

    __slots__ = ("context", "failures", "inputs", "joined", "numbers", "parts", "rows_left")

    def __init__(self, inputs: Inputs, numbers: Sequence[int] | npt.NDArray[np.int64], context: Any) -> None:
        self.inputs = inputs
        self.numbers = numbers
        self.joined: dict[str, Array] = {}
        self.parts: list[ScoredPart] = []
        self.failures: list[tuple[range, TritonError]] = []
        self.rows_left = len(numbers)
        self.context = context

    def add(self, part: ScoredPart) -> None:
        """Take some rows' results, and lay them beside the others'.

        Done as answers come, while their bytes are at hand: joining the answers of a large batch when all
        have come means to fetch them from memory again, and to hold the batch twice.
        """
        count = len(self.numbers)
        if len(part.indices) < count:
            outputs = dict(part.outputs)
            for name, array in outputs.items():
                whole = self.joined.get(name)
                if whole is None and not self.parts:
                    whole = self.joined[name] = np.empty((count, *array.shape[1:]), array.dtype)
                if whole is not None and (whole.shape[1:], whole.dtype) == (array.shape[1:], array.dtype):
                    outputs[name] = whole[part.indices.start : part.indices.stop]
                    outputs[name][...] = array
                else:
                    self.joined.pop(name, None)
            part = part._replace(outputs=outputs)
        else:
            self.joined = dict(part.outputs)
        self.parts.append(part)

    def scored_numbers(self) -> npt.NDArray[np.int64]:
        """Those of the rows that have not failed, in their order."""
        if not self.failures:
            return np.asarray(self.numbers)
        taken = [self.numbers[part.indices.start : part.indices.stop] for part in self.parts]
        return np.concatenate([np.arange(0), *taken])

    def outputs(self, name: str) -> list[Array]:
        """The rows of an output that have not failed, in their order: one array where they have one shape."""
        whole = self.joined.get(name)
        if whole is not None and not self.failures:
            return [whole]
        return [part.outputs[name] for part in self.parts]


class RowSlice:
    """Some rows of a batch, by their indices."""

    __slots__ = ("batch", "indices")

    def __init__(self, batch: ScoredBatch, indices: range) -> None:
        self.batch = batch
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> "RowSlice":
        return RowSlice(self.batch, self.indices[part])


class RowScorer:
    """Scores the rows of batches, sent in slices; many requests, and batches, in flight.

    Args:
        outputs: those of which the pipeline's types are made, and whose values must fit these; of others only
            the rows are counted.
        make_default: makes the result of a row that failed for good, if it has one.
        exc_class: a row that failed by such an error, without a default, is listed in its batch; by any other
            it raises.
    """

    def __init__(
        self,
        model: RemoteModel,
        batching: BatchingPolicy,
        metrics: InferenceMetrics,
        *,
        outputs: Sequence[OutputColumn] = (),
        make_default: Callable[[InferRequestEncoder], DefaultValue | None] = lambda encoder: None,
        exc_class: ExceptionClasses = (),
    ) -> None:
        self._model = model
        self._batching = batching
        self._outputs = {column.output.name: column for column in outputs}
        self._make_default = make_default
        self._exc_class = exc_class
        self._sender: BisectingSender[RowSlice] = BisectingSender(
            model,
            metrics,
            encode=self._encode,
            on_answer=self._on_answer,
            on_failure=self._on_failure,
            renew=self._renew,
            has_default=make_default(model.encoder) is not None,
        )
        self._use(self._sender.encoder)
        self._taken = 0
        self._ready: list[ScoredBatch] = []

    def add(
        self, inputs: Inputs, context: Any = None, numbers: npt.NDArray[np.int64] | None = None
    ) -> list[ScoredBatch]:
        """Send the rows of a batch; returns the batches that are ready, this one or earlier ones.

        ``numbers`` are those of the rows, where they do not simply count from 0.

        Raises:
            TritonError: a row failed for good, by an error that is not of ``exc_class``, and has no default.
        """
        arrays = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
        count = len(arrays[0]) if numbers is None else len(numbers)
        batch = ScoredBatch(inputs, range(count) if numbers is None else numbers, context)
        self._taken += count
        row_bytes = sum(map(_size_bytes, arrays)) / max(count, 1)
        start = 0
        while start < count:
            stop = min(start + self._request_rows(row_bytes), count)
            self._sender.send(RowSlice(batch, range(start, stop)))
            self._sender.take_ended()
            start = stop
        if not count:
            self._ready.append(batch)
        return self._take_ready()

    def refuse(
        self, numbers: npt.NDArray[np.int64], error: TritonError, context: Any = None
    ) -> list[ScoredBatch]:
        """Take rows that cannot be sent for what they are, as a batch whose rows all fail. Else as `add`."""
        if not len(numbers):
            return self.add({}, context, numbers)
        self._taken += len(numbers)
        self._sender.fail(RowSlice(ScoredBatch({}, numbers, context), range(len(numbers))), error)
        return self._take_ready()

    def finish(self) -> list[ScoredBatch]:
        """Wait for everything; returns the batches that were not returned before.

        Raises:
            TritonError: as `add`.
            AssertionError: a row was lost or came out twice.
        """
        self._sender.finish(self._taken)
        return self._take_ready()

    def cancel(self) -> None:
        """Abandon everything in flight. A second call does nothing."""
        self._sender.cancel()

    def _take_ready(self) -> list[ScoredBatch]:
        ready, self._ready = self._ready, []
        return ready

    def _use(self, encoder: InferRequestEncoder) -> None:
        """Send rows as ``encoder`` takes them.

        Raises:
            ConfigurationError: as `check_outputs`.
        """
        check_outputs(self._outputs.values(), encoder)
        model = encoder.model
        self._encoder = encoder
        self._is_batched = model.has_batch_dimension
        self._limits = self._batching.limits(model.max_batch_size, self._model.channel.endpoints.learned)
        self._default = self._make_default(encoder)

    def _renew(self, rows: RowSlice) -> list[RowSlice]:
        """The same rows in slices for the model as it is now."""
        if self._encoder is not self._sender.encoder:
            self._use(self._sender.encoder)
        size = min(len(rows), max(1, self._limits.next_batch()[0]))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _encode(self, rows: RowSlice, copies: int) -> EncodedRequest:
        inputs, indices = rows.batch.inputs, rows.indices
        # Without a batch dimension a request is one row.
        part: Any = slice(indices.start, indices.stop) if self._is_batched else indices.start
        if copies:
            part = [*indices, *[indices[-1]] * copies]
        if isinstance(inputs, dict):
            return self._encoder.encode({name: array[part] for name, array in inputs.items()})
        return self._encoder.encode(inputs[part])

    def _on_answer(self, rows: RowSlice, response: InferResponse, is_batched: bool) -> None:
        outputs = response.outputs
        if not is_batched:
            outputs = {name: array[np.newaxis] for name, array in outputs.items()}
        count = len(rows)
        for name, array in outputs.items():
            if array.shape[:1] != (count,):
                raise UnexpectedOutputError(
                    f"output {name!r} of model {self._model.spec.name!r} has shape {list(array.shape)}, "
                    f"which does not begin with the {count} rows of the request"
                )
        if not outputs:
            raise RemoteProtocolError(f"model {self._model.spec.name!r} answered without outputs")
        for name, column in self._outputs.items():
            column.check(outputs[name])
        rows.batch.add(ScoredPart(rows.indices, outputs, response.model_id, response.model_version))
        self._end(rows)

    def _on_failure(self, rows: RowSlice, error: TritonError) -> None:
        default = self._default
        if default is not None:
            outputs = {name: default.rows(name, len(rows)) for name in self._outputs}
            rows.batch.add(ScoredPart(rows.indices, outputs, DEFAULT_MODEL_ID))
        elif isinstance(error, self._exc_class):
            rows.batch.failures.append((rows.indices, error))
        else:
            message = f"row {rows.batch.numbers[rows.indices.start]} of its batch: {error.message}"
            raise with_message(error, message) from error
        self._end(rows)

    def _end(self, rows: RowSlice) -> None:
        batch = rows.batch
        batch.rows_left -= len(rows)
        if not batch.rows_left:
            batch.parts.sort(key=lambda part: part.indices.start)
            self._ready.append(batch)

    def _request_rows(self, row_bytes: float) -> int:
        """As many rows of this size as a request may hold, and at least one."""
        rows, nbytes = self._limits.next_batch()
        return max(1, min(rows, int(nbytes / row_bytes)) if row_bytes else rows)


def _size_bytes(array: Array) -> int:
    return sum(map(len, array.ravel())) if array.dtype.kind == "O" else array.nbytes


class RowBatchDoFn(ModelDoFn):
    """Scores batches of rows by a `RowScorer` a bundle.

    Args:
        outputs: those to give.
        dead_letters: what becomes of failed rows; None: the first fails the bundle.
    """

    def __init__(
        self,
        options: InferenceOptions,
        model_name: str,
        outputs: Sequence[OutputColumn],
        dead_letters: DeadLetters | None,
    ) -> None:
        super().__init__(options, model_name)
        self._scored_outputs = outputs
        self._dead_letters = dead_letters
        self._scorer: RowScorer | None = None

    def start_bundle(self) -> None:
        """Begin with nothing in flight."""
        assert self._model is not None, "setup has not been called"
        self._cancel()
        self._scorer = RowScorer(
            self._model,
            self._options.batching,
            InferenceMetrics(self._model.channel),
            outputs=self._scored_outputs,
            make_default=partial(default_of, self._options),
            exc_class=() if self._dead_letters is None else self._dead_letters.exc_class,
        )
