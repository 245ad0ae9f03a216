"""Sequences in flight: one element of each at a time, many sequences at once, none lost with its server.

::

    elements of a key ──▶ START ──▶ … ──▶ END            all at one endpoint, under one correlation ID
                            ▲         │ the server does not answer, or does not know the sequence
                            └─────────┘ the answered elements again, then the next one

A sequence that is sent again has another correlation ID where a request under the old one may still be on its
way.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain, count, islice
from typing import Any, NamedTuple

from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.dispatch.activity import ACTIVITY
from beam_triton.dispatch.call import Call
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.endpoints import Endpoint
from beam_triton.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelExecutionError,
    SequenceEndedError,
    SequenceLostError,
    TritonError,
    with_message,
)
from beam_triton.policy.retry import RetryPolicy
from beam_triton.protocol import PreparedElement
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bundle import dead_letter
from beam_triton.transforms.exception_handling import DeadLetters
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.results import DefaultValue, Outputs, PredictionResults, split_key
from beam_triton.transforms.row_results import RowResults

_logger = logging.getLogger(__name__)

# Triton takes 64 bits, others that read JSON as signed integers 63.
_CORRELATION_IDS = 2**63 - 1
# A model may hang on an element.
_MOST_TIMEOUTS = 2
# Of answered elements that a process keeps between bundles. A sequence that is dropped is sent again from
# Beam's state.
_MEMORY_BYTES = 256 * 2**20
# Of the Python objects of one element, and of a sequence.
_ELEMENT_BYTES, _SEQUENCE_BYTES = 512, 1024
# A start that takes longer has waited for the end of another sequence.
_LONG_START_SECONDS = 5.0
# Models and subjects of which a warning has spoken in this process.
_warned: set[tuple[str, str]] = set()


class Element(NamedTuple):
    """An element of a sequence: ``ends`` it, and has been taken as its ``position``-th."""

    windowed_value: WindowedValue
    ends: bool
    position: int = 0


class Place(NamedTuple):
    """A server's place for a sequence that ends without its last element; ``prepared`` is sent for that."""

    endpoint: Endpoint
    correlation_id: int
    prepared: PreparedElement


@dataclass(eq=False)
class RemoteSequence:
    """A sequence whose state one server has.

    Attributes:
        answered: the elements that have been answered, for a server that lost them; None: too many to keep.
        nbytes: of these in memory.
        known: how many of these the server has.
        confirmed: how many of these are known to have been answered. Beam's state has elements of the last
            bundle as well, one of which may have failed.
        correlation_id: by which the server knows the sequence; 0 for one that it has never had.
        endpoint: that server; None before the first answer, and where the sequence has to start again.
        failure: what ended it.
        skipped: positions of elements that failed, without which it goes on.
        token: of the bundle that has sent its last elements.
        waiting: the elements that this bundle still has to send, or to hear of; the first one is next.
        prepared: the tensors of that one, once they are made.
        is_replay: what is in flight is an answered element.
        losses: how often the sequence was lost at that element.
        to_free: what is in flight, or the next request, frees this place.
    """

    answered: list[PreparedElement] | None = field(default_factory=list)
    nbytes: int = _SEQUENCE_BYTES
    known: int = 0
    confirmed: int = 0
    correlation_id: int = 0
    endpoint: Endpoint | None = None
    failure: TritonError | None = None
    skipped: list[int] = field(default_factory=list)
    token: str = ""
    waiting: deque[Element] = field(default_factory=deque)
    prepared: PreparedElement | None = None
    is_replay: bool = False
    losses: int = 0
    to_free: Place | None = None

    def start_again(self, *, by_same_id: bool = False) -> None:
        """Leave what a server may have of it.

        A start under the same ID frees the server's place for it at once. Where a request may still be on its
        way, it would come into the new one.
        """
        self.endpoint = None
        self.known = 0
        if not by_same_id:
            self.correlation_id = 0

    def end(self) -> None:
        """Let the next element begin another one."""
        self.start_again()
        self.answered, self.failure, self.skipped = [], None, []
        self.confirmed, self.nbytes = 0, _SEQUENCE_BYTES

    def keep(self, prepared: PreparedElement, most: int) -> bool:
        """Keep an answered element; False if they are more than ``most`` now, and none is kept."""
        if self.answered is None:
            return True
        self.answered.append(prepared)
        self.nbytes += prepared.nbytes + _ELEMENT_BYTES
        if len(self.answered) <= most:
            return True
        self.answered, self.nbytes = None, _SEQUENCE_BYTES
        return False

    def skip_unconfirmed(self) -> None:
        """Go on without the element that was to be sent again: it had not been answered."""
        assert self.answered is not None
        dropped = self.answered.pop(self.known)
        self.nbytes -= dropped.nbytes + _ELEMENT_BYTES
        positions = (position for position in count() if position not in self.skipped)
        self.skipped.append(next(islice(positions, self.known, None)))


