"""The shared memory of this process and one server: a region for each request in flight that is large.

A region is made and registered on a thread of its own, when a request finds none that is free and large
enough; that request, and others until then, go by HTTP. So a server that does not open shared memory costs
one question, and no request waits. Regions are used again and again, and unregistered at the end.

A region carries one request at a time, and belongs to its results until nothing refers to them. Where results
that the application keeps hold half of the memory, further ones are copied. A request that got no answer
leaves its region behind: the server may still write into it.

A server that was restarted knows no regions: new ones are made. What a killed process has left registered,
the next one that uses the same server unregisters.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from beam_triton.dispatch.request_head import JSON_HEADERS, HttpRequest
from beam_triton.errors import TritonError
from beam_triton.protocol.paths import SERVER_METADATA, SHARED_MEMORY_STATUS, shared_memory_path
from beam_triton.protocol.region_layout import RegionLayout
from beam_triton.protocol.status import error_from_response
from beam_triton.transport import shared_region
from beam_triton.transport.attempt import exchange_within
from beam_triton.transport.origin import UNIX, EndpointUrl
from beam_triton.transport.proxies import is_loopback
from beam_triton.transport.shared_region import SharedRegion

if TYPE_CHECKING:
    from beam_triton.dispatch.channel import CallContext
    from beam_triton.transport.pool import ConnectionPool

_logger = logging.getLogger(__name__)

MOST_BYTES = 512 * 1024 * 1024
"""What the regions of one model on one server may take together; larger requests go by HTTP."""

_PAGE_BYTES = 4096
_TIMEOUT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1 << 20
# Before the server is asked again that did not answer, and before memory is that was short.
_UNANSWERED_PAUSE_SECONDS = 1.0
_MEMORY_PAUSE_SECONDS = 30.0
# Each time that all regions are lost, four times as long goes by until the next is made.
_MOST_LOSS_PAUSE_SECONDS = 120.0
_LOSS_FORGOTTEN_SECONDS = 600.0
# Triton ends itself when a region is unregistered that a request is using, up to 2.49 (server#7567).
_SAFE_VERSION = (2, 50)


class RegionPool:
    """The regions of one model on one server; thread-safe.

    ``mode`` is the option ``shared_memory``: with "auto" only a server on this machine is asked.
    """

    def __init__(self, url: EndpointUrl, mode: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._known: set[SharedRegion] = set()
        self._free: list[SharedRegion] = []
        # Filled by whoever drops the last reference, which may be the garbage collector on a thread that
        # holds the lock.
        self._returned: deque[SharedRegion] = deque()
        self._lent_bytes = 0
        self._left: list[str] = []
        self._is_opening = False
        self._is_closed = False
        self._is_safe_to_unregister = False
        self._losses = 0
        self._lost_at = -math.inf
        self._next_try_at = -math.inf if _may_share(url, mode) else math.inf
        self._logged: set[str] = set()
        # Of each connection pool that requests came over: one that is closed asks nothing.
        self._contexts: dict[ConnectionPool, CallContext] = {}

    def take(self, context: CallContext, nbytes: int) -> SharedRegion | None:
        """A region for one request of ``nbytes``; None where there is none now."""
        if self._next_try_at == math.inf and not self._known:
            return None
        with self._lock:
            if context.pool not in self._contexts:
                self._contexts = {pool: each for pool, each in self._contexts.items() if not pool.is_closed}
                self._contexts[context.pool] = context
            self._take_back()
            fitting = [region for region in self._free if region.nbytes >= nbytes]
            if fitting:
                region = min(fitting, key=_size)
                self._free.remove(region)
                return region
            if not self._is_opening and time.monotonic() >= self._next_try_at:
                self._start_opening(context, _rounded(nbytes))
        return None

    def answered(self, region: SharedRegion, layout: RegionLayout) -> Mapping[str, memoryview]:
        """The outputs in ``region``, whose request has succeeded."""
        with self._lock:
            self._take_back()
            lends = region in self._known and self._lent_bytes + region.nbytes <= MOST_BYTES // 2
            if lends and layout.outputs:
                self._lent_bytes += region.nbytes
                return layout.places(region.lend(self._returned.append))
        places = {name: memoryview(bytearray(place)) for name, place in layout.places(region.memory).items()}
        self.give_back(region)
        return places

    def give_back(self, region: SharedRegion) -> None:
        """``region`` is free again: the server has answered, and nobody needs the answer's outputs."""
        with self._lock:
            if region in self._known:
                self._free.append(region)

    def leave(self, region: SharedRegion) -> None:
        """Do not use ``region`` again: its request got no answer, and the server may still write into it."""
        with self._lock:
            if region in self._known:
                self._known.discard(region)
                self._left.append(region.name)

    def lost(self, region: SharedRegion) -> None:
        """The server does not know ``region``: it has been restarted since, and knows no older one either."""
        with self._lock:
            if region not in self._known:
                return
            _logger.info("%s no longer knows its shared memory: new regions are made", self._url)
            self._left += [each.name for each in self._known]
            self._known.clear()
            self._free.clear()
            # Behind a load balancer on this machine, other servers never know it.
            now = time.monotonic()
            self._losses = 1 if now > self._lost_at + _LOSS_FORGOTTEN_SECONDS else self._losses + 1
            self._lost_at = now
            pause_seconds = min(_MOST_LOSS_PAUSE_SECONDS, 0.01 * 4.0**self._losses)
            self._next_try_at = max(self._next_try_at, now + pause_seconds)

    def close(self) -> None:
        """Unregister everything; nothing is in flight."""
        with self._lock:
            self._is_closed = True
            self._next_try_at = math.inf
            names = [region.name for region in self._known]
            names += self._left if self._is_safe_to_unregister else []
            self._known.clear()
            self._free.clear()
            contexts, self._contexts = list(self._contexts.values()), {}
        for context in contexts:
            if names:
                names = self._unregister(context, names)

    def _take_back(self) -> None:
        while self._returned:
            region = self._returned.popleft()
            self._lent_bytes -= region.nbytes
            if region not in self._known:
                continue
            if region.is_shared_with_child:
                self._known.discard(region)
                self._left.append(region.name)
            else:
                self._free.append(region)

    def _start_opening(self, context: CallContext, nbytes: int) -> None:
        """Begin to open a region; smaller ones that are free make room for it. The lock is held."""
        room = MOST_BYTES - sum(map(_size, self._known))
        if room + sum(map(_size, self._free)) < nbytes:
            # Others hold too much of it: what is free stays for smaller requests.
            return
        for region in sorted(self._free, key=_size):
            if room >= nbytes:
                break
            room += region.nbytes
            self._known.discard(region)
            self._free.remove(region)
            self._left.append(region.name)
        self._is_opening = True
        try:
            threading.Thread(
                target=self._open, args=(context, nbytes), name="beam_triton-shared-memory", daemon=True
            ).start()
        except RuntimeError:
            # The interpreter is ending.
            self._is_opening = False

    def _open(self, context: CallContext, nbytes: int) -> None:
        region = None
        try:
            if not self._known:
                self._tidy_up(context)
            region = self._register(context, nbytes)
            self._unregister_left(context)
        except TritonError:
            self._pause(_UNANSWERED_PAUSE_SECONDS)
        except Exception as error:
            # Requests do without; a thread each that ends like this would help nobody.
            self._log_once(logging.WARNING, f"{type(error).__name__}: {error}")
            with self._lock:
                self._next_try_at = math.inf
        finally:
            with self._lock:
                self._is_opening = False
                is_wanted = region is not None and not self._is_closed
                if region is not None and is_wanted:
                    self._known.add(region)
                    self._free.append(region)
            if region is not None and not is_wanted:
                self._unregister(context, [region.name])

    def _register(self, context: CallContext, nbytes: int) -> SharedRegion | None:
        if nbytes > _free_bytes() // 2:
            self._pause(_MEMORY_PAUSE_SECONDS)
            self._log_once(
                logging.WARNING, f"/dev/shm has no room for {nbytes} bytes, {_free_bytes()} are free"
            )
            return None
        try:
            region = SharedRegion(nbytes)
        except OSError as error:
            self._pause(_MEMORY_PAUSE_SECONDS)
            self._log_once(logging.WARNING, f"there is no shared memory of {nbytes} bytes: {error.strerror}")
            return None
        try:
            status, answer = self._ask(
                context,
                "POST",
                shared_memory_path(region.name, "register"),
                {"key": f"/{region.name}", "offset": 0, "byte_size": nbytes},
            )
        except TritonError:
            # The server may have opened it, or be about to.
            with self._lock:
                self._left.append(region.name)
            raise
        finally:
            region.unlink()
        if status == 200:
            self._log_once(logging.INFO, "", "large tensors go to %s through shared memory")
            return region
        if status in (429, 502, 503, 504):
            self._pause(_UNANSWERED_PAUSE_SECONDS)
            return None
        with self._lock:
            self._next_try_at = math.inf
        # Nobody can switch on what a server does not have.
        level = logging.INFO if status in (404, 405) else logging.WARNING
        reason = error_from_response(status, answer).server_message or "no message"
        self._log_once(level, f"it answered {status}: {reason}")
        return None

    def _tidy_up(self, context: CallContext) -> None:
        """Remove what processes have left that were killed."""
        shared_region.unlink_abandoned()
        status, answer = self._ask(context, "GET", SERVER_METADATA)
        version = re.match(rb'.*"version":\s*"(\d+)\.(\d+)', answer, re.DOTALL) if status == 200 else None
        if version is None or (int(version[1]), int(version[2])) < _SAFE_VERSION:
            return
        self._is_safe_to_unregister = True
        status, answer = self._ask(context, "GET", SHARED_MEMORY_STATUS)
        try:
            names = [region["name"] for region in json.loads(answer)] if status == 200 else []
        except (ValueError, TypeError, KeyError):
            return
        self._unregister(context, filter(shared_region.is_abandoned, names))

    def _unregister_left(self, context: CallContext) -> None:
        if self._left and self._is_safe_to_unregister:
            with self._lock:
                names, self._left = self._left, []
            still_used = self._unregister(context, names)
            with self._lock:
                self._left += still_used

    def _unregister(self, context: CallContext, names: Iterable[str]) -> list[str]:
        """Unregister regions as long as the server answers; returns those that are still registered."""
        remaining, used = deque(names), []
        try:
            while remaining:
                status, _ = self._ask(context, "POST", shared_memory_path(remaining[0], "unregister"))
                name = remaining.popleft()
                if status != 200:
                    used.append(name)
        except TritonError:
            pass
        return [*used, *remaining]

    def _ask(
        self, context: CallContext, method: str, path: str, content: Mapping[str, Any] | None = None
    ) -> tuple[int, bytes]:
        body = b"" if content is None else json.dumps(content).encode("ascii")
        headers = JSON_HEADERS if body else ()
        request = HttpRequest(method, path, headers, (body,) if body else (), len(body))
        exchange = exchange_within(
            context.pool,
            self._url.origin,
            context.head_writer.parts(self._url, request),
            timeout_seconds=_TIMEOUT_SECONDS,
            max_response_bytes=_MAX_ANSWER_BYTES,
        )
        assert exchange.head is not None
        return exchange.head.status, bytes(exchange.body)

    def _pause(self, seconds: float) -> None:
        with self._lock:
            if self._next_try_at != math.inf:
                self._next_try_at = time.monotonic() + seconds

    def _log_once(self, level: int, reason: str, text: str = "") -> None:
        text = text or "large tensors go to %s by HTTP: "
        if text not in self._logged:
            self._logged.add(text)
            _logger.log(level, text + "%s", self._url, reason)


def _may_share(url: EndpointUrl, mode: str) -> bool:
    origin = url.origin
    if not shared_region.is_supported() or url.door is not None or origin.proxy is not None:
        return False
    return mode == "always" or origin.scheme == UNIX or is_loopback(origin.address or origin.host)


def may_share(urls: Iterable[EndpointUrl], mode: str) -> bool:
    """Whether requests to one of ``urls`` may use shared memory."""
    return mode != "never" and any(_may_share(url, mode) for url in urls)


def _size(region: SharedRegion) -> int:
    return region.nbytes


def _rounded(nbytes: int) -> int:
    """A size that requests which differ a little have in common: at most a quarter more."""
    step = max(_PAGE_BYTES, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


def _free_bytes() -> int:
    figures = os.statvfs("/dev/shm")
    return figures.f_bavail * figures.f_frsize
