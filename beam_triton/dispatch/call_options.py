"""What a call is told, and the record that it keeps for its owner."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy


@dataclass(frozen=True)
class CallOptions:
    """What all requests of one user have in common.

    ``slot_bytes`` is the size of a request that takes one slot: one of three times that takes three, so that
    the slots bound bytes, too.
    """

    timeout_seconds: float
    max_response_bytes: int
    slot_bytes: int
    retry: RetryPolicy
    circuit_breaker: CircuitBreakerPolicy | None
    health_paths: tuple[str, ...] = ()

    @property
    def max_hold_seconds(self) -> float:
        """How long a request may be kept back, outside its deadline, for a server that is away or busy."""
        breaker = self.circuit_breaker
        return breaker.max_wait_seconds if breaker is not None and breaker.when_open == "wait" else 0.0


class CallKind(Enum):
    """What a failure of a request would be followed by, and so what it says.

    A batch that is at fault is split (`BATCH`, and so are its larger parts, `HALF`)
    until single elements stand alone. Only what cannot be split any further says that the model
    itself fails, and only the first whole batch is repeated after a plain 500 before it is split.
    """

    SINGLE = "single"
    BATCH = "batch"
    HALF = "half"


@dataclass
class CallRecord:
    """What happened to a call, for metrics: plain counts, written on the reactor's thread."""

    request_bytes: int = 0
    attempts: int = 0
    retries: int = 0
    connections_opened: int = 0
    connections_reused: int = 0
    connection_waits: int = 0
    response_bytes: int = 0
    latency_seconds: float = 0.0