class SequenceMemory:
    """Sequences of this process that go on in a later bundle; bounded, thread-safe.

    Only the process that has sent a sequence's last elements may go on with it: another one cannot know what
    a bundle that failed since has sent. What is not found here is sent again.
    """

    def __init__(self, max_bytes: int = _MEMORY_BYTES) -> None:
        self._lock = threading.Lock()
        self._sequences: OrderedDict[Hashable, tuple[RemoteSequence, int]] = OrderedDict()
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._process = os.getpid()

    def put(self, key: Hashable, sequence: RemoteSequence) -> None:
        """Keep a sequence; the ones that have waited longest make room."""
        nbytes = sequence.nbytes
        with self._lock:
            _, replaced = self._sequences.pop(key, (None, 0))
            self._sequences[key] = sequence, nbytes
            self._nbytes += nbytes - replaced
            while self._nbytes > self._max_bytes:
                _, (_, dropped) = self._sequences.popitem(last=False)
                self._nbytes -= dropped

    def take(self, key: Hashable) -> RemoteSequence | None:
        """Remove a sequence and give it, if it is here."""
        with self._lock:
            if self._process != os.getpid():
                # A forked child: its parent goes on with them.
                self._process, self._nbytes = os.getpid(), 0
                self._sequences.clear()
            sequence, nbytes = self._sequences.pop(key, (None, 0))
            self._nbytes -= nbytes
            return sequence


