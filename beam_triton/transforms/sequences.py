"""`TritonSequenceInference`: stateful models, whose sequences are the keys and windows of a PCollection."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import uuid4

import apache_beam as beam
import numpy as np
from apache_beam.coders import FastPrimitivesCoder
from apache_beam.pvalue import PCollection
from apache_beam.transforms.core import Windowing
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.trigger import AccumulationMode, DefaultTrigger
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import BoundedWindow, GlobalWindows, NonMergingWindowFn
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Tuple
from apache_beam.typehints.typehints import is_consistent_with
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.errors import (
    ConfigurationError,
    LateElementError,
    LocalProtocolError,
    SequenceEndedError,
)
from beam_triton.options import InferenceOptions
from beam_triton.protocol.text import shorten
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.exception_handling import DeadLetters
from beam_triton.transforms.inference import TritonInference, key_and_element
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import ModelDoFn, default_of
from beam_triton.transforms.results import PredictionResults, split_key
from beam_triton.transforms.row_inputs import FromElement, said_of
from beam_triton.transforms.row_results import RowResults
from beam_triton.transforms.sequence_scorer import (
    Element,
    RemoteSequence,
    SequenceMemory,
    SequenceScorer,
    ended_by,
)

_OWN_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end")

_MEMORY = SequenceMemory()
_WINDOW_HAD_ENDED = "the window of its sequence had ended"


class _Arrival(NamedTuple):
    """An element as it waits for its turn: in event time, in microseconds, and then by ``order``."""

    micros: int
    order: Any
    ends: bool
    element: Any


@dataclass(frozen=True, kw_only=True)
class Sequencing:
    """What makes elements a sequence; the arguments are those of `TritonSequenceInference`.

    Raises:
        ConfigurationError: an argument cannot work.
    """

    order_by: FromElement | None = None
    ends: FromElement | str | None = "window"
    after_error: str = "end"
    max_replay_elements: int = 10_000

    def __post_init__(self) -> None:
        for name in ("order_by", "ends"):
            value = getattr(self, name)
            is_column = isinstance(value, Mapping) and list(value) == ["column"]
            if value is None or callable(value) or is_column or (name == "ends" and value == "window"):
                continue
            window = ', "window"' if name == "ends" else ""
            raise ConfigurationError(
                f"{name} must be a callable that takes an element{window} or {{'column': 'its column'}}, "
                f"not {value!r}"
            )
        if self.after_error not in ("end", "replay"):
            raise ConfigurationError(f'after_error must be "end" or "replay", not {self.after_error!r}')
        limit = self.max_replay_elements
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise ConfigurationError(f"max_replay_elements must be a whole number from 0, not {limit!r}")

    @property
    def holds_last(self) -> bool:
        """The newest element waits until it is known whether it is the last one."""
        return self.ends == "window"

    def arrival(self, micros: int, element: Any) -> _Arrival:
        """Where an element belongs.

        Raises:
            LocalProtocolError: ``order_by`` or ``ends`` fails on it.
        """
        order = None
        if self.order_by is not None:
            order = _comparable(said_of(element, self.order_by, "order_by"))
        ends = False
        if self.ends not in (None, "window"):
            ends = said_of(element, self.ends, "ends")
            if not isinstance(ends, bool | int | np.bool_ | np.integer):
                raise LocalProtocolError(f"ends gives {shorten(ends)}, which is neither True nor False")
        return _Arrival(micros, order, bool(ends), element)


def _comparable(order: Any) -> tuple[Any, ...]:
    """What ``order_by`` gives, comparable with all that it gives for other elements.

    Raises:
        LocalProtocolError: it has no order.
    """
    if isinstance(order, datetime):
        order = order.timestamp()
    elif isinstance(order, Timestamp):
        order = order.micros / 1e6
    elif isinstance(order, np.generic):
        order = order.item()
    if isinstance(order, int | float) and order == order:
        return (0, order)
    if isinstance(order, str):
        return (1, order)
    if isinstance(order, bytes):
        return (2, order)
    if isinstance(order, tuple | list):
        return (3, *map(_comparable, order))
    raise LocalProtocolError(
        f"order_by gives {shorten(order)}, which has no order: it takes numbers, text, bytes, times, and "
        f"tuples of these"
    )


def _in_order(arrivals: Iterable[_Arrival]) -> list[_Arrival]:
    return sorted(arrivals, key=lambda each: each[:2])


def _taken(waiting: Any) -> list[_Arrival]:
    """The elements that wait in a bag, in order; the bag is empty then."""
    arrivals = _in_order(_Arrival(*each) for each in waiting.read())
    waiting.clear()
    return arrivals


class SequenceDoFn(ModelDoFn):
    """What the DoFns of sequences share; the arguments are those of `TritonInferenceDoFn`, and
    ``sequencing``."""

    _of_sequences = True

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        *,
        sequencing: Sequencing,
        results: PredictionResults | RowResults,
        with_exception_handling: bool | DeadLetters = False,
        **options: Any,
    ) -> None:
        super().__init__(sequence_options(endpoint, options), model_name)
        self._options.spec_of(model_name)
        self._sequencing = sequencing
        self._results = results
        self._dead_letters = DeadLetters.of_option(with_exception_handling)
        # Whole sequences are in memory in any case.
        self._max_replay_elements = sys.maxsize

    def start_bundle(self) -> None:
        """Start with nothing in flight."""
        self._cancel()
        model = self._model
        assert model is not None, "setup has not been called"
        self._scorer = SequenceScorer(
            model,
            self._options.retry,
            InferenceMetrics(model.channel),
            results=self._results,
            dead_letters=self._dead_letters,
            default=default_of(self._options, model.encoder),
            goes_on=self._sequencing.after_error == "replay",
            max_replay_elements=self._max_replay_elements,
        )

    def _arrival(self, micros: int, element: Any, window: BoundedWindow) -> _Arrival | None:
        """Where an element belongs; None for one that has failed."""
        try:
            return self._sequencing.arrival(micros, element)
        except LocalProtocolError as error:
            self._scorer.fail(_windowed(micros, element, window), error)
            return None

    def _ready(self) -> Iterable[Any]:
        outputs: Iterable[Any] = self._scorer.take_outputs()
        return outputs

    def finish_bundle(self) -> Iterable[Any]:
        """Wait until nothing is in flight, and give the remaining results."""
        return self._finish()


class WholeSequencesDoFn(SequenceDoFn):
    """Scores sequences whose elements have all come: ``(key, [(microseconds, element), …])``."""

    def process(
        self,
        grouped: tuple[Any, Iterable[tuple[int, Any]]],
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterable[Any]:
        """Send a sequence; gives the results that are ready, of this and earlier ones."""
        scorer: SequenceScorer = self._scorer
        found = [self._arrival(micros, element, window) for micros, element in grouped[1]]
        arrivals = _in_order(each for each in found if each is not None)
        elements = []
        for number, arrival in enumerate(arrivals, 1):
            windowed_value = _windowed(arrival.micros, arrival.element, window)
            if pane.index > 0:
                scorer.fail(windowed_value, _late(_WINDOW_HAD_ENDED))
                continue
            is_last = self._sequencing.holds_last and number == len(arrivals)
            elements.append(Element(windowed_value, arrival.ends or is_last))
        if elements:
            scorer.add(RemoteSequence(), elements)
        return scorer.take_outputs()


class _Progress(NamedTuple):
    """What Beam's state knows of the sequence of a key and window.

    Attributes:
        token: of the bundle that sent the last elements.
        last_micros: event time of the last element sent.
        taken: elements sent since the sequence began.
        skipped: positions of those that failed, without which it goes on.
        settled: of so many elements it is known whether they failed.
        failure: why it has ended, if it has.
        is_kept: all of its elements are in the state.
        is_over: the window has ended.
        due_micros: when the timer for elements that wait is due, if it is set.
    """

    token: str = ""
    last_micros: int | None = None
    taken: int = 0
    skipped: tuple[int, ...] = ()
    settled: int = 0
    failure: str = ""
    is_kept: bool = True
    is_over: bool = False
    due_micros: int | None = None

    @classmethod
    def of(cls, state: Any) -> _Progress:
        """What the state holds; the beginning where it is empty."""
        return cls(*(state.read() or ()))


class GrowingSequencesDoFn(SequenceDoFn):
    """Scores the elements of unbounded sequences when the watermark has passed them.

    Beam's state holds the elements that wait, those that have been sent (for a server that loses them), and
    how far the sequence is. What is sent is written before the answer is known: a bundle that fails takes its
    writes back, and one that is repeated, here or on another worker, finds another token than the one that
    this process remembers, and sends the sequence again.
    """

    WAITING = BagStateSpec("waiting", FastPrimitivesCoder())
    SENT = BagStateSpec("sent", FastPrimitivesCoder())
    PROGRESS = ReadModifyWriteStateSpec("progress", FastPrimitivesCoder())
    DUE = TimerSpec("due", TimeDomain.WATERMARK)
    WINDOW_END = TimerSpec("window_end", TimeDomain.WATERMARK)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._max_replay_elements = self._sequencing.max_replay_elements
        # Pickled with it: names this step's sequences in every process.
        self._name = uuid4().hex
        self._open: dict[Any, RemoteSequence] = {}

    def start_bundle(self) -> None:
        """Start with nothing in flight."""
        super().start_bundle()
        self._open = {}

    def process(
        self,
        keyed: tuple[Any, tuple[int, Any]],
        window: Any = beam.DoFn.WindowParam,
        waiting: Any = beam.DoFn.StateParam(WAITING),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        due: Any = beam.DoFn.TimerParam(DUE),
        window_end: Any = beam.DoFn.TimerParam(WINDOW_END),
    ) -> Iterable[Any]:
        """Keep an element until the watermark has passed it; gives results of others that are ready."""
        arrival = self._arrival(*keyed[1], window)
        if arrival is None:
            return self._ready()
        waiting.add(tuple(arrival))
        known = _Progress.of(progress)
        due_micros = _due_micros(arrival, window)
        if known.due_micros is None:
            window_end.set(window.max_timestamp())
        if due_micros is not None and (known.due_micros is None or due_micros < known.due_micros):
            # Not moved by elements of later times: in an endless stream it would never fire.
            due.set(Timestamp(micros=due_micros))
            progress.write(tuple(known._replace(due_micros=due_micros)))
        return self._ready()

    @on_timer(DUE)
    def on_due(
        self,
        key: Any = beam.DoFn.KeyParam,
        window: Any = beam.DoFn.WindowParam,
        timestamp: Any = beam.DoFn.TimestampParam,
        waiting: Any = beam.DoFn.StateParam(WAITING),
        sent: Any = beam.DoFn.StateParam(SENT),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        due: Any = beam.DoFn.TimerParam(DUE),
    ) -> Iterable[Any]:
        """Send what the watermark has passed."""
        arrivals = _taken(waiting)
        ready = [each for each in arrivals if each.micros <= timestamp.micros]
        later = arrivals[len(ready) :]
        # For half of them: one by one would read and write all that wait for each, and the last one may be of
        # the far future.
        waits = [at for each in later if (at := _due_micros(each, window)) is not None]
        due_micros = waits[(len(waits) - 1) // 2] if waits else None
        if due_micros is not None:
            due.set(Timestamp(micros=due_micros))
        if ready and not later and self._sequencing.holds_last:
            later = [ready.pop()]
        for each in later:
            waiting.add(tuple(each))
        known = _Progress.of(progress)._replace(due_micros=due_micros)
        name = self._sequence_name(key, window)
        progress.write(tuple(self._send(name, window, ready, known, sent)))
        return self._ready()

    @on_timer(WINDOW_END)
    def on_window_end(
        self,
        key: Any = beam.DoFn.KeyParam,
        window: Any = beam.DoFn.WindowParam,
        waiting: Any = beam.DoFn.StateParam(WAITING),
        sent: Any = beam.DoFn.StateParam(SENT),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
    ) -> Iterable[Any]:
        """Send the rest, and end the sequence."""
        name = self._sequence_name(key, window)
        self._send(name, window, _taken(waiting), _Progress.of(progress), sent, window_ends=True)
        # Where the window's end sends nothing, the sequence is still remembered, for nothing.
        if self._open.pop(name, None) is None:
            _MEMORY.take(name)
        sent.clear()
        progress.write(tuple(_Progress(is_over=True)))
        return self._ready()

    def finish_bundle(self) -> Iterable[Any]:
        """Wait until nothing is in flight, and give the remaining results."""
        outputs = super().finish_bundle()
        for key, sequence in self._open.items():
            _MEMORY.put(key, sequence)
        self._open = {}
        return outputs

    def _send(
        self,
        name: Hashable,
        window: BoundedWindow,
        arrivals: list[_Arrival],
        known: _Progress,
        sent: Any,
        *,
        window_ends: bool = False,
    ) -> _Progress:
        """Send elements of the sequence that is ``known`` so far; gives its progress after them."""
        on_time = []
        for arrival in arrivals:
            why = ""
            if known.is_over:
                why = _WINDOW_HAD_ENDED
            elif known.last_micros is not None and arrival.micros < known.last_micros:
                last = Timestamp(micros=known.last_micros)
                why = f"the element of {last.to_rfc3339()} had been scored"
            if why:
                self._scorer.fail(_windowed(arrival.micros, arrival.element, window), _late(why))
            else:
                on_time.append(arrival)
        if not on_time:
            return known
        sequence = self._resumed(self._open.pop(name, None) or _MEMORY.take(name), known, sent)
        known = known._replace(token=secrets.token_hex(8))
        if not sequence.waiting:
            # Of the answers that have come since.
            failure = "" if sequence.failure is None else str(ended_by(sequence.failure))
            is_settled = sequence.confirmed >= len(sequence.answered or ())
            known = known._replace(
                skipped=tuple(sequence.skipped),
                settled=known.taken if is_settled else known.settled,
                failure=failure,
            )
        elements = []
        for number, arrival in enumerate(on_time, 1):
            is_last = window_ends and number == len(on_time)
            ends = arrival.ends or (is_last and self._sequencing.holds_last)
            windowed_value = _windowed(arrival.micros, arrival.element, window)
            elements.append(Element(windowed_value, ends, known.taken))
            known = self._after(known, arrival, sent, ends=ends)
        sequence.token = known.token
        if not window_ends:
            self._open[name] = sequence
        self._scorer.add(sequence, elements)
        return known

    def _sequence_name(self, key: Any, window: BoundedWindow) -> Hashable:
        """By which this process remembers a sequence."""
        return self._name, FastPrimitivesCoder().encode(key), window

    def _after(self, known: _Progress, arrival: _Arrival, sent: Any, *, ends: bool) -> _Progress:
        """The progress once an element has been sent."""
        if ends:
            sent.clear()
            return _Progress(known.token, arrival.micros, due_micros=known.due_micros)
        known = known._replace(last_micros=arrival.micros, taken=known.taken + 1)
        if known.is_kept and not known.failure:
            if known.taken <= self._sequencing.max_replay_elements:
                sent.add(arrival.element)
                return known
            sent.clear()
        return known._replace(is_kept=False)

    def _resumed(self, remembered: RemoteSequence | None, known: _Progress, sent: Any) -> RemoteSequence:
        """The sequence as this process remembers it, or as the state knows it, to be sent again."""
        if remembered is not None and remembered.token == known.token:
            if remembered.waiting or remembered.endpoint is None:
                return remembered
            # The set of endpoints is another one where all DoFns of the process were torn down in between.
            assert self._model is not None
            endpoints = self._model.channel.endpoints.endpoints
            url = remembered.endpoint.url
            remembered.endpoint = next((each for each in endpoints if each.url == url), None)
            if remembered.endpoint is not None:
                return remembered
            remembered.start_again()
            if remembered.answered is not None:
                return remembered
        sequence = RemoteSequence(skipped=list(known.skipped))
        if known.failure:
            sequence.failure = SequenceEndedError(known.failure)
        elif not known.is_kept:
            sequence.failure = SequenceEndedError(
                f"the sequence has moved to another process or server, and cannot be sent again, as it has "
                f"more than max_replay_elements={self._sequencing.max_replay_elements} elements"
            )
        elif known.taken:
            self._read_sent(sequence, sent, known.settled)
        return sequence

    def _read_sent(self, sequence: RemoteSequence, sent: Any, settled: int) -> None:
        for position, element in enumerate(sent.read()):
            if position in sequence.skipped:
                continue
            try:
                prepared = self._scorer.prepare(split_key(element)[2])
            except LocalProtocolError as error:
                # It failed before as well.
                sequence.skipped.append(position)
                if self._sequencing.after_error == "end":
                    sequence.failure = error
            else:
                sequence.keep(prepared, self._sequencing.max_replay_elements)
                sequence.confirmed += position < settled


def _due_micros(arrival: _Arrival, window: BoundedWindow) -> int | None:
    """When the watermark has passed an element; None where the window ends first.

    In whole milliseconds, as the wire has no others: a timer that fired earlier would be set over and over.
    """
    micros = -(-arrival.micros // 1000) * 1000
    return micros if micros <= window.max_timestamp().micros else None


def _windowed(micros: int, element: Any, window: BoundedWindow) -> WindowedValue:
    return WindowedValue(element, Timestamp(micros=micros), (window,))


def _late(why: str) -> LateElementError:
    return LateElementError(f"the element came too late: {why}")


def sequence_options(
    endpoint: str | Sequence[str] | WorkerTriton, options: Mapping[str, Any]
) -> InferenceOptions:
    """The options of requests.

    Raises:
        ConfigurationError: one cannot work, or has no meaning for sequences.
    """
    if options.get("batching") is not None:
        raise ConfigurationError(
            "TritonSequenceInference takes no batching: a request is one element, and the server's sequence "
            "batcher batches those of several sequences"
        )
    given = options.get("request_parameters")
    for name in given if isinstance(given, Mapping) else ():
        if name in _OWN_PARAMETERS:
            raise ConfigurationError(
                f"request_parameters: leave out {name!r}, which TritonSequenceInference gives each request"
            )
    return InferenceOptions.from_options({"endpoint": endpoint, **options})


class TritonSequenceInference(TritonInference):
    """Scores sequences on a stateful model, one with ``sequence_batching`` in its configuration.

    ::

        probabilities = chunks | TritonSequenceInference("http://triton:8000", "silero_vad")

    An element is ``(key, element)``; a sequence is a key in a window (with session windows, a session). The
    elements of a sequence go in event-time order, one at a time, to one endpoint under one correlation ID:
    the first with the start flag, the last with the end flag. Many sequences are in flight at once.
    Elements and results are those of `TritonInference`, with the element's own timestamp and window.

    Where the input is bounded or has session windows, a sequence is sent when its window has ended. In a
    stream with other windows elements are sent soon after the watermark has passed them, except the newest,
    which waits until it is known whether it is the last one. A late element, behind others that have been
    sent, fails with LateElementError.

    A server that is lost, is restarted, or forgets a sequence that was idle for too long
    (``max_sequence_idle_microseconds``), gets the sequence's earlier elements again, as does another server.
    They are kept in Beam's state.

    Args:
        endpoint: URL of the server, or a list of them: each sequence is at one. Behind a balancer of
            connections requests of a sequence would come to different servers: name these, or use
            ``discovery="dns"``.
        model_name: the model.
        order_by: order of elements that have the same timestamp: a callable that takes an element with its
            key and gives a number, text, bytes, a time, or a tuple of these; or ``{"column": name}``. By
            default the order in which they come.
        ends: which element ends a sequence. ``"window"``: the last one of the window. A callable that takes
            an element with its key, or ``{"column": name}``, of True for the last element: the key's next one
            begins another sequence, and no element waits for the next. ``None``: none is marked, the server
            forgets a sequence that is idle.
        after_error: what becomes of a sequence after an element failed. ``"end"``: its other elements fail
            with SequenceEndedError. ``"replay"``: it goes on without that element; the earlier ones are sent
            again, as the server may have begun with the one that failed.
        max_replay_elements: of a sequence in a stream, so many elements are kept. A longer one cannot be sent
            again: where its server or its worker is lost, its other elements fail with SequenceEndedError.
        options: the keyword arguments of `TritonInference` (``inputs``, ``output``, ``keep``, …), but for
            ``batching``.
            ``max_concurrent_requests`` is the number of sequences that a process sends at a time.

    Raises:
        ConfigurationError: an option cannot work; or, when the transform is applied, elements have no key, or
            an unbounded input in the global window has no ``ends``.
    """

    _of_sequences = True
    _chooses_by_element = False

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        *,
        order_by: FromElement | None = None,
        ends: FromElement | str | None = "window",
        after_error: str = "end",
        max_replay_elements: int = 10_000,
        **options: Any,
    ) -> None:
        self._sequencing = Sequencing(
            order_by=order_by, ends=ends, after_error=after_error, max_replay_elements=max_replay_elements
        )
        self._grows = False
        super().__init__(endpoint, model_name, **options)

    def default_label(self) -> str:
        """The step's name where the user does not give one."""
        return f"TritonSequenceInference({self._model_name})"

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results, or with exception handling ``(results, failures)``."""
        key_type, element_type = key_and_element(pcoll.element_type)
        if key_type is None and not is_consistent_with(Tuple[AnyType, AnyType], element_type):
            raise ConfigurationError(
                f"TritonSequenceInference takes (key, element), as a sequence is a key in a window, not "
                f"{element_type}"
            )
        if key_type is None:
            pcoll |= "Keyed" >> beam.Map(_keyed).with_output_types(Tuple[AnyType, AnyType])
        windowing = pcoll.windowing
        self._grows = not pcoll.is_bounded and isinstance(windowing.windowfn, NonMergingWindowFn)
        if self._grows and isinstance(windowing.windowfn, GlobalWindows) and self._sequencing.holds_last:
            raise ConfigurationError(
                "the global window of an unbounded input has no end, nor have its sequences: give the input "
                "windows (beam.WindowInto), say by ends=… which element ends a sequence, or let the server "
                "forget idle sequences by ends=None"
            )
        return super().expand(pcoll)

    def _dofn(
        self, endpoint: str | Sequence[str] | WorkerTriton, model_name: Any, **options: Any
    ) -> beam.DoFn:
        kind = GrowingSequencesDoFn if self._grows else WholeSequencesDoFn
        return kind(endpoint, model_name, sequencing=self._sequencing, **options)

    def _score(
        self, pcoll: PCollection[Any], dofn: beam.DoFn, output_type: Any, failure_type: Any
    ) -> tuple[Any, Any]:
        key_type, _ = key_and_element(pcoll.element_type)
        elements = pcoll | "WithTime" >> beam.Map(_with_time).with_output_types(Tuple[key_type, AnyType])
        if not self._grows:
            # A sequence is whole when its window has ended, whatever comes downstream at which times. Not by
            # WindowInto, which would give each element of several windows all of them in each.
            windowing = pcoll.windowing
            elements._windowing = Windowing(
                windowing.windowfn,
                DefaultTrigger(),
                AccumulationMode.DISCARDING,
                allowed_lateness=windowing.allowed_lateness.micros / 1e6,
            )
            elements |= "Sequences" >> beam.GroupByKey()
        return super()._score(elements, dofn, output_type, failure_type)


def _keyed(element: Any) -> tuple[Any, Any]:
    is_keyed, key, inputs = split_key(element)
    if not is_keyed:
        raise LocalProtocolError(
            f"TritonSequenceInference takes (key, element), as a sequence is a key in a window, not "
            f"{shorten(element)}"
        )
    return key, inputs


def _with_time(
    keyed: tuple[Any, Any], timestamp: Any = beam.DoFn.TimestampParam
) -> tuple[Any, tuple[int, Any]]:
    return keyed[0], (timestamp.micros, keyed)
