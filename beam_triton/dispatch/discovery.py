"""Discovery by DNS: each address of an endpoint's name is an endpoint of its own.

A headless Kubernetes Service is such a name: its addresses are the pods that are ready. Connections to the
name itself would all go to the address that the system prefers.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import threading
from collections.abc import Callable, Sequence

from beam_triton.transport.dialing import look_up
from beam_triton.transport.origin import UNIX, EndpointUrl, Origin

_logger = logging.getLogger(__name__)

# While a server is unhealthy, names are looked up so many times as often: it may be gone, and others there.
_UNHEALTHY_FACTOR = 6


class Discovery:
    """Looks names up from `start` to `stop`, on a thread of its own: a lookup may take as long as it likes.

    Until a name has been looked up it stands for itself, and while it cannot be, for the addresses that were
    found last.

    Args:
        urls: the endpoints as the user gave them. Those with an address instead of a name stay as they are,
            and those behind a proxy, which looks names up itself.
        interval_seconds: from one lookup to the next.
        on_change: gets all endpoints whenever they have changed; called on the thread.
        is_unhealthy: whether to look sooner.
    """

    def __init__(
        self,
        urls: Sequence[EndpointUrl],
        interval_seconds: float,
        on_change: Callable[[Sequence[EndpointUrl]], None],
        is_unhealthy: Callable[[], bool],
    ) -> None:
        self._found: dict[EndpointUrl, list[EndpointUrl]] = {url: [url] for url in urls}
        self._failing: set[EndpointUrl] = set()
        self._interval_seconds = interval_seconds
        self._on_change = on_change
        self._is_unhealthy = is_unhealthy
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beam_triton-discovery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after a lookup that it may be in."""
        self._stopped.set()

    def _run(self) -> None:
        names = [url for url in self._found if url.origin.proxy is None and not _is_address(url.origin)]
        while names and not self._stopped.is_set():
            has_changed = [self._look_up(url) for url in names]
            if any(has_changed) and not self._stopped.is_set():
                self._on_change([url for found in self._found.values() for url in found])
            self._wait()

    def _wait(self) -> None:
        for _ in range(_UNHEALTHY_FACTOR):
            if self._stopped.wait(self._interval_seconds / _UNHEALTHY_FACTOR) or self._is_unhealthy():
                return

    def _look_up(self, url: EndpointUrl) -> bool:
        """Whether the addresses of ``url`` have changed."""
        before = self._found[url]
        try:
            found = {url.at(str(address)) for address in look_up(url.origin.host, url.origin.port)}
        except (OSError, UnicodeError) as error:
            if url not in self._failing:
                self._failing.add(url)
                _logger.warning("%s cannot be looked up, requests go where they went before: %s", url, error)
            return False
        self._failing.discard(url)
        if found == set(before):
            return False
        # Processes that send little each use the first ones most: these are not to be the same for all.
        joined = random.sample(sorted(found.difference(before)), len(found.difference(before)))
        left = [each for each in before if each not in found and each is not url]
        self._found[url] = [each for each in before if each in found] + joined
        _logger.info(
            "%s has %d address(es) now%s%s",
            url,
            len(found),
            _listed("; new: ", joined),
            _listed("; gone, and gets no more requests: ", left),
        )
        return True


def _is_address(origin: Origin) -> bool:
    try:
        ipaddress.ip_address(origin.host)
    except ValueError:
        return origin.scheme == UNIX
    return True


def _listed(label: str, urls: Sequence[EndpointUrl]) -> str:
    return label + ", ".join(str(url.origin.address) for url in urls) if urls else ""
