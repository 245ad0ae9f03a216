"""What to change on the server, with the measurement that says so.

Each rule needs figures that its advice would change; where they were not measured, nothing is advised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from beam_triton.cli.load import Measurement
from beam_triton.cli.server_side import ServerSide

# Instances that execute for this share of the time are busy, below the other they are idle.
_BUSY, _IDLE = 0.85, 0.5
# Processors or a GPU below this have room for another instance.
_HAS_ROOM = 0.7
# An execution of many elements that takes less than this share of what they would take one by one.
_SHARED_COST = 0.5
# Requests that wait so long beside what an execution takes would have shared it.
_WAITS = 0.3
_EXECUTED_ALONE = 0.95
# An execution of twice the elements that takes less than this many times as long.
_FLAT = 1.25


@dataclass(frozen=True)
class ModelSettings:
    """What a model's configuration says about its executions.

    Attributes:
        instances: that execute at a time; 0 where that is not known.
        count: the configuration's own, which is of each GPU; the highest of its groups.
        kind: ``CPU`` or ``GPU``: what the instances run on.
        batches: the ``dynamic_batching`` of the configuration, None without.
    """

    max_batch_size: int
    instances: int
    count: int
    kind: str
    batches: Mapping[str, Any] | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSettings:
        groups = config.get("instance_group") or ()
        kinds = {str(group.get("kind")) for group in groups}
        counts = [int(group.get("count") or 1) for group in groups]
        gpus = [max(1, len(group.get("gpus") or ())) for group in groups]
        return cls(
            int(config.get("max_batch_size") or 0),
            # Of other kinds (KIND_MODEL) the model itself decides where it executes, and how often at a time.
            sum(map(mul, counts, gpus)) if kinds <= {"KIND_CPU", "KIND_GPU"} else 0,
            max(counts, default=1),
            "GPU" if "KIND_GPU" in kinds else "CPU",
            config.get("dynamic_batching"),
        )

    @property
    def executes_alone(self) -> bool:
        """Requests could share executions, and do not."""
        return self.max_batch_size > 1 and self.batches is None

    @property
    def max_delay_seconds(self) -> float:
        return int((self.batches or {}).get("max_queue_delay_microseconds") or 0) / 1e6

    @property
    def max_queue_size(self) -> int:
        policy = (self.batches or {}).get("default_queue_policy") or {}
        return int(policy.get("max_queue_size") or 0)


def advice(
    settings: ModelSettings,
    measured: Sequence[Measurement],
    chosen: Measurement,
    busy: Mapping[str, float],
) -> list[str]:
    """Sentences, each with its figures; none where nothing was found.

    Args:
        chosen: the recommended one of ``measured``.
        busy: the busy shares of the server's ``cpu`` and ``gpu`` while it was measured, as far as known.
    """
    rules = (
        _dynamic_batching(settings, measured),
        _larger_batches(settings, measured, chosen),
        _instances(settings, chosen, busy),
        _queue_delay(settings, chosen),
        _queue_size(settings, measured),
    )
    return [sentence for found in rules for sentence in found]


def _dynamic_batching(settings: ModelSettings, measured: Sequence[Measurement]) -> Iterator[str]:
    if not settings.executes_alone:
        return
    sizes = _by_size(measured)
    if len(sizes) < 2:
        return
    small, large = min(sizes), max(sizes)
    few, many = sizes[small], sizes[large]
    if few.executions < _EXECUTED_ALONE * few.requests:
        return
    cost = many.compute_an_execution / few.compute_an_execution
    waits = few.queue_a_request / few.compute_an_execution
    if cost < _SHARED_COST * large / small and waits > _WAITS:
        yield (
            f"Dynamic batching: requests of {_elements(small)} were executed one by one, "
            f"{_ms(few.compute_an_execution)} each, while others waited ({_ms(few.queue_a_request)} on "
            f"average), and an execution of {large} elements takes {_ms(many.compute_an_execution)}. With "
            f"`dynamic_batching {{ }}` in config.pbtxt small requests, as of streams and of other clients, "
            f"share executions."
        )


def _larger_batches(
    settings: ModelSettings, measured: Sequence[Measurement], chosen: Measurement
) -> Iterator[str]:
    sizes = _by_size(measured)
    largest = settings.max_batch_size
    smaller = [size for size in sizes if size <= largest / 2]
    if chosen.batch_size != largest or largest not in sizes or not smaller:
        return
    size = max(smaller)
    full, part = sizes[largest], sizes[size]
    if full.elements / full.executions > 1.05 * largest:
        return
    if full.compute_an_execution < _FLAT * part.compute_an_execution:
        yield (
            f"max_batch_size: an execution of {largest} elements, the most that the model takes, needs "
            f"{_ms(full.compute_an_execution)}, one of {size} {_ms(part.compute_an_execution)}. A "
            f"max_batch_size of {4 * largest} in config.pbtxt would score more elements in about the same "
            f"time, if the model has the memory."
        )


def _instances(settings: ModelSettings, chosen: Measurement, busy: Mapping[str, float]) -> Iterator[str]:
    found = chosen.server
    if found is None or not settings.instances or found.busy_share(settings.instances) < _BUSY:
        return
    where = "processors were" if settings.kind == "CPU" else "GPU was"
    now = f"its {settings.instances} instances were" if settings.instances > 1 else "its only instance was"
    share = f"{now} busy {found.busy_share(settings.instances):.0%} of the time"
    more = f"`instance_group [ {{ kind: KIND_{settings.kind} count: {2 * settings.count} }} ]`"
    known = busy.get(settings.kind.lower())
    if known is None:
        room = "the processors have" if settings.kind == "CPU" else "the GPU has"
        yield f"Instances: {share}. If {room} room, which --metrics-url URL shows, {more} scores more."
    elif known < _HAS_ROOM:
        yield f"Instances: {share}, while the server's {where} {known:.0%} busy: {more} scores more."


def _queue_delay(settings: ModelSettings, chosen: Measurement) -> Iterator[str]:
    found, delay = chosen.server, settings.max_delay_seconds
    if found is None or not delay or not settings.instances:
        return
    share = found.busy_share(settings.instances)
    if share < _IDLE and found.queue_a_request > _EXECUTED_ALONE * delay / 2:
        yield (
            f"Queue delay: requests waited {_ms(found.queue_a_request)} for others to share an execution "
            f"with (max_queue_delay_microseconds: {delay * 1e6:.0f}), and "
            f"{found.requests / found.executions:.1f} shared one, while the instances were idle "
            f"{1 - share:.0%} of the time. A lower max_queue_delay_microseconds, or none, takes that off "
            f"every answer."
        )


def _queue_size(settings: ModelSettings, measured: Sequence[Measurement]) -> Iterator[str]:
    refused = [each for each in measured if each.is_overloaded]
    if refused and settings.max_queue_size:
        fewest = min(each.in_flight for each in refused)
        yield (
            f"Queue: with {fewest} requests in flight the server refused some, for its queue takes "
            f"{settings.max_queue_size} (max_queue_size). A job waits and sends them again; "
            f"`default_queue_policy {{ max_queue_size: {2 * fewest} }}` would take them."
        )


def _by_size(measured: Iterable[Measurement]) -> dict[int, ServerSide]:
    """By size, what the server counted with the most requests in flight."""
    ordered = sorted(measured, key=lambda each: each.in_flight)
    return {each.batch_size: each.server for each in ordered if each.server is not None and not each.failures}


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _elements(number: int) -> str:
    return "one element" if number == 1 else f"{number} elements"
