"""Where a worker's CPU time goes while a pipeline scores, by the parts of a request's way."""

# No postponed annotations here: Beam reads the types of batches from them.

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import apache_beam as beam
import numpy as np
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.options import InferenceOptions
from beam_triton.protocol import InferRequestEncoder, TensorSpec
from beam_triton.remote_model import RemoteModel
from beam_triton.testing import LocalTriton
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.bundle import BundleScorer
from beam_triton.transforms.model_dofn import open_described
from beam_triton.transforms.numpy_batches import ArraysAsBatches, TritonBatchInferenceDoFn
from beam_triton.transforms.results import PredictionResults
from beam_triton.transforms.row_scorer import RowScorer
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.reactor import Reactor
from benchmarks.cases.case import Case, Scale, take_turns
from benchmarks.cases.throughput import BATCH_SIZE
from benchmarks.numpy_workload import BatchDoFn, CheckBatches
from benchmarks.peers import BEAM_TRITON, NO_OP
from benchmarks.peers.peer import PipelinePeer
from benchmarks.process import run_in_fresh_process
from benchmarks.profiler import GARBAGE_COLLECTOR, Profiler, Spent
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO, target
from benchmarks.workload import Check, Target, Workload

BEAM, WINDOWS, TAKING, REST = "Beam", "Beam, for timestamps and windows", "taking elements", "rest"
ENCODE, DISPATCH, KERNEL, DECODE, RESULTS = "encode", "dispatch", "kernel", "decode", "results"
WHOLE, COST = "all of it", "the profile itself, not in it"
PARTS = (BEAM, WINDOWS, TAKING, ENCODE, DISPATCH, KERNEL, DECODE, RESULTS, GARBAGE_COLLECTOR, REST)
MICROSECONDS, PERCENT = "us a request", "%"

_WARM_UP_ELEMENTS = 6_400
# Of so many batches, one has each of its elements timed as it is taken, which costs more than taking it.
_TIMED_BATCHES = 16
_ONE_ELEMENT = "taking one element"
_GLOBAL = (GlobalWindow(),)


class _Windows(PipelinePeer):
    """Takes elements with their windows and gives them back 64 at a time: what Beam charges for that."""

    name = "a DoFn that keeps windows"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_KeepWindows())  # type: ignore[no-untyped-call]

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return _KeepTimesOfBatches(workload)


class _KeepWindows(beam.DoFn):
    def start_bundle(self) -> None:
        self._kept: list[WindowedValue] = []

    def process(
        self, element: Any, windowed_value: Any = beam.DoFn.WindowedValueParam
    ) -> Sequence[WindowedValue]:
        self._kept.append(windowed_value)
        return self._take() if len(self._kept) == BATCH_SIZE else ()

    def finish_bundle(self) -> Sequence[WindowedValue]:
        return self._take()

    def _take(self) -> Sequence[WindowedValue]:
        kept, self._kept = self._kept, []
        return kept


KEEPS_WINDOWS = _Windows()


