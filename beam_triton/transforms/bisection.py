"""Batches on their way to the model and back; one that is at fault is halved.

The same for elements of a pipeline, rows of NumPy batches and the batches of ``RunInference``: what a
batch consists of is its owner's affair, as long as it has a length and can be sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from beam_triton.dispatch.call_options import CallKind
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.errors import TritonError
from beam_triton.protocol import EncodedRequest, InferResponse
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.metrics import InferenceMetrics


class _Divisible(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


Batch = TypeVar("Batch", bound=_Divisible)


class BisectingSender(Generic[Batch]):
    """Sends batches, many at a time, and tells how each of them ended: exactly once for each element.

    When a batch fails in a way that one of its elements may be guilty of, its halves are sent in its
    place, and so on until the guilty ones stand alone. Made and used on one thread.

    Args:
        model: where to.
        metrics: told of every request that ends.
        encode: makes a request of a batch.
        on_answer: takes a batch and its answer. A `TritonError` that it raises is the batch's own: the
            answer does not account for it.
        on_failure: takes a batch that failed for good and its error; what it raises goes through.

    Attributes:
        ended: holds something if `take_ended` has something to do; for a look that costs nothing.
    """

    def __init__(
        self,
        model: RemoteModel,
        metrics: InferenceMetrics,
        *,
        encode: Callable[[Batch], EncodedRequest],
        on_answer: Callable[[Batch, InferResponse], None],
        on_failure: Callable[[Batch, TritonError], None],
    ) -> None:
        self._model = model
        self._metrics = metrics
        self._encode = encode
        self._on_answer = on_answer
        self._on_failure = on_failure
        self._dispatcher: Dispatcher[Batch] = Dispatcher(model.channel)
        self._throttled_seconds = 0.0
        self.ended: Sequence[Any] = self._dispatcher.completed

    def send(self, batch: Batch) -> None:
        """Send a batch; waits while the process has ``max_concurrent_requests`` in flight."""
        self._send(batch, is_part=False)
        self._dispatcher.step()

    def step(self) -> None:
        """Move what can be moved without waiting."""
        self._dispatcher.step()

    def take_ended(self) -> None:
        """Tell of every batch that has ended, or send its halves."""
        completed = self._dispatcher.completed
        if completed:
            self._count_throttling()
        while completed:
            batch, call = completed.popleft()
            self._metrics.request_ended(len(batch), call.record)
            error = call.error
            if error is None:
                assert isinstance(call.result, InferResponse)
                try:
                    self._on_answer(batch, call.result)
                    continue
                except TritonError as caught:
                    error = caught
            self._fail(batch, error)

    def finish(self) -> None:
        """Wait until nothing is in flight, and tell of everything."""
        while self._dispatcher.in_flight or self._dispatcher.completed:
            if not self._dispatcher.completed:
                self._dispatcher.wait()
            self.take_ended()
        self._count_throttling()

    def cancel(self) -> None:
        """Let go of everything: connections are closed, slots given back. A second call does nothing."""
        self._dispatcher.cancel()

    def _send(self, batch: Batch, *, is_part: bool) -> None:
        try:
            request = self._model.http_request(self._encode(batch))
        except TritonError as error:
            self._fail(batch, error)
            return
        kind = CallKind.SINGLE
        if len(batch) > 1:
            kind = CallKind.HALF if is_part else CallKind.BATCH
        self._dispatcher.submit(batch, request, self._model.read_response, kind=kind)

    def _fail(self, batch: Batch, error: TritonError) -> None:
        if not error.splits_batch or len(batch) == 1:
            self._on_failure(batch, error)
            return
        self._metrics.count("split_batches")
        middle = len(batch) // 2
        halves: tuple[Any, Any] = batch[:middle], batch[middle:]
        for half in halves:
            self._send(half, is_part=True)

    def _count_throttling(self) -> None:
        seconds = self._dispatcher.throttled_seconds
        if seconds != self._throttled_seconds:
            self._metrics.throttled(seconds - self._throttled_seconds)
            self._throttled_seconds = seconds
