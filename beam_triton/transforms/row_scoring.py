"""The rows of NumPy batches on their way: sent in slices, the results of a batch put back in order.

One array of results a batch, not one a request: a request's rows cost a copy of their bytes, a batch
of Beam's twenty times that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from beam_triton.errors import RemoteProtocolError, TritonError, with_message
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.protocol import DATATYPES, EncodedRequest, InferResponse, TensorSpec
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.results import DefaultValue

Array = npt.NDArray[Any]


class ScoredBatch:
    """A batch and the array that its results go to; ``context`` is its owner's affair."""

    __slots__ = ("context", "results", "rows", "rows_left")

    def __init__(self, rows: Array, results: Array, context: Any) -> None:
        self.rows = rows
        self.results = results
        self.rows_left = len(rows)
        self.context = context


class _Slice:
    """Some rows of a batch, by their numbers."""

    __slots__ = ("batch", "numbers")

    def __init__(self, batch: ScoredBatch, numbers: range) -> None:
        self.batch = batch
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> _Slice:
        return _Slice(self.batch, self.numbers[part])


class RowScorer:
    """Scores the rows of batches on a model with one input; many requests, and batches, in flight.

    Args:
        output: the output to give.
        default: what a row yields instead that failed for good; otherwise the first one raises.
    """

    def __init__(
        self,
        model: RemoteModel,
        output: TensorSpec,
        batching: BatchingPolicy,
        metrics: InferenceMetrics,
        default: DefaultValue | None,
    ) -> None:
        self._model = model
        self._output = output
        self._batching = batching
        self._default = default
        self._sender: BisectingSender[_Slice] = BisectingSender(
            model,
            metrics,
            encode=self._encode,
            on_answer=self._on_answer,
            on_failure=self._on_failure,
            has_default=default is not None,
        )
        self._result_dtype = DATATYPES[output.datatype].array_dtype
        self._taken = 0
        self._ready: list[ScoredBatch] = []

    def add(self, rows: Array, context: Any = None) -> list[ScoredBatch]:
        """Send the rows of a batch; the batches that have become ready, this one or earlier ones.

        Raises:
            TritonError: a row failed for good and there is no default.
        """
        self._taken += len(rows)
        results: Array = np.empty((len(rows), *self._output.shape), dtype=self._result_dtype)
        batch = ScoredBatch(rows, results, context)
        size = self._request_size(rows)
        for start in range(0, len(rows), size):
            self._sender.send(_Slice(batch, range(start, min(start + size, len(rows)))))
            self._sender.take_ended()
        if not len(rows):
            self._ready.append(batch)
        return self._take_ready()

    def finish(self) -> list[ScoredBatch]:
        """Wait for everything; the batches that were not given yet.

        Raises:
            TritonError: a row failed for good and there is no default.
            AssertionError: a row was lost or came out twice.
        """
        self._sender.finish(self._taken)
        return self._take_ready()

    def cancel(self) -> None:
        """Let go of everything in flight. A second call does nothing."""
        self._sender.cancel()

    def _take_ready(self) -> list[ScoredBatch]:
        ready, self._ready = self._ready, []
        return ready

    def _encode(self, rows: _Slice) -> EncodedRequest:
        return self._model.encoder.encode(rows.batch.rows[rows.numbers.start : rows.numbers.stop])

    def _on_answer(self, rows: _Slice, response: InferResponse) -> None:
        result = response.outputs[self._output.name]
        expected = (len(rows), *self._output.shape)
        if result.shape != expected:
            raise RemoteProtocolError(
                f"output {self._output.name!r} of model {self._model.spec.name!r} has shape "
                f"{list(result.shape)}, not {list(expected)} for the {expected[0]} rows of the request"
            )
        self._put(rows, result)

    def _on_failure(self, rows: _Slice, error: TritonError) -> None:
        if self._default is None:
            raise with_message(error, f"row {rows.numbers.start} of its batch: {error.message}") from error
        self._put(rows, self._default.rows(self._output.name, len(rows)))

    def _put(self, rows: _Slice, result: Array) -> None:
        batch, count = rows.batch, len(rows)
        batch.results[rows.numbers.start : rows.numbers.stop] = result
        batch.rows_left -= count
        if not batch.rows_left:
            self._ready.append(batch)

    def _request_size(self, rows: Array) -> int:
        """As many rows as the model, the policy's number and its bytes allow, and at least one."""
        limit = self._model.spec.max_batch_size
        size = min(limit, self._batching.max_batch_size or limit)
        if rows.nbytes:
            size = min(size, self._batching.max_batch_bytes * len(rows) // rows.nbytes)
        return max(1, size)
