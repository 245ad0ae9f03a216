"""Credentials of Google Cloud, as google-auth finds them, renewed before they expire."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from beam_triton.errors import ConfigurationError

_logger = logging.getLogger(__name__)

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
# A token lives for an hour. One of a metadata server may be four minutes from its end when it is given out.
_RENEW_BEFORE_SECONDS = 210.0
_SHORTEST_LIFE_PART = 0.5
_FIRST_TOKEN_SECONDS = 30.0
_RETRY_SECONDS = (1.0, 30.0)


class GoogleCredentials:
    """An ``auth=`` that sends an access token of Google Cloud with each request.

    ::

        TritonInference(
            "https://europe-west1-aiplatform.googleapis.com/v1/projects/p/locations/europe-west1/endpoints/1",
            "digits",
            auth=GoogleCredentials(),
        )

    Needs ``pip install beam-triton[gcp]``. A thread renews the token before it expires, three and a half
    minutes before or half-way through a shorter life, so only the first request waits for one, for at most
    30 s. After a 401 or 403 a new one is fetched as well. Thread-safe; the pickled pipeline holds no
    token, and a worker finds its own credentials.

    Args:
        credentials: a ``google.auth.credentials.Credentials``; ``None`` takes the worker's application
            default credentials: ``GOOGLE_APPLICATION_CREDENTIALS``, gcloud's, or those of the machine. Given
            ones travel in the pickled pipeline, keys included.
        scopes: of the default credentials.

    Raises:
        ConfigurationError: google-auth is not installed; or, at a request, there are no credentials, or no
            token could be fetched and the last one has expired.
    """

    def __init__(self, credentials: Any = None, *, scopes: Sequence[str] = _SCOPES) -> None:
        try:
            import google.auth.credentials
        except ImportError:
            raise ConfigurationError(
                "GoogleCredentials needs google-auth: pip install beam-triton[gcp]"
            ) from None
        if credentials is not None and not isinstance(credentials, google.auth.credentials.Credentials):
            raise ConfigurationError(
                f"GoogleCredentials takes credentials of google-auth, not a {type(credentials).__name__}; "
                f"a token goes into auth_token"
            )
        if isinstance(scopes, str):
            raise ConfigurationError("GoogleCredentials: scopes must be a list of strings, not one string")
        self._given = credentials
        self._scopes = tuple(scopes)
        self._start_over()

    def _start_over(self) -> None:
        self._changed = threading.Condition()
        self._process_id = os.getpid()
        self._renewer: _Renewer | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._given, self._scopes)

    def __repr__(self) -> str:
        return f"GoogleCredentials({'' if self._given is None else type(self._given).__name__})"

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        """The header fields of a token that has not expired."""
        return self._running().headers(_FIRST_TOKEN_SECONDS)

    def renew(self) -> None:
        """Have the next request wait for a new token: a server has refused this one."""
        self._running().renew()

    def _running(self) -> _Renewer:
        renewer = self._renewer
        if renewer is not None and self._process_id == os.getpid():
            return renewer
        if self._process_id != os.getpid():
            # A forked child has no thread of its parent's, and a lock that may be held for ever.
            self._start_over()
        with self._changed:
            if self._renewer is None:
                self._renewer = _Renewer(self._given, self._scopes)
                self._renewer.start()
                weakref.finalize(self, self._renewer.stop)
            return self._renewer


def _unpickled(credentials: Any, scopes: Sequence[str]) -> GoogleCredentials:
    return GoogleCredentials(credentials, scopes=scopes)


class _Renewer:
    """A thread that keeps a token fresh. It ends with the `GoogleCredentials` that started it."""

    def __init__(self, given: Any, scopes: Sequence[str]) -> None:
        self._credentials = given
        self._scopes = scopes
        self._changed = threading.Condition()
        self._headers: dict[str, str] = {}
        self._expires_at = 0.0
        self._renew_at = 0.0
        self._failure = ""
        self._is_final = False
        self._is_stopped = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="beam_triton-google-credentials", daemon=True).start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def renew(self) -> None:
        with self._changed:
            self._expires_at = self._renew_at = 0.0
            self._failure, self._is_final = "", False
            self._changed.notify_all()

    def headers(self, wait_seconds: float) -> dict[str, str]:
        if time.time() < self._expires_at:
            return self._headers
        with self._changed:
            self._changed.wait_for(lambda: time.time() < self._expires_at or self._is_final, wait_seconds)
            if time.time() < self._expires_at:
                return self._headers
            reason = self._failure or f"no token came within {wait_seconds:g} s"
            raise ConfigurationError(f"GoogleCredentials: {reason}")

    def _run(self) -> None:
        pause_seconds = _RETRY_SECONDS[0]
        while True:
            with self._changed:
                while not self._is_stopped and (left := self._renew_at - time.time()) > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                if self._is_stopped:
                    return
            failure = self._fetch()
            if failure is None:
                pause_seconds = _RETRY_SECONDS[0]
                continue
            with self._changed:
                self._failure, self._is_final = failure
                self._renew_at = time.time() + pause_seconds
                self._changed.notify_all()
            _logger.warning("%s; tried again in %g s", failure[0], pause_seconds)
            pause_seconds = min(2 * pause_seconds, _RETRY_SECONDS[1])

    def _fetch(self) -> tuple[str, bool] | None:
        """Fetch a token; if that failed, why, and whether it will fail again at once."""
        import google.auth
        import google.auth.exceptions
        import google.auth.transport.requests

        try:
            if self._credentials is None:
                self._credentials, _ = google.auth.default(scopes=self._scopes)
            elif getattr(self._credentials, "requires_scopes", False):
                self._credentials = self._credentials.with_scopes(self._scopes)
            credentials = self._credentials
            credentials.refresh(google.auth.transport.requests.Request())
            headers: dict[str, str] = {}
            credentials.apply(headers)
        except google.auth.exceptions.DefaultCredentialsError:
            return (
                "google-auth finds no application default credentials on this worker "
                "(GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, the machine's)",
                True,
            )
        except Exception as error:
            # The answer of a token server may repeat what it was sent: its class says enough.
            is_final = not getattr(error, "retryable", False)
            return f"the token could not be fetched ({type(error).__name__})", is_final
        now = time.time()
        expiry = credentials.expiry
        # google-auth gives UTC without saying so.
        expires_at = (
            expiry.replace(tzinfo=timezone.utc).timestamp() if isinstance(expiry, datetime) else now + 3600
        )
        life_seconds = max(expires_at - now, 0.0)
        with self._changed:
            self._headers, self._expires_at = headers, expires_at
            self._failure, self._is_final = "", False
            self._renew_at = now + max(
                life_seconds - _RENEW_BEFORE_SECONDS, _SHORTEST_LIFE_PART * life_seconds, _RETRY_SECONDS[0]
            )
            self._changed.notify_all()
        return None
