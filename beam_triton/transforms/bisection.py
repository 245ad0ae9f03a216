"""Batches in flight; a failed one that holds a bad element is bisected until that element stands alone.

A batch may also fail because it is too large: what passes is learned for all later batches of the process.
And it may fail for an element of another request: a server with dynamic batching executes requests together,
and all of them fail if the model raises. A request of as many elements as the model takes is executed alone,
so what failed is filled up with copies of its last element, as its parts are: the halves of a batch would
otherwise meet again, and each would fail for what is in the other.

The same for the elements of a pipeline, the rows of NumPy batches and the batches of ``RunInference``: a
batch is anything that has a length and can be sliced.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from beam_triton.dispatch.activity import ACTIVITY
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.joint_requests import Joinable
from beam_triton.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelExecutionError,
    TransportError,
    TritonError,
    UnexpectedOutputError,
    with_message,
)
from beam_triton.policy.learned_size import BatchSize, FailedBatch
from beam_triton.policy.retry import HALF_CERTAIN
from beam_triton.protocol import EncodedRequest, InferRequestEncoder, InferResponse, PaddedLengths
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import check_can_be_scored
from beam_triton.transport.reactor import current_reactor


class _Divisible(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


Batch = TypeVar("Batch", bound=_Divisible)

_logger = logging.getLogger(__name__)


# A request that is filled up to be executed alone takes at most so many slots, see `Channel`.
_MOST_SLOTS = 8

# A batch that goes to servers with different models would otherwise be encoded anew for ever.
_MAX_RENEWALS = 3


class _Sent(NamedTuple):
    """A batch in flight.

    Attributes:
        encoder: made its request.
        whole: the failed batch that it is a part of.
        renewals: how often it has been encoded anew for another model.
        copies: of its last element, added so that no other request shares its execution.
        has_failed_alone: it was sent with copies before.
        lengths: those of its elements, where they were padded.
    """

    batch: Any
    encoder: InferRequestEncoder
    whole: FailedBatch | None
    renewals: int
    copies: int = 0
    has_failed_alone: bool = False
    lengths: PaddedLengths | None = None


@dataclass(eq=False, repr=False)
class BisectingSender(Generic[Batch]):
    """Sends batches, many at a time, and reports the outcome of each element exactly once.

    When a batch fails and one of its elements, or its size, may be the cause (``splits_batch``), its halves
    are sent in its place, and so on until the bad elements stand alone; parts of a size that passes, where
    one is known. Made and used on one thread.

    Args:
        model: the model to send to.
        metrics: gets every request that ends, and counts elements, failures and default values.
        encode: makes a request of a batch and so many copies of its last element, by ``encoder``.
        on_answer: takes a batch, its answer, and whether that has a batch dimension. A `TritonError` that it
            raises is the batch's own: the answer does not account for it.
        on_failure: takes a batch that failed for good and its error; what it raises goes through.
        renew: prepares a batch again, from its elements, as ``encoder`` takes them now: the batches to send
            instead. It reports elements that do not fit any more by `fail`.
        has_default: failed elements yield a default value, and are counted as such.

    Attributes:
        encoder: that of the model as it is; another one after the model has changed.
        ended: not empty when `take_ended` has something to do; looking at it costs no call.
    """

    model: RemoteModel
    metrics: InferenceMetrics
    _: KW_ONLY
    encode: Callable[[Batch, int], EncodedRequest]
    on_answer: Callable[[Batch, InferResponse, bool], None]
    on_failure: Callable[[Batch, TritonError], None]
    renew: Callable[[Batch], Sequence[Batch]]
    has_default: bool

    def __post_init__(self) -> None:
        self._dispatcher: Dispatcher[_Sent] = Dispatcher(self.model.channel)
        self._learned = self.model.channel.endpoints.learned
        self._use(self.model.encoder)
        self._finished_elements = 0
        self._reactor = current_reactor()
        self._sent_at = time.monotonic()
        self._batch_seconds = self._busy_seconds = 0.0
        self.ended: Sequence[Any] = self._dispatcher.completed

    def send(self, batch: Batch, joinable: Joinable | None = None) -> None:
        """Send a batch; waits while the process has ``max_concurrent_requests`` in flight.

        While the server is busy, a ``joinable`` batch may share a request with those of other bundles.
        """
        started_at, waited = time.monotonic(), self._reactor.waited_seconds
        self._batch_seconds += started_at - self._sent_at
        self._send(_Sent(batch, self.encoder, None, 0), joinable=joinable)
        self._dispatcher.step()
        self._sent_at = self._worked_since(started_at, waited)

    def step(self) -> None:
        """Do what can be done without waiting."""
        self._dispatcher.step()

    def take_ended(self) -> None:
        """Report every batch that has ended, or send its parts."""
        started_at, waited = time.monotonic(), self._reactor.waited_seconds
        self._take_ended()
        self._worked_since(started_at, waited)

    def _worked_since(self, started_at: float, waited: float) -> float:
        """Count the time since then, but for that in which the reactor has waited; gives the time now."""
        now = time.monotonic()
        self._busy_seconds += now - started_at - (self._reactor.waited_seconds - waited)
        return now

    def _take_ended(self) -> None:
        completed = self._dispatcher.completed
        if completed:
            self.metrics.take_waits(self._dispatcher)
        while completed:
            sent, call = completed.popleft()
            batch = sent.batch
            self.metrics.request_ended(len(batch), call.record)
            size = BatchSize(len(batch) + sent.copies, call.record.request_bytes)
            error = call.error
            if error is None:
                assert isinstance(call.result, InferResponse)
                model = sent.encoder.model
                try:
                    answer = call.result
                    if model.max_batch_size > 0:
                        answer = answer.of_elements(model, size.rows)
                    if sent.lengths is not None:
                        answer = sent.lengths.cut(answer)
                    if sent.copies:
                        answer = answer.first(len(batch))
                    self.on_answer(batch, answer, model.max_batch_size > 0)
                except TritonError as caught:
                    call.describe(caught)
                    error = caught
                else:
                    # A body that went through shared memory has passed no proxy.
                    over_http = 0 if call.record.shared_memory_requests else size.nbytes
                    self._learned.passed(BatchSize(size.rows, over_http))
                    if sent.whole is not None and sent.whole.part_passed(size):
                        self._learn(sent.whole)
                    self._count(batch)
                    if self.metrics.wants_answer:
                        arrays = call.result.outputs.values()
                        self.metrics.sample("answer", [array.tobytes() for array in arrays])
                    continue
            if error.model_may_have_changed and sent.encoder is self.encoder:
                self._adopt_change(error)
            if sent.encoder is self.encoder:
                self._bisect_or_fail(sent, error, size, call.lost_at)
            else:
                self._renew_or_fail(sent, error)

    def fail(self, batch: Batch, error: TritonError) -> None:
        """Report a batch that failed for good, whether it was sent or not.

        Raises:
            ConfigurationError: ``error`` is one, such as a secret that this worker cannot read. No element is
                at fault: the bundle fails, and the runner tries it again.
        """
        if isinstance(error, ConfigurationError):
            raise error
        if error.model_may_have_changed and self.model.is_described_by_user:
            about = f"the given model_spec says {self.model.spec.describe()}"
            error = with_message(error, f"{error.message}; {about}. Correct it, or leave model_spec out")
        self._count(batch)
        ACTIVITY.failed(error, len(batch))
        self.metrics.count("default_values" if self.has_default else "failures", len(batch))
        self.on_failure(batch, error)

    def finish(self, expected_elements: int) -> None:
        """Wait until nothing is in flight, and report everything.

        Raises:
            AssertionError: other than ``expected_elements`` have been reported since this object was made: an
                element was lost, or came out twice.
        """
        started_at, waited = time.monotonic(), self._reactor.waited_seconds
        while self._dispatcher.in_flight or self._dispatcher.completed:
            if not self._dispatcher.completed:
                self._dispatcher.wait()
            self._take_ended()
        self._worked_since(started_at, waited)
        self.metrics.took("batch_wait_microseconds", self._batch_seconds)
        self.metrics.took("sending_microseconds", self._busy_seconds)
        self.metrics.take_waits(self._dispatcher)
        self.metrics.flush()
        if self._finished_elements != expected_elements:
            raise AssertionError(
                f"beam_triton lost count: {expected_elements} elements came in, {self._finished_elements} "
                f"went out. The bundle fails so that the runner repeats it; please report this."
            )

    def cancel(self) -> None:
        """Abandon everything: connections are closed, slots released. A second call does nothing."""
        self._dispatcher.cancel()

    def _send(
        self,
        sent: _Sent,
        *,
        suspicion: int = 0,
        lost_at: float = math.inf,
        joinable: Joinable | None = None,
    ) -> None:
        try:
            encoded = self.encode(sent.batch, sent.copies)
            request = self.model.http_request(encoded)
        except TritonError as error:
            self._bisect_or_fail(sent, error, BatchSize(len(sent.batch), 0), lost_at)
            return
        size = BatchSize(len(sent.batch) + sent.copies, request.content_length)
        if self.metrics.wants_request:
            self.metrics.sample("request", request.body)
        if encoded.lengths is not None:
            sent = sent._replace(lengths=encoded.lengths)
        knows_blame = sent.has_failed_alone or (
            self._learned.rows.passed_lately(size.rows) if sent.copies else not self._copies(size)
        )
        self._dispatcher.submit(
            sent,
            request,
            self._read_response,
            is_batch=len(sent.batch) > 1,
            suspicion=suspicion,
            lost_at=lost_at,
            joinable=joinable,
            may_be_blameless=not knows_blame,
        )

    def _copies(self, size: BatchSize) -> int:
        """How many elements a request lacks to be executed alone; 0 where it is so already, or cannot be."""
        model = self.encoder.model
        copies = model.max_batch_size - size.rows
        if copies <= 0 or not model.shares_executions or model.whole_outputs:
            return 0
        most_bytes = min(_MOST_SLOTS * self.model.channel.options.slot_bytes, self._learned.nbytes.value)
        is_too_large = size.nbytes * model.max_batch_size > most_bytes * size.rows
        return 0 if is_too_large or model.max_batch_size > self._learned.rows.value else copies

    def _bisect_or_fail(self, sent: _Sent, error: TritonError, size: BatchSize, lost_at: float) -> None:
        batch = sent.batch
        has_raised = isinstance(error, ModelExecutionError)
        if has_raised and not sent.has_failed_alone and (copies := self._copies(size)):
            self.metrics.count("isolated_requests")
            self._send(sent._replace(copies=copies, whole=None), lost_at=lost_at)
            return
        if not error.splits_batch or len(batch) == 1:
            if error.splits_batch and sent.copies and not self._learned.rows.passed_lately(size.rows):
                # The copies may have been too many.
                filled = FailedBatch(size, 1, size, suggests_bytes=False)
                self._send(_Sent(batch, sent.encoder, filled, sent.renewals, has_failed_alone=True))
                return
            self.fail(batch, error)
            return
        self.metrics.count("split_batches")
        # Otherwise it was never sent. Outputs that only one element alone can have teach the size 1.
        may_be_too_large = isinstance(error, InferenceError | TransportError | UnexpectedOutputError)
        suggests_bytes = may_be_too_large and _suggests_bytes(error)
        if suggests_bytes:
            self._learned.nbytes.suspect(size.nbytes)
        part_rows = -(-len(batch) // self._learned.count_parts(size))
        starts = range(0, len(batch), part_rows)
        most_rows = self.encoder.model.max_batch_size
        # Where none as large has passed lately, copies may be too many.
        fills_up = (
            has_raised
            and self._learned.rows.passed_lately(most_rows)
            and self._copies(BatchSize(part_rows, size.nbytes * part_rows // size.rows)) > 0
        )
        whole = None
        if may_be_too_large and not fills_up:
            wanted = size if sent.whole is None else sent.whole.wanted
            whole = FailedBatch(size, len(starts), wanted, suggests_bytes=suggests_bytes)
        # An element alone is given up, not bisected further: it has to be the reason by itself.
        suspicion = HALF_CERTAIN if isinstance(error, DeadlineExceededError) and part_rows > 1 else 0
        for start in starts:
            part = batch[start : start + part_rows]
            copies = most_rows - len(part) if fills_up else 0
            self._send(
                _Sent(part, sent.encoder, whole, sent.renewals, copies), suspicion=suspicion, lost_at=lost_at
            )

    def _use(self, encoder: InferRequestEncoder) -> None:
        self.encoder = encoder
        self._read_response = partial(self.model.read_response, expected=encoder.required_outputs)

    def _adopt_change(self, error: TritonError) -> None:
        """Use the encoder of the model as it is now, if that is another one than ``error`` is about."""
        before = self.encoder.model
        try:
            encoder = self.model.renewed(self.encoder)
            if encoder is None:
                return
            check_can_be_scored(encoder.model, encoder.expected_outputs)
        except ConfigurationError as misfit:
            raise with_message(misfit, f"{error.message}; the model has changed: {misfit.message}") from error
        except TritonError as unknown:
            _logger.warning(
                "model %r may have changed, but cannot be asked: %s", before.name, unknown.message
            )
            return
        _logger.warning(
            "model %r has changed in mid-job: %s; it had %s",
            before.name,
            encoder.model.describe(),
            before.describe(),
        )
        self._use(encoder)

    def _renew_or_fail(self, sent: _Sent, error: TritonError) -> None:
        """Encode the elements of a batch anew that was made for the model as it was before."""
        is_worthwhile = error.model_may_have_changed or error.splits_batch
        if not is_worthwhile or sent.renewals == _MAX_RENEWALS:
            self.fail(sent.batch, error)
            return
        for batch in self.renew(sent.batch):
            self._send(_Sent(batch, self.encoder, None, sent.renewals + 1))

    def _learn(self, failed: FailedBatch) -> None:
        learned = self._learned.lower(failed)
        if learned is not None:
            _logger.warning(
                "model %r: %s; no larger ones are sent from now on, except for one to try now and then",
                self.model.spec.name,
                learned,
            )

    def _count(self, batch: Batch) -> None:
        self._finished_elements += len(batch)
        self.metrics.count("elements", len(batch))


def _suggests_bytes(error: TritonError) -> bool:
    """Whether a proxy may have refused the body, rather than the model the number of elements."""
    if isinstance(error, InvalidRequestError):
        return error.status == 413
    return not isinstance(error, ModelExecutionError | DeadlineExceededError | UnexpectedOutputError)
