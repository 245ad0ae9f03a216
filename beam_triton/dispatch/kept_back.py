"""The errors of requests that were kept back until nobody would wait any longer: nothing was sent."""

from __future__ import annotations

from beam_triton.dispatch.endpoints import EndpointSet
from beam_triton.errors import CircuitOpenError, PoolTimeoutError


def circuit_open(endpoints: EndpointSet, open_seconds: float, waited_seconds: float) -> CircuitOpenError:
    """The servers are away. ``open_seconds`` are left until one is probed."""
    waited = f" after {waited_seconds:g} s of waiting" if waited_seconds else ""
    return CircuitOpenError(
        f"the circuit breaker keeps requests back from {_urls(endpoints)}{waited}; "
        f"next probe in {open_seconds:.1f} s",
        open_seconds_left=open_seconds,
    )


def at_capacity(endpoints: EndpointSet, waited_seconds: float) -> PoolTimeoutError:
    """The servers are given as many requests as they cope with, and others came first."""
    limits = "+".join(str(endpoint.limit.limit) for endpoint in endpoints.endpoints)
    return PoolTimeoutError(
        f"not sent within {waited_seconds:g} s: {_urls(endpoints)} is given {limits} requests at a time, as "
        f"its answers allow, and others were before this one"
    )


def _urls(endpoints: EndpointSet) -> str:
    return ", ".join(str(endpoint.url) for endpoint in endpoints.endpoints)
