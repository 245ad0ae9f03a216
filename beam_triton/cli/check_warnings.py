"""What works and will hurt: each warning says what was seen, why it is slow, and what to set."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import requests

from beam_triton.control_plane import ControlPlane
from beam_triton.dispatch.shared_memory import may_share
from beam_triton.errors import TritonError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import ModelSpec
from beam_triton.protocol.paths import SERVER_METADATA, shared_memory_path
from beam_triton.protocol.status import error_from_response
from beam_triton.transport.config import ConnectionPoolConfig
from beam_triton.transport.reference_counts import Lease
from beam_triton.transport.response_head import ResponseHead
from beam_triton.transport.session import acquire_session, session_pool
from beam_triton.transport.shared_region import SharedRegion

_LOOK_EVERY_SECONDS = 0.25
_KEEP_ALIVE = re.compile(r"\btimeout=(\d+)")


def batching_warnings(config: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """Of a model whose configuration is known, that it does not batch."""
    if not config or "ensemble_scheduling" in config:
        return []
    limit = int(config.get("max_batch_size") or 0)
    if limit > 1 and "dynamic_batching" not in config:
        return [
            f"model {spec.name!r} takes up to {limit} elements a request but has no dynamic batching: small "
            f"requests (streams, other clients, a bundle's last batch) are executed one after the other. Add "
            f"`dynamic_batching {{ }}` to its config.pbtxt."
        ]
    if limit == 0 and not spec.has_batch_dimension:
        tensors = (*spec.inputs, *spec.outputs)
        may_batch = bool(tensors) and all(tensor.shape[:1] == (-1,) for tensor in tensors)
        client = 'Set batching={"max_batch_size": N} if its first dimension, -1, is a batch; or ' * may_batch
        return [
            f"model {spec.name!r} has max_batch_size: 0: each element is a request and an execution of its "
            f"own. {client or 'If it can take several at a time, '}set max_batch_size in its config.pbtxt."
        ]
    return []


def compression_warnings(head: ResponseHead, options: InferenceOptions) -> list[str]:
    """Of an answer's head, that the answer was compressed though nobody asked for it."""
    encoding = head.get("content-encoding")
    if encoding in (None, "identity") or options.response_compression is not None:
        return []
    return [
        f"the answer came compressed (Content-Encoding: {encoding}) though Accept-Encoding: identity was "
        f"sent: {_sender(head.get('server'))} changes that header, and Triton compresses ten times slower "
        f"than a data centre's network sends. Pass Accept-Encoding on (nginx: no `proxy_set_header "
        f"Accept-Encoding`), and compress nothing in between."
    ]


def connection_warnings(options: InferenceOptions, idle_seconds: float) -> list[str]:
    """What the server, or what is in front of it, does to idle connections.

    Answers may say it; beyond that a connection is kept idle for ``idle_seconds``, or until it is closed.
    """
    # A pool of its own: nothing else may use, or close, the connection.
    pool_config = ConnectionPoolConfig(
        max_idle=1,
        max_total=1,
        keep_alive_seconds=idle_seconds + 60,
        max_age_seconds=None,
        connect_timeout_seconds=options.pool.connect_timeout_seconds,
    )
    alone = replace(options, pool=pool_config, max_concurrent_requests=1)
    with _session(alone) as session:
        pool = session_pool(session.value)
        try:
            answer = ControlPlane(alone, session).answer("GET", SERVER_METADATA)
        except TritonError:
            return []
        who = _sender(answer.headers.get("Server"))
        if answer.headers.get("Connection", "").lower() == "close":
            return [
                f"{who} closes the connection after each answer: every request pays for a new one, and for a "
                f"TLS handshake where there is one. Let it keep connections open (nginx: keepalive_timeout, "
                f"keepalive_requests)."
            ]
        found = _KEEP_ALIVE.search(answer.headers.get("Keep-Alive", ""))
        closed_after = float(found[1]) if found else None
        if closed_after is None and idle_seconds:
            print(f"keeping a connection idle for {idle_seconds:g} s", file=sys.stderr, flush=True)
            origin = options.network.routed(options.urls[0]).origin
            started = time.monotonic()
            while closed_after is None and (waited := time.monotonic() - started) < idle_seconds:
                time.sleep(min(_LOOK_EVERY_SECONDS, idle_seconds - waited))
                connection = pool.take_idle(origin)
                if connection is None:
                    closed_after = round(time.monotonic() - started, 1)
                else:
                    pool.release(connection)
    kept_seconds = min(options.pool.keep_alive_seconds, options.pool.max_age_seconds or float("inf"))
    if closed_after is None or closed_after >= kept_seconds:
        return []
    return [
        f"{who} closes connections that are idle for {closed_after:g} s, and the library keeps them for up "
        f"to {kept_seconds:g} s: after a pause a request finds its connection closed, and pays for a new "
        f"one. Raise that time (nginx: keepalive_timeout), or set "
        f'pool={{"keep_alive_seconds": {max(0.5, round(0.8 * closed_after, 1)):g}}}.'
    ]


def shared_memory_warnings(options: InferenceOptions) -> list[str]:
    """Of a server on this machine, that large tensors cannot go through shared memory."""
    if options.compression is not None or not may_share(
        map(options.network.routed, options.urls), options.shared_memory.replace("never", "auto")
    ):
        return []
    cost = "tensors of 128 KiB and more a request are copied through a socket, several times slower"
    if options.shared_memory == "never":
        return [f"shared_memory=never though the server is on this machine: {cost}. Leave it at auto."]
    reason = _why_no_region(options)
    if reason is None:
        return []
    return [
        f"the server is on this machine but opens no shared memory ({reason}): {cost}. Start Triton with "
        f"--allow-client-shm=true, and its container with --ipc=host."
    ]


def _why_no_region(options: InferenceOptions) -> str | None:
    """Why the server does not open a region; None if it does, or knows no shared memory at all."""
    try:
        region = SharedRegion(4096)
    except OSError as error:
        return f"/dev/shm: {error.strerror}"
    try:
        with _session(options) as session:
            control = ControlPlane(options, session)
            asked = {"key": f"/{region.name}", "offset": 0, "byte_size": region.nbytes}
            path = shared_memory_path(region.name, "register")
            answer = control.answer("POST", path, json.dumps(asked).encode())
            if answer.status_code == 200:
                control.answer("POST", shared_memory_path(region.name, "unregister"), b"{}")
                return None
    except TritonError:
        return None
    finally:
        region.unlink()
    if answer.status_code in (404, 405):
        return None
    said = error_from_response(answer.status_code, answer.content).server_message
    return f"it answered {answer.status_code}: {said or 'no message'}"


@contextmanager
def _session(options: InferenceOptions) -> Iterator[Lease[requests.Session]]:
    lease = acquire_session(options.pool, options.tls, options.network)
    try:
        yield lease
    finally:
        lease.release()


def _sender(server: str | None) -> str:
    return f"what answers ({server})" if server else "the server, or what is in front of it,"