class _KeepTimes(BatchDoFn):
    """As the library has to give batches: each an element with its own time, of which a second DoFn makes
    batches again."""

    @beam.DoFn.yields_elements  # type: ignore[untyped-decorator]
    def process_batch(
        self,
        batch: np.ndarray,
        timestamp: Any = beam.DoFn.TimestampParam,
        pane_info: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[Any]:
        yield WindowedValue(batch, timestamp, _GLOBAL, pane_info)

    def infer_output_type(self, input_type: Any) -> Any:
        return np.ndarray


class _KeepTimesOfBatches(beam.PTransform[Any, Any]):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self._workload = workload

    def expand(self, batches: Any) -> Any:
        output = TensorSpec("y", "FP32", (self._workload.width,))
        kept = batches | beam.ParDo(_KeepTimes(self._workload))
        return kept | "Batches" >> beam.ParDo(ArraysAsBatches(output))


@dataclass(frozen=True)
class Profile:
    """A run of ``requests``: the microseconds of CPU that its process took, and what was spent on the
    bundle's thread, where there was a profile."""

    requests: float
    process: float
    spent: Spent

    def own(self, name: str) -> float:
        """Microseconds a request of a section, without what the profile costs there."""
        own = self.spent.own(name) / self.requests
        timed = self.spent.calls.get(_ONE_ELEMENT, 0)
        if name == TAKING and timed:
            own += self.spent.own(_ONE_ELEMENT) * BATCH_SIZE / timed
        return own

    @property
    def all_of_it(self) -> float:
        """Microseconds a request of the process, with what the profile costs."""
        return self.process / self.requests


class _SystemCalls:
    """A socket or a poller whose methods that call the kernel are sections."""

    def __init__(self, wrapped: Any, profiler: Profiler, *names: str) -> None:
        self._wrapped = wrapped
        for name in names:
            setattr(self, name, profiler.timed(KERNEL, getattr(wrapped, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def profile(peer: PipelinePeer, work: Workload, *, has_sections: bool) -> Profile:
    """Score in this process and say what a request of `BATCH_SIZE` elements took, from a bundle's start to
    its end: without building, opening and closing the pipeline."""
    peer.score(replace(work, elements=_WARM_UP_ELEMENTS))
    profiler = Profiler()
    begun, nanoseconds = 0, 0

    def begin() -> None:
        nonlocal begun
        if has_sections:
            profiler.start()
        begun = time.process_time_ns()

    def end() -> None:
        nonlocal nanoseconds
        nanoseconds += time.process_time_ns() - begun
        if has_sections:
            profiler.pause()

    with ExitStack() as stack:
        for sink in (Check, CheckBatches):
            stack.enter_context(mock.patch.object(sink, "start_bundle", _after(sink.start_bundle, begin)))
            stack.enter_context(mock.patch.object(sink, "finish_bundle", _after(sink.finish_bundle, end)))
        if has_sections:
            stack.enter_context(_sections(profiler))
        peer.score(work)
    spent = profiler.spent() if has_sections else Spent({}, {}, {})
    return Profile(work.elements / BATCH_SIZE, nanoseconds / 1e3, spent)


def _after(method: Callable[[Any], None], then: Callable[[], None]) -> Callable[[Any], None]:
    @functools.wraps(method)
    def both(self: Any) -> None:
        method(self)
        then()

    return both


@contextmanager
def _sections(profiler: Profiler) -> Iterator[None]:
    """The parts of the library as sections, until the end of the block, in this process."""
    sections = {
        ENCODE: (
            (InferRequestEncoder, "encode_arrays"),
            (InferRequestEncoder, "encode_batch"),
            (InferRequestEncoder, "encode"),
        ),
        DISPATCH: ((BisectingSender, "send"), (BisectingSender, "take_ended"), (BisectingSender, "finish")),
        DECODE: ((RemoteModel, "read_response"),),
        RESULTS: (
            (BundleScorer, "_on_answer"),
            (RowScorer, "_on_answer"),
            (TritonBatchInferenceDoFn, "_results"),
        ),
        TAKING: ((RowScorer, "add"),),
    }
    with ExitStack() as stack:

        def patch(owner: type, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, new))

        for section, methods in sections.items():
            for owner, name in methods:
                patch(owner, name, profiler.timed(section, getattr(owner, name)))
        parts = profiler.timed_steps(RESULTS, PredictionResults._parts_of_results)
        patch(PredictionResults, "_parts_of_results", parts)
        patch(Exchange, "__init__", _with_timed_socket(Exchange.__init__, profiler))
        patch(Reactor, "__init__", _with_timed_poller(Reactor.__init__, profiler))
        patch(BundleScorer, "__post_init__", _with_some_timed(BundleScorer.__post_init__, profiler))
        yield


def _with_timed_socket(init: Callable[..., None], profiler: Profiler) -> Callable[..., None]:
    sockets: dict[int, tuple[Any, _SystemCalls]] = {}

    def timed_init(self: Exchange, sock: Any, *args: Any, **kwargs: Any) -> None:
        known = sockets.get(id(sock))
        if known is None:
            timed = _SystemCalls(sock, profiler, "send", "sendmsg", "recv", "recv_into")
            # The socket as well, so that no other has its id.
            known = sockets[id(sock)] = sock, timed
        init(self, known[1], *args, **kwargs)

    return timed_init


def _with_timed_poller(init: Callable[..., None], profiler: Profiler) -> Callable[..., None]:
    def timed_init(self: Reactor) -> None:
        init(self)
        self._poller = _SystemCalls(self._poller, profiler, "poll")  # type: ignore[assignment]

    return timed_init


def _with_some_timed(init: Callable[..., None], profiler: Profiler) -> Callable[..., None]:
    """Scorers that time what they do with each element of some batches."""

    def timed_init(self: BundleScorer) -> None:
        init(self)
        timed_add, send, batches = profiler.timed(_ONE_ELEMENT, self.add), self._sender.send, 0

        def counting_send(*args: Any, **kwargs: Any) -> None:
            nonlocal batches
            send(*args, **kwargs)
            if batches % _TIMED_BATCHES == 0:
                self.add = timed_add  # type: ignore[method-assign]
            elif batches % _TIMED_BATCHES == 1:
                del self.add
            batches += 1

        self._sender.send = counting_send  # type: ignore[method-assign]

    return timed_init


def _requests_alone(server_target: Target, requests: int) -> float:
    """Microseconds of CPU of a request without a pipeline: encoded, sent and decoded, many in flight."""
    options = InferenceOptions.from_options(
        {"endpoint": server_target.endpoint, "shared_memory": "never"}, owner=TritonBatchInferenceDoFn
    )
    model = open_described(options, server_target.model_name)
    rows = list(Workload(server_target, BATCH_SIZE).pattern(BATCH_SIZE))
    dispatcher: Dispatcher[None] = Dispatcher(model.channel)
    try:
        for number in range(_WARM_UP_ELEMENTS // BATCH_SIZE + requests):
            if number == _WARM_UP_ELEMENTS // BATCH_SIZE:
                dispatcher.drain()
                before = time.process_time_ns()
            request = model.http_request(model.encoder.encode_arrays(rows))
            dispatcher.submit(None, request, model.read_response, is_batch=True)
            dispatcher.step()
            while dispatcher.completed:
                _, call = dispatcher.completed.popleft()
                assert call.error is None, call.error
        dispatcher.drain()
        microseconds = (time.process_time_ns() - before) / 1e3 / requests
        while dispatcher.completed:
            _, call = dispatcher.completed.popleft()
            if not np.array_equal(call.result.outputs["y"], rows):
                raise AssertionError("an answer differs from what was sent")
    finally:
        dispatcher.cancel()
        model.close()
    return microseconds


def parts_of(profiled: Profile, plain: Profile, empty: Profile, windows: Profile) -> dict[str, float]:
    """What each of `PARTS` takes of ``plain``, the library without a profile, in microseconds a request.

    Sections are those of ``profiled``. ``empty`` is a pipeline whose DoFn does nothing, ``windows`` one that
    keeps timestamps and windows as well. The rest is what none of these explains.
    """
    parts = {name: profiled.own(name) for name in PARTS}
    parts[BEAM] = empty.all_of_it - empty.own(GARBAGE_COLLECTOR)
    parts[WINDOWS] = windows.all_of_it - windows.own(GARBAGE_COLLECTOR) - parts[BEAM]
    parts[REST] = plain.all_of_it - sum(parts.values())
    return parts


def _apart(peer: PipelinePeer, work: Workload, has_sections: bool) -> Callable[[], Profile]:
    return functools.partial(run_in_fresh_process, profile, peer, work, has_sections=has_sections)


def _profile(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Pipelines take turns: the library with the profile and without, and those that show Beam's share."""
    echo = target(server, ECHO)
    elements = scale.count(96_000, least=12_800)
    by_element = Workload(echo, elements, batch_size=BATCH_SIZE)
    batches = replace(by_element, in_batches=True)
    measures: dict[str, Callable[[], Any]] = {
        "requests alone": functools.partial(
            run_in_fresh_process, _requests_alone, echo, scale.count(4_000, least=200)
        ),
    }
    works = {"by element": by_element, "NumPy batches": batches}
    for kind, work in works.items():
        measures[f"{kind}: windows"] = _apart(KEEPS_WINDOWS, work, True)
        measures[f"{kind}: nothing"] = _apart(NO_OP, work, True)
        measures[f"{kind}: profiled"] = _apart(BEAM_TRITON, work, True)
        measures[f"{kind}: plain"] = _apart(BEAM_TRITON, work, False)
    taken = take_turns(rounds, measures)
    columns: dict[str, dict[str, list[float]]] = {}
    figures = [
        Figure.of_rounds(
            "client CPU of a request of 64 x 128, many in flight, us", "at most", 80, taken["requests alone"]
        )
    ]
    for kind in works:
        empty, windows, profiled, plain = (
            taken[f"{kind}: {which}"] for which in ("nothing", "windows", "profiled", "plain")
        )
        parts = [parts_of(*each) for each in zip(profiled, plain, empty, windows, strict=True)]
        wholes = [each.all_of_it for each in plain]
        for name in PARTS:
            spent = [each[name] for each in parts]
            column = columns.setdefault(name, {})
            column[f"{kind}, {MICROSECONDS}"] = spent
            column[f"{kind}, {PERCENT}"] = [100 * share for share in ratios(spent, wholes)]
        columns.setdefault(WHOLE, {})[f"{kind}, {MICROSECONDS}"] = wholes
        columns.setdefault(COST, {})[f"{kind}, {MICROSECONDS}"] = [
            each.all_of_it - whole for each, whole in zip(profiled, wholes, strict=True)
        ]
        unexplained = [abs(each[REST]) / whole for each, whole in zip(parts, wholes, strict=True)]
        figures.append(Figure.of_rounds(f"{kind}: share that no part explains", "at most", 0.1, unexplained))
    columns["requests alone, many in flight"] = {f"by element, {MICROSECONDS}": taken["requests alone"]}
    rows = [Row.of(name, measured) for name, measured in columns.items()]
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


CASE = Case("profile", "Where a worker's CPU goes, in microseconds a request of 64 x 128 to echo", _profile)
