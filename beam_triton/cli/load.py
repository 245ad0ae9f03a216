"""Puts a model under load by this library's own dispatcher, which a general load generator cannot measure."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from beam_triton.cli.sample import Sample
from beam_triton.cli.server_side import ServerSide
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.errors import ServerOverloadedError, SilentConnectionError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.policy.server_times import ServerCounts
from beam_triton.protocol import InferResponse
from beam_triton.remote_model import RemoteModel
from beam_triton.transport.exchange import Exchange

# A rate is known once its quarters differ by so little; it is looked at so often, after this share of the
# time, and means nothing with fewer answers.
_SETTLED_ERROR = 0.025
_SETTLED_AFTER, _LOOK_EVERY = 0.25, 0.05
_FEWEST_ANSWERS = 16

# Elements that arrive in this share of the time before do not count: the adaptive limit starts at one.
_UNCOUNTED_SHARE = 0.25
# What has arrived is answered within this share of the time, or the server does not keep up.
_GRACE_SHARE = 0.1


@dataclass(frozen=True)
class Measurement:
    """The result of one setting; failures count in nothing but ``failures``.

    Attributes:
        requests: answered in ``seconds``.
        latencies_seconds: sorted. Of requests, from when they were handed over, so that waiting for their
            turn counts; at a given rate of elements, each from when it arrived by plan.
        sent: requests that the server had on average, which `in_flight` may be far above.
        fastest_seconds: the fastest answer, from when its request was sent.
        rate: of elements that arrived a second; None where the next request followed an answer.
        keeps_up: what arrived was answered.
        server: what the server counted meanwhile; None if it does not.
    """

    batch_size: int
    in_flight: int
    seconds: float
    requests: int
    latencies_seconds: Sequence[float] | npt.NDArray[np.float64]
    failures: int = 0
    first_error: TritonError | None = None
    sent: float = 0.0
    fastest_seconds: float = math.inf
    rate: float | None = None
    keeps_up: bool = True
    server: ServerSide | None = None

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds if self.requests else 0.0

    @property
    def elements_per_second(self) -> float:
        return self.requests_per_second * self.batch_size

    @property
    def is_overloaded(self) -> bool:
        """The server refused requests, for its queue was full."""
        return isinstance(self.first_error, ServerOverloadedError)

    def latency_seconds(self, share: float) -> float:
        """The latency that ``share`` of the requests, or elements, did not exceed (nearest rank)."""
        latencies = self.latencies_seconds
        if not len(latencies):
            return math.nan
        return float(latencies[max(0, math.ceil(share * len(latencies)) - 1)])


class Load:
    """Requests of zeros or of given elements, encoded beforehand.

    Args:
        options: of the requests; each measurement sets its own ``max_concurrent_requests``.
        model: supplies the description of the model, and whether it takes binary tensors.
        sample: what is sent.
        counts: asks the server for what it has counted; None if it does not count.
    """

    def __init__(
        self,
        options: InferenceOptions,
        model: RemoteModel,
        sample: Sample,
        counts: Callable[[], ServerCounts | None],
    ) -> None:
        self._options = options
        self._spec = model.spec
        self._binary = model.encoder.binary
        self._sample = sample
        self._counts = counts

    def measure(
        self,
        batch_size: int,
        in_flight: int,
        seconds: float,
        *,
        ends_early: bool = False,
        p99_seconds: float = math.inf,
    ) -> Measurement:
        """Keep ``in_flight`` requests in flight for ``seconds``, after a start of at most as long.

        Nothing counts before the adaptive limit has found its height: it doubles from one. Requests that end
        later are not counted, unless none ended in time. With ``ends_early`` the measurement is over as soon
        as the rate is known well enough, and in any case when so many answers took longer than
        ``p99_seconds`` that the p99 cannot be lower. The first failure ends it: after that, the dispatcher
        would be measured holding requests.
        """
        with _Flight(self, batch_size, in_flight) as flight:

            def keep_busy(is_over: Callable[[], bool]) -> None:
                ends = time.monotonic() + seconds
                while time.monotonic() < ends and not flight.errors and not is_over():
                    while flight.dispatcher.in_flight < in_flight:
                        flight.send(time.monotonic())
                    flight.dispatcher.wait()
                    flight.take_ended()

            ended = flight.ended
            keep_busy(lambda: flight.limit >= in_flight or len(ended) >= 4 * flight.limit)
            if flight.limit >= in_flight:
                # What waited while the limit was lower.
                already = len(ended)
                keep_busy(lambda: len(ended) >= already + in_flight)
            # From answer to answer: what is on its way at the end is not half counted.
            first = len(flight.ended)
            started = flight.ended[-1] if flight.ended else time.monotonic()
            with flight.counting():
                settled = _Settled(started, seconds)
                too_late = _TooLate(started, seconds, p99_seconds)
                keep_busy(lambda: settled.by(flight, first) if ends_early else too_late.by(flight, first))
            counted = len(flight.ended)
            # Not cancelled: the server would still work on some of them during the next measurement.
            flight.land()
            if counted == first:
                counted = len(flight.ended)
            return flight.measurement(flight.ended[first:counted], flight.latencies[first:counted], started)

    def measure_rate(self, batch_size: int, in_flight: int, seconds: float, rate: float) -> Measurement:
        """Send what arrives at ``rate`` elements a second, at random, for ``seconds``.

        A request leaves when its last element has arrived, whether others have been answered or not, with at
        most ``in_flight`` at a time. Elements that the server does not answer in time count with the time
        that they have waited.
        """
        uncounted = seconds * _UNCOUNTED_SHARE
        arrivals = _arrivals(rate, batch_size, uncounted + seconds)
        with _Flight(self, batch_size, in_flight) as flight:
            begun = time.monotonic()
            counting = flight.counting()
            unsent = len(arrivals)
            for index, elements in enumerate(arrivals):
                due = begun + elements[-1]
                if not counting.has_begun and elements[-1] >= uncounted:
                    counting.begin()
                while (now := time.monotonic()) < due and not flight.errors:
                    flight.dispatcher.wait(due)
                    flight.take_ended()
                if flight.errors or now > begun + uncounted + seconds * (1 + _GRACE_SHARE):
                    break
                flight.send(begun + elements[0])
                unsent = len(arrivals) - index - 1
            counting.end()
            usual = statistics.median(flight.sent_seconds) if flight.sent_seconds else 0.0
            patient_until = time.monotonic() + seconds * _GRACE_SHARE + 2 * usual
            while flight.dispatcher.in_flight and time.monotonic() < patient_until and not flight.errors:
                flight.dispatcher.wait(patient_until)
                flight.take_ended()
            unanswered = flight.dispatcher.in_flight + unsent
            ended_at = time.monotonic()
            flight.land()
            sent = arrivals[: len(arrivals) - unsent] if unsent else arrivals
            counted = sent[:, 0] >= uncounted
            # In the order of sending; what is missing at the end of the list has not been answered.
            ends = dict(zip(flight.starts, flight.ended, strict=True))
            done = np.array([ends.get(begun + each[0], math.inf) for each in sent]) - begun
            in_time = np.minimum(done, ended_at - begun)
            latencies = (in_time[:, None] - sent)[counted].ravel()
            late = (ended_at - begun - arrivals[len(sent) :]).ravel()
            return replace(
                flight.measurement((), np.concatenate([latencies, late[late > 0]]), begun),
                seconds=seconds,
                requests=int(((done >= uncounted) & (done <= uncounted + seconds)).sum()),
                rate=rate,
                keeps_up=not unanswered,
            )


class _Flight:
    """Requests of one size in flight, with a limit of their own, and when each was answered."""

    def __init__(self, load: Load, batch_size: int, in_flight: int) -> None:
        options = replace(load._options, max_concurrent_requests=in_flight)
        self._batch_size, self._in_flight = batch_size, in_flight
        self._model = RemoteModel(load._spec, options, binary=load._binary)
        self._counting = _Counting(load._counts)
        try:
            self.dispatcher: Dispatcher[None] = Dispatcher(self._model.channel)
            encoded = load._sample.requests(self._model, batch_size)
            self._requests = cycle([self._model.http_request(each) for each in encoded])
        except BaseException:
            self._model.close()
            raise
        self.starts: list[float] = []
        self.ended: list[float] = []
        self.sent_seconds: list[float] = []
        self.errors: list[TritonError] = []

    def __enter__(self) -> _Flight:
        return self

    def __exit__(self, *raised: object) -> None:
        self._counting.close()
        self.dispatcher.cancel()
        self._model.close()

    @property
    def limit(self) -> int:
        """How many requests the adaptive limit lets out."""
        return self._model.channel.endpoints.endpoints[0].limit.limit

    @property
    def latencies(self) -> list[float]:
        return [ended - started for started, ended in zip(self.starts, self.ended, strict=True)]

    def send(self, started: float) -> None:
        """Send the next request, which counts from ``started``."""
        self.dispatcher.submit(None, next(self._requests), partial(self._read, started))

    def _read(self, started: float, exchange: Exchange, **places: Any) -> InferResponse:
        response = self._model.read_response(exchange, **places)
        self.starts.append(started)
        self.ended.append(time.monotonic())
        return response

    def take_ended(self) -> None:
        while self.dispatcher.completed:
            _, call = self.dispatcher.completed.popleft()
            if call.error is None:
                self.sent_seconds.append(call.record.latency_seconds)
            elif not isinstance(call.error, SilentConnectionError):
                self.errors.append(call.error)
            # A pipeline sends those again, on other connections.

    def land(self) -> None:
        """Wait for what the server has, and forget what it has not."""
        self.dispatcher.cancel_unsent()
        self.dispatcher.drain()
        self.take_ended()

    def counting(self) -> _Counting:
        """What the server counts within the block."""
        return self._counting

    def measurement(
        self, ended: Sequence[float], latencies: Sequence[float] | npt.NDArray[np.float64], started: float
    ) -> Measurement:
        last = ended[-1] if len(ended) else time.monotonic()
        seconds = max(last - started, 1e-9)
        begun = min(self.starts, default=started)
        return Measurement(
            self._batch_size,
            self._in_flight,
            seconds,
            len(ended),
            np.sort(np.asarray(latencies, np.float64)),
            len(self.errors),
            self.errors[0] if self.errors else None,
            sent=sum(self.sent_seconds) / max(time.monotonic() - begun, 1e-9),
            fastest_seconds=min(self.sent_seconds, default=math.inf),
            server=self._counting.result(),
        )


class _Counting:
    """Asks the server twice for its counts, on a thread of its own: the load goes on meanwhile."""

    def __init__(self, counts: Callable[[], ServerCounts | None]) -> None:
        self._counts = counts
        self._thread = ThreadPoolExecutor(1, "beam_triton-statistics")
        self._answers: list[Future[ServerCounts | None]] = []

    @property
    def has_begun(self) -> bool:
        return bool(self._answers)

    def begin(self) -> None:
        self._answers = [self._thread.submit(self._counts)]

    def end(self) -> None:
        if self.has_begun:
            self._answers.append(self._thread.submit(self._counts))

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *raised: object) -> None:
        self.end()

    def result(self) -> ServerSide | None:
        if len(self._answers) != 2:
            return None
        before, after = (answer.result() for answer in self._answers)
        return None if before is None or after is None else ServerSide.between(before, after)

    def close(self) -> None:
        self._thread.shutdown(wait=False)


class _Settled:
    """Whether answers since ``started`` show the rate well enough, looked at now and then."""

    def __init__(self, started: float, seconds: float) -> None:
        self._next_at = started + _SETTLED_AFTER * seconds
        self._every = _LOOK_EVERY * seconds
        self._started = started

    def by(self, flight: _Flight, first: int) -> bool:
        now = time.monotonic()
        count = len(flight.ended) - first
        if now < self._next_at or count < _FEWEST_ANSWERS:
            return False
        self._next_at = now + self._every
        marks = [self._started, *(flight.ended[first + count * part // 4 - 1] for part in (1, 2, 3, 4))]
        durations = [after - before for before, after in pairwise(marks)]
        return statistics.stdev(durations) / 2 < _SETTLED_ERROR * statistics.mean(durations)


class _TooLate:
    """Whether more answers were late than the whole of a measurement may have."""

    def __init__(self, started: float, seconds: float, p99_seconds: float) -> None:
        self._started, self._seconds, self._p99_seconds = started, seconds, p99_seconds
        self._seen = self._late = 0

    def by(self, flight: _Flight, first: int) -> bool:
        if math.isinf(self._p99_seconds):
            return False
        for index in range(first + self._seen, len(flight.ended)):
            self._late += flight.ended[index] - flight.starts[index] > self._p99_seconds
        self._seen = len(flight.ended) - first
        elapsed = time.monotonic() - self._started
        if elapsed < _SETTLED_AFTER * self._seconds:
            return False
        return self._late > 1 + 0.01 * self._seen * max(1.0, self._seconds / elapsed)


def _arrivals(rate: float, batch_size: int, seconds: float) -> npt.NDArray[np.float64]:
    """When elements arrive, in seconds from the start, a row of ``batch_size`` for each request.

    They arrive independently of each other, and in every measurement alike: at least one request of them.
    """
    count = max(1, round(rate * seconds / batch_size)) * batch_size
    # A Poisson process of so many arrivals.
    times: npt.NDArray[np.float64] = np.sort(np.random.default_rng(0).random(count)) * max(
        seconds, count / rate
    )
    return times.reshape(-1, batch_size)