@dataclass(eq=False, repr=False)
class SequenceScorer:
    """Scores the sequences of one bundle, as many at a time as there are slots.

    Args:
        model: the model to score on.
        retry: how often a sequence may be lost at one element.
        metrics: gets everything that ends.
        results: takes the inputs out of elements, and makes results of answers.
        dead_letters: failed elements leave as these; the first one that does not, raises.
        default: makes what an element that failed yields instead, if anything.
        goes_on: a sequence goes on without an element that failed; otherwise its other elements fail.
        max_replay_elements: a sequence of more is not sent again.
    """

    model: RemoteModel
    retry: RetryPolicy
    metrics: InferenceMetrics
    _: KW_ONLY
    results: PredictionResults | RowResults
    dead_letters: DeadLetters | None
    default: DefaultValue | None
    goes_on: bool
    max_replay_elements: int

    def __post_init__(self) -> None:
        self._encoder = self.model.encoder
        self._inputs_of = self.results.reader(self._encoder)
        self._dispatcher: Dispatcher[RemoteSequence] = Dispatcher(self.model.channel)
        self._outputs: list[Iterable[Any]] = []
        # The last element that was answered: a model can take it.
        self._harmless: PreparedElement | None = None

    def prepare(self, inputs: Any) -> PreparedElement:
        """An element's tensors.

        Raises:
            LocalProtocolError: it does not fit the model.
        """
        return self._encoder.prepare(self._inputs_of(inputs))

    def add(self, sequence: RemoteSequence, elements: Iterable[Element]) -> None:
        """Send the elements one after the other, after those that wait already; waits only for a slot."""
        goes_on_by_itself = bool(sequence.waiting) or sequence.to_free is not None
        sequence.waiting.extend(elements)
        if sequence.waiting and not goes_on_by_itself:
            self._dispatcher.take_slot(self._take_ended)
            self._go_on(sequence)
        self._take_ended()

    def fail(self, windowed_value: WindowedValue, error: TritonError) -> None:
        """Let an element fail."""
        self.metrics.count("elements")
        ACTIVITY.failed(error)
        element = windowed_value.value
        if self.default is not None:
            self.metrics.count("default_values")
            result = self.results.default(element, self.default)
            self._outputs.append((windowed_value.with_value(result),))
            return
        self.metrics.count("failures")
        self._outputs.append((dead_letter(self.dead_letters, windowed_value, None, error),))

    def take_outputs(self) -> Iterable[Any]:
        """What is ready, each with the window of its own element."""
        self._dispatcher.step()
        self._take_ended()
        outputs, self._outputs = self._outputs, []
        return Outputs(chain.from_iterable, outputs) if outputs else ()

    def finish(self) -> Iterable[Any]:
        """Wait until every element has its outcome, and give the remaining outputs."""
        while self._dispatcher.in_flight:
            self._dispatcher.wait()
            self._take_ended()
        self.metrics.flush()
        return self.take_outputs()

    def cancel(self) -> None:
        """Abandon whatever is in flight. A second call does nothing."""
        self._dispatcher.cancel()

    def _go_on(self, sequence: RemoteSequence) -> None:
        """Send what comes next, or give the slot back where nothing does."""
        while sequence.waiting or sequence.to_free is not None:
            if sequence.to_free is not None:
                self._free(sequence, sequence.to_free)
                return
            element = sequence.waiting[0]
            if sequence.failure is not None:
                self._fail_next(sequence, ended_by(sequence.failure))
                continue
            try:
                if sequence.prepared is None:
                    sequence.prepared = self.prepare(split_key(element.windowed_value.value)[2])
                self._send(sequence, sequence.prepared, ends=element.ends)
                return
            except TritonError as error:
                self._end_at(sequence, error)
        self._dispatcher.release_slot()

    def _send(self, sequence: RemoteSequence, prepared: PreparedElement, *, ends: bool) -> None:
        answered = sequence.answered or ()
        sequence.is_replay = sequence.known < len(answered)
        if sequence.is_replay:
            prepared, ends = answered[sequence.known], False
        starts = sequence.endpoint is None
        if not sequence.correlation_id:
            sequence.correlation_id = 1 + secrets.randbelow(_CORRELATION_IDS)
        parameters: dict[str, Any] = {"sequence_id": sequence.correlation_id}
        if starts:
            parameters["sequence_start"] = True
        if ends:
            parameters["sequence_end"] = True
        encoded = self._encoder.encode_batch([prepared], parameters=parameters)
        self._dispatcher.submit(
            sequence,
            self.model.http_request(encoded),
            self.model.read_response,
            # A start that is repeated begins the sequence again.
            is_sequence=not starts,
            starts_sequence=starts,
            pinned=sequence.endpoint,
            takes_slots=False,
        )

    def _free(self, sequence: RemoteSequence, place: Place) -> None:
        """Let another sequence have the place, which a server keeps until its sequence ends or is idle.

        A start forgets what the model knows under that ID.
        """
        flags = {"sequence_id": place.correlation_id, "sequence_start": True, "sequence_end": True}
        self._dispatcher.submit(
            sequence,
            self.model.http_request(self._encoder.encode_batch([place.prepared], parameters=flags)),
            self.model.read_response,
            is_sequence=True,
            pinned=place.endpoint,
            takes_slots=False,
        )

    def _place(self, sequence: RemoteSequence, call: Call | None) -> Place | None:
        """The place that the sequence has; None where its server did not answer, as that may be ill."""
        if call is None:
            endpoint = sequence.endpoint
        else:
            has_answered = call.error is None or isinstance(call.error, InferenceError)
            endpoint = call.endpoint if has_answered else None
        prepared = sequence.answered[-1] if sequence.answered else self._harmless
        if prepared is None and not (call is not None and isinstance(call.error, ModelExecutionError)):
            # One that makes the model raise would fail others that share its execution.
            prepared = sequence.prepared
        if endpoint is None or prepared is None:
            return None
        return Place(endpoint, sequence.correlation_id, prepared)

    def _take_ended(self) -> None:
        completed = self._dispatcher.completed
        while completed:
            sequence, call = completed.popleft()
            self.metrics.request_ended(1, call.record)
            if sequence.to_free is not None:
                # However it went: nothing of the sequence is sent under this ID any more.
                sequence.to_free = None
                self._go_on(sequence)
                continue
            error = call.error
            if error is None:
                try:
                    self._on_answer(sequence, call)
                except TritonError as caught:
                    error = caught
            if error is not None:
                self._on_error(sequence, call, error)
            self._go_on(sequence)
        self.metrics.take_waits(self._dispatcher)

    def _on_answer(self, sequence: RemoteSequence, call: Call) -> None:
        if sequence.endpoint is None and not sequence.known and not sequence.answered:
            self.metrics.count("sequences")
        if sequence.endpoint is None and call.record.latency_seconds > _LONG_START_SECONDS:
            self._warn_once(
                "start",
                f"a sequence waited {call.record.latency_seconds:.1f} s for its first answer: the server has "
                f"as many places for sequences as the configuration says (max_candidate_sequences, or "
                f"max_batch_size of the direct strategy, for each instance), and gives one to another "
                f"sequence when it ends or is idle",
            )
        sequence.endpoint = call.endpoint
        sequence.known += 1
        sequence.confirmed = max(sequence.confirmed, sequence.known)
        if sequence.is_replay:
            self.metrics.count("replayed_elements")
            return
        element = sequence.waiting[0]
        is_batched = self._encoder.model.has_batch_dimension
        outputs = self.results.of_answer([element.windowed_value], call.result, is_batched)
        self._outputs.append(outputs)
        self.metrics.count("elements")
        assert sequence.prepared is not None
        self._harmless = sequence.prepared
        if not sequence.keep(sequence.prepared, self.max_replay_elements):
            self.metrics.count("sequences_not_replayable")
        self._next(sequence)

    def _on_error(self, sequence: RemoteSequence, call: Call, error: TritonError) -> None:
        begun = call.pinned is not None
        if begun and self._is_lost(error) and sequence.losses < self._most_losses(error):
            sequence.losses += 1
            if sequence.answered is not None:
                if isinstance(error, SequenceLostError):
                    self._warn_once(
                        "lost",
                        f"a sequence is sent again: {error.message}. A server that was not restarted forgets "
                        f"what is idle for max_sequence_idle_microseconds of the model's configuration, by "
                        f"default one second",
                    )
                _logger.debug("a sequence is sent again after %d elements: %s", sequence.known, error)
                self.metrics.count("replayed_sequences")
                sequence.start_again(by_same_id=isinstance(error, InferenceError))
                return
            error = with_message(
                error,
                f"{error.message}. The sequence cannot be sent again, as it has more elements than "
                f"max_replay_elements",
            )
        is_confirmed = sequence.known < sequence.confirmed
        if sequence.is_replay and self.goes_on and not is_confirmed and _is_the_elements(error):
            # It has failed before as well, in another process, which had no time to write that down.
            sequence.skip_unconfirmed()
            sequence.losses = 0
            sequence.start_again(by_same_id=True)
            return
        if sequence.is_replay and (isinstance(error, ModelExecutionError) or not self._is_lost(error)):
            # An earlier element is why; it has failed before, in another process.
            error = ended_by(error)
        self._end_at(sequence, error, call)

    def _end_at(self, sequence: RemoteSequence, error: TritonError, call: Call | None = None) -> None:
        """The next element fails, and its sequence with it or not; without ``call`` it was not sent."""
        element = sequence.waiting[0]
        was_sent = call is not None
        is_over = not self.goes_on or (was_sent and (sequence.is_replay or sequence.answered is None))
        # The end flag ends it, however the server answers the request that has it.
        had_end_flag = was_sent and element.ends and not sequence.is_replay
        if (is_over or element.ends) and not had_end_flag:
            sequence.to_free = self._place(sequence, call)
        self._fail_next(sequence, error)
        if element.ends:
            return
        if is_over:
            sequence.failure = error
            return
        sequence.skipped.append(element.position)
        if was_sent:
            # The server may have it.
            sequence.start_again(by_same_id=isinstance(error, InferenceError))

    def _fail_next(self, sequence: RemoteSequence, error: TritonError) -> None:
        self.fail(sequence.waiting[0].windowed_value, error)
        self._next(sequence)

    def _next(self, sequence: RemoteSequence) -> None:
        element = sequence.waiting.popleft()
        sequence.prepared = None
        sequence.losses = 0
        if element.ends:
            sequence.end()

    def _warn_once(self, subject: str, message: str) -> None:
        about = (self._encoder.model.name, subject)
        if about not in _warned:
            _warned.add(about)
            _logger.warning("model %r: %s", about[0], message)

    @staticmethod
    def _is_lost(error: TritonError) -> bool:
        return error.retryable or isinstance(error, SequenceLostError)

    def _most_losses(self, error: TritonError) -> int:
        most = self.retry.max_retries
        if isinstance(error, ModelExecutionError):
            most = min(most, self.retry.max_server_error_retries)
        if isinstance(error, DeadlineExceededError):
            most = min(most, _MOST_TIMEOUTS)
        return most


def _is_the_elements(error: TritonError) -> bool:
    """Whether the element itself is why, for certain: a model may raise for another one in its batch."""
    is_refusal = isinstance(error, InvalidRequestError) and error.status == 400
    return is_refusal and not isinstance(error, SequenceLostError)


def ended_by(failure: TritonError) -> TritonError:
    """The error of the elements behind the one that failed."""
    if isinstance(failure, SequenceEndedError):
        return failure
    return SequenceEndedError(f"an earlier element of the sequence failed: {failure}")
