"""``tune``: measures settings on the user's own server, and recommends one.

It measures this library's own dispatcher, which a general load generator cannot. `Search` chooses the
settings to try, `Load` measures one of them, and `run` prints what they find.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from beam_triton.cli import EXIT_OK, EXIT_PROBLEM
from beam_triton.cli.arguments import add_model, add_server, explained, options_of, shapes_of
from beam_triton.cli.sample import Sample, read_sample
from beam_triton.client import TritonClient
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.remote_model import RemoteModel
from beam_triton.transport.config import ConnectionPoolConfig

# The given time is divided for this many settings; a search seldom needs more.
_SETTINGS = 20
_SHORTEST_SECONDS = 0.1
_WARM_UP_SHARE = 0.05

# Settings within this share of the fastest count as equal: repeated measurements differ by as much.
_EQUAL_SHARE = 0.95
# A search in one direction ends at a setting below this share of the best one so far.
_GIVE_UP_SHARE = 0.7
_FIRST_IN_FLIGHT = 8

_HEAD = f"{'elements':>10}{'requests':>10}{'elements':>12}{'requests':>10}{'latency, ms':>16}\n"
_HEAD += f"{'a request':>10}{'in flight':>10}{'a second':>12}{'a second':>10}{'p50':>8}{'p99':>8}"


def add_arguments(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="measure a model with many settings, and recommend one",
        description="Put a model under load with requests of zeros or of elements of yours, for a limited "
        "time, with different batch sizes and numbers of requests in flight. Do not run it against a server "
        "that others are using.",
    )
    add_server(parser)
    add_model(parser, required=True)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="total time to measure (default: %(default)g)"
    )
    parser.add_argument(
        "--max-in-flight",
        type=int,
        default=64,
        metavar="N",
        help="largest number of requests in flight to try (default: %(default)d)",
    )
    parser.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help="largest number of elements per request to try (default: the model's limit)",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Measure, print the measurements and recommend a setting; EXIT_PROBLEM if no setting works.

    Raises:
        ConfigurationError: an argument makes no sense, or the model cannot be scored in batches.
        TritonError: the server does not answer, or does not have the model.
    """
    for name in ("seconds", "max_in_flight", "max_batch_size"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    given_options, sample = options_of(given), read_sample(given.inputs, shapes_of(given))
    # The pool that users of the recommendation get by default.
    given_options["pool"] = ConnectionPoolConfig.for_requests(given.max_in_flight, given.timeout_seconds)
    options = InferenceOptions.from_options({"endpoint": given.endpoint, **given_options})
    with TritonClient.from_inference_options(options) as client:
        model = client.open_model(given.model)
        try:
            if model.spec.decoupled or model.spec.sequence_batching:
                raise ConfigurationError(
                    f"model {given.model!r} is decoupled or batches sequences: it cannot be scored in batches"
                )
            largest = given.max_batch_size or _largest_batch(model, sample)
            largest = min(largest, max(1, model.spec.max_batch_size))
            what = sample.describe(model.spec)
            print(f"{model.spec.model_id} at {options.urls[0]} for about {given.seconds:g} s, {what}")
            print(_HEAD, flush=True)
            chosen, measured = _search(Load(options, model, sample), given, largest)
            has_batches = model.spec.has_batch_dimension
        finally:
            model.close()
    if chosen is None:
        error = next((each.first_error for each in measured if each.first_error is not None), None)
        print("No setting worked" + (f": {explained(error)}" if error is not None else "."))
        return EXIT_PROBLEM
    _recommend(chosen, given, options, has_batches)
    return EXIT_OK


def _search(
    load: Load, given: argparse.Namespace, largest: int
) -> tuple[Measurement | None, list[Measurement]]:
    seconds_each = max(_SHORTEST_SECONDS, given.seconds / _SETTINGS)
    ends = time.monotonic() + given.seconds
    load.measure(largest, 1, given.seconds * _WARM_UP_SHARE)

    def measure(batch_size: int, in_flight: int) -> Measurement:
        found = load.measure(batch_size, in_flight, seconds_each)
        print(_row(found), flush=True)
        return found

    search = Search(
        measure, largest, given.max_in_flight, may_go_on=lambda: time.monotonic() + seconds_each / 2 < ends
    )
    return search.run(), list(search.measured.values())


def _row(found: Measurement) -> str:
    row = (
        f"{found.batch_size:>10,}{found.in_flight:>10,}{found.elements_per_second:>12,.0f}"
        f"{found.requests_per_second:>10,.0f}{found.latency_milliseconds(0.5):>8.1f}"
        f"{found.latency_milliseconds(0.99):>8.1f}"
    )
    if found.first_error is not None:
        row += f"  failed: {found.first_error.message}"
    return row


def _largest_batch(model: RemoteModel, sample: Sample) -> int:
    """The number of elements that the default of ``max_batch_bytes`` allows in a request."""
    nbytes = sample.request(model, 1).content_length
    return max(1, BatchingPolicy().max_batch_bytes // nbytes)


def _recommend(
    chosen: Measurement, given: argparse.Namespace, options: InferenceOptions, has_batches: bool
) -> None:
    # Given for a model without a batch dimension, the option would make one of its first dimension.
    size = f'                    batching={{"max_batch_size": {chosen.batch_size}}},\n' if has_batches else ""
    print(
        f"\nRecommended, for {chosen.elements_per_second:,.0f} elements a second:\n\n"
        f'    TritonInference("{options.urls[0]}", "{given.model}",\n'
        f"{size}"
        f"                    max_concurrent_requests={chosen.in_flight})\n\n"
        f"No setting within 5 % of the fastest has fewer elements in flight. This was one process: several\n"
        f"processes share the server by themselves, below max_concurrent_requests each."
    )


@dataclass
class Search:
    """Searches for the settings that score the most elements a second.

    The batch size is halved from the largest until that is clearly worse, then the number of requests in
    flight is doubled and halved from 8, and finally other batch sizes are tried with the number found. No
    setting is measured twice.

    Args:
        measure: measures ``(batch size, requests in flight)``.
        largest_batch, most_in_flight: the limits of what is tried.
        may_go_on: called before each measurement; False ends the search.
    """

    measure: Callable[[int, int], Measurement]
    largest_batch: int
    most_in_flight: int
    may_go_on: Callable[[], bool]
    measured: dict[tuple[int, int], Measurement] = field(default_factory=dict)

    def run(self) -> Measurement | None:
        """The measurement of the recommended setting; None if no setting worked."""
        in_flight = min(_FIRST_IN_FLIGHT, self.most_in_flight)
        self._vary(self.largest_batch, lambda size: size // 2, lambda size: (size, in_flight))
        if self.chosen() is None:
            # There may have been too many requests at a time.
            self._vary(in_flight // 2, lambda count: count // 2, lambda count: (self.largest_batch, count))
        if self.chosen() is None:
            self._vary(self.largest_batch // 2, lambda size: size // 2, lambda size: (size, 1))
        best = self.chosen()
        if best is None:
            return None
        size, in_flight = best.batch_size, best.in_flight
        self._vary(in_flight * 2, lambda count: count * 2, lambda count: (size, count))
        self._vary(in_flight // 2, lambda count: count // 2, lambda count: (size, count))
        best = self.chosen() or best
        count = best.in_flight
        self._vary(best.batch_size * 2, lambda size: size * 2, lambda size: (size, count))
        self._vary(best.batch_size // 2, lambda size: size // 2, lambda size: (size, count))
        return self.chosen()

    def chosen(self) -> Measurement | None:
        """Of the settings that equal the fastest, the one with the fewest elements in flight.

        Fewer in flight means less waiting and less memory. Settings with failures are not chosen.
        """
        working = [each for each in self._without_failures() if each.latencies_seconds]
        if not working:
            return None
        fastest = max(each.elements_per_second for each in working)
        equal = [each for each in working if each.elements_per_second >= _EQUAL_SHARE * fastest]
        return min(equal, key=lambda each: (each.batch_size * each.in_flight, each.in_flight))

    def _vary(
        self, value: int, following: Callable[[int], int], setting: Callable[[int], tuple[int, int]]
    ) -> None:
        while self._is_allowed(*setting(value)):
            found = self._try(*setting(value))
            best = max((each.elements_per_second for each in self._without_failures()), default=0.0)
            if found is None or (best and found.elements_per_second < _GIVE_UP_SHARE * best):
                return
            next_value = following(value)
            if next_value == value or (next_value > value and found.failures):
                return
            value = next_value

    def _without_failures(self) -> list[Measurement]:
        return [each for each in self.measured.values() if not each.failures]

    def _is_allowed(self, batch_size: int, in_flight: int) -> bool:
        return 1 <= batch_size <= self.largest_batch and 1 <= in_flight <= self.most_in_flight

    def _try(self, batch_size: int, in_flight: int) -> Measurement | None:
        setting = (batch_size, in_flight)
        if setting not in self.measured:
            if not self.may_go_on():
                return None
            self.measured[setting] = self.measure(*setting)
        return self.measured[setting]


@dataclass(frozen=True)
class Measurement:
    """The result of one setting. ``latencies_seconds`` is sorted and holds no failures."""

    batch_size: int
    in_flight: int
    seconds: float
    latencies_seconds: tuple[float, ...]
    failures: int = 0
    first_error: TritonError | None = None

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies_seconds) / self.seconds if self.latencies_seconds else 0.0

    @property
    def elements_per_second(self) -> float:
        return self.requests_per_second * self.batch_size

    def latency_milliseconds(self, share: float) -> float:
        """The latency that ``share`` of the requests did not exceed (nearest rank)."""
        latencies = self.latencies_seconds
        if not latencies:
            return math.nan
        return latencies[max(0, math.ceil(share * len(latencies)) - 1)] * 1000


class Load:
    """Puts a model under load with requests of zeros or of given elements, encoded beforehand.

    Args:
        options: of the requests; each measurement sets its own ``max_concurrent_requests``.
        model: supplies the description of the model, and whether it takes binary tensors.
        sample: what is sent.
    """

    def __init__(self, options: InferenceOptions, model: RemoteModel, sample: Sample) -> None:
        self._options = options
        self._spec = model.spec
        self._binary = model.encoder.binary
        self._sample = sample

    def measure(self, batch_size: int, in_flight: int, seconds: float) -> Measurement:
        """Keep ``in_flight`` requests in flight for ``seconds``, after a start of at most as long.

        Nothing counts before as many answers have come as may be in flight: the adaptive limit doubles from
        one meanwhile. Requests that end later are waited for and not counted, unless none ended in time. The
        first failure ends the measurement: after it, the dispatcher would be measured holding requests.
        """
        options = replace(self._options, max_concurrent_requests=in_flight)
        model = RemoteModel(self._spec, options, binary=self._binary)
        dispatcher: Dispatcher[None] = Dispatcher(model.channel)
        latencies: list[float] = []
        errors: list[TritonError] = []
        answered_at = time.monotonic()

        def take_completed() -> None:
            nonlocal answered_at
            while dispatcher.completed:
                _, call = dispatcher.completed.popleft()
                if call.error is None:
                    latencies.append(call.record.latency_seconds)
                    answered_at = time.monotonic()
                else:
                    errors.append(call.error)

        def keep_busy(answers: float) -> None:
            ends = time.monotonic() + seconds
            while time.monotonic() < ends and len(latencies) < answers and not errors:
                while dispatcher.in_flight < in_flight:
                    dispatcher.submit(None, request, model.read_response)
                dispatcher.wait()
                take_completed()

        try:
            request = model.http_request(self._sample.request(model, batch_size))
            keep_busy(in_flight)
            # From answer to answer: what is on its way at the end is not half counted.
            first, started = len(latencies), answered_at
            keep_busy(math.inf)
            counted, ended = len(latencies), answered_at
            # Not cancelled: the server would still work on some of them during the next measurement.
            dispatcher.drain()
            take_completed()
            if counted == first:
                counted, ended = len(latencies), answered_at
        finally:
            dispatcher.cancel()
            model.close()
        return Measurement(
            batch_size,
            in_flight,
            ended - started,
            tuple(sorted(latencies[first:counted])),
            len(errors),
            errors[0] if errors else None,
        )
