"""What all calls of one dispatcher have in common."""

from __future__ import annotations

from typing import NamedTuple

from beam_triton.dispatch.call_options import CallOptions
from beam_triton.dispatch.endpoints import EndpointSet
from beam_triton.dispatch.request_head import HeadWriter
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.reactor import Reactor


class CallContext(NamedTuple):
    """Who drives the calls, where they go, and how."""

    reactor: Reactor
    pool: ConnectionPool
    endpoints: EndpointSet
    head_writer: HeadWriter
    options: CallOptions
