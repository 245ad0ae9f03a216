"""How fast a model answers with one setting: elements a request and requests in flight."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from beam_triton.cli.zeros import Shapes, zeros_request
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.errors import TritonError
from beam_triton.options import InferenceOptions
from beam_triton.remote_model import RemoteModel


@dataclass(frozen=True)
class Measurement:
    """What was seen with one setting. ``latencies_seconds`` is sorted; failures are not among them."""

    batch_size: int
    in_flight: int
    seconds: float
    latencies_seconds: tuple[float, ...]
    failures: int = 0
    first_error: TritonError | None = None

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies_seconds) / self.seconds

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
    """Puts a model under load, with requests of zeros that were made beforehand.

    Args:
        options: how it is asked; ``max_concurrent_requests`` is replaced.
        model: what it is; only its description is used.
    """

    def __init__(self, options: InferenceOptions, model: RemoteModel, shapes: Shapes) -> None:
        self._options = options
        self._spec = model.spec
        self._binary = model.encoder.binary
        self._shapes = shapes

    def measure(self, batch_size: int, in_flight: int, seconds: float) -> Measurement:
        """Keep ``in_flight`` requests on their way for ``seconds``.

        Requests that end later are waited for and not counted, unless none ended in time. The first
        failure ends the measurement: what follows it would measure how requests are held back.
        """
        options = replace(self._options, max_concurrent_requests=in_flight)
        model = RemoteModel(self._spec, options, binary=self._binary)
        dispatcher: Dispatcher[None] = Dispatcher(model.channel)
        latencies: list[float] = []
        errors: list[TritonError] = []

        def take_completed() -> None:
            while dispatcher.completed:
                _, call = dispatcher.completed.popleft()
                if call.error is None:
                    latencies.append(call.record.latency_seconds)
                else:
                    errors.append(call.error)

        try:
            request = model.http_request(zeros_request(model, self._shapes, batch_size))
            started = time.monotonic()
            while (now := time.monotonic()) < started + seconds and not errors:
                while dispatcher.in_flight < in_flight:
                    dispatcher.submit(None, request, model.read_response)
                dispatcher.wait()
                take_completed()
            counted, elapsed = len(latencies), now - started
            # Not cancelled: the server would go on with some of it, beside the next measurement.
            dispatcher.drain()
            take_completed()
            if not counted:
                counted, elapsed = len(latencies), time.monotonic() - started
        finally:
            dispatcher.cancel()
            model.close()
        return Measurement(
            batch_size,
            in_flight,
            elapsed,
            tuple(sorted(latencies[:counted])),
            len(errors),
            errors[0] if errors else None,
        )
