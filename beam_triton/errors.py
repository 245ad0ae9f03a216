"""Every error that beam_triton raises, in one hierarchy.

::

    TritonError
    ├── ConfigurationError            wrong use, found before anything is sent (also a ValueError)
    ├── TransportError                no complete answer came
    │   ├── PoolTimeoutError          no connection, or place at the server, became free in time
    │   ├── ConnectError              the server surely did not get the request
    │   │   ├── ConnectTimeoutError
    │   │   └── TlsError              certificate refused, handshake failed
    │   ├── ConnectionLostError       reset, closed or truncated: the request may have run
    │   └── DeadlineExceededError     `timeout_seconds` ran out
    ├── ProtocolError                 bytes or tensors that do not fit the Open Inference Protocol
    │   ├── LocalProtocolError        ours: an element that does not fit the model
    │   └── RemoteProtocolError       theirs: an answer that cannot be read
    ├── InferenceError                the server answered, and refused
    │   ├── InvalidRequestError       the element's fault: 400 and its kind, malformed-request 500s
    │   ├── ModelNotFoundError        no such model or version
    │   ├── ModelNotReadyError        known, but not (or no longer, or not yet) loaded
    │   ├── ServerOverloadedError     queue full, 429
    │   ├── ServerUnavailableError    502, 503, 504
    │   └── ModelExecutionError       a plain 500: the model raised
    └── CircuitOpenError              the circuit breaker kept the request back

What a caller may decide on is an attribute, never a message:

========================  ================================================================
``retryable``             the same request may succeed later
``may_have_run``          the model may have executed it (a sequence request is not repeated)
``splits_batch``          some element of the batch may be at fault: halving isolates it
``counts_as_failure``     says something of the server's health (circuit breaker)
``is_overload``           the server asks for less: the number in flight shrinks
``was_stale``             the server had closed a reused connection while it was idle
========================  ================================================================

All of them pickle: the message is the only positional argument, everything else lives in the
instance's ``__dict__``, which is what ``BaseException.__reduce__`` carries across processes.
No message holds a credential: whoever raises passes redacted URLs only.
"""

from __future__ import annotations


class TritonError(Exception):
    """Base of everything that this library raises.

    ``attempts`` holds the errors of the earlier attempts of the same request, first one first;
    the raised error itself is the last.
    """

    retryable: bool = False
    may_have_run: bool = False
    splits_batch: bool = False
    counts_as_failure: bool = False
    is_overload: bool = False
    was_stale: bool = False

    def __init__(self, message: str = "", *, attempts: tuple[TritonError, ...] = ()) -> None:
        super().__init__(message)
        self.attempts = attempts

    @property
    def message(self) -> str:
        """What went wrong, without the earlier attempts that ``str`` adds."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        if not self.attempts:
            return self.message
        earlier = "; ".join(f"{type(error).__name__}: {error.message}" for error in self.attempts[-3:])
        return f"{self.message} (after {len(self.attempts)} earlier attempt(s): {earlier})"


class ConfigurationError(TritonError, ValueError):
    """An option, endpoint or model description that cannot work; nothing was sent."""


class TransportError(TritonError):
    """No complete answer came from the server."""

    retryable = True


class PoolTimeoutError(TransportError):
    """All connections that the pool may open, or all requests that the server copes with, stayed in use for
    as long as the request could wait."""


class ConnectError(TransportError):
    """No connection could be opened; the server surely did not get the request."""

    counts_as_failure = True


class ConnectTimeoutError(ConnectError):
    """The connection was not established within ``connect_timeout_seconds``."""


class TlsError(ConnectError):
    """The TLS handshake failed: the certificate, its host name, or the client's own certificate."""

    retryable = False


class ConnectionLostError(TransportError):
    """The connection ended before the answer was complete."""

    may_have_run = True
    counts_as_failure = True


class DeadlineExceededError(TransportError):
    """``timeout_seconds`` ran out before the last byte of the answer."""

    may_have_run = True
    counts_as_failure = True


class ProtocolError(TritonError):
    """Bytes or tensors that do not fit the Open Inference Protocol or the model."""


class LocalProtocolError(ProtocolError):
    """Our side: inputs that the model cannot take."""

    splits_batch = True


class RemoteProtocolError(ProtocolError):
    """The server's side: an answer that cannot be understood."""

    may_have_run = True


class InferenceError(TritonError):
    """The server answered with an error status.

    ``status`` is the HTTP status, ``server_message`` the ``error`` field of the body as the server
    wrote it, ``model_name`` the model that was asked (empty where none was), and
    ``retry_after_seconds`` what the ``Retry-After`` header asked for.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int = 0,
        server_message: str = "",
        model_name: str = "",
        retry_after_seconds: float | None = None,
        attempts: tuple[TritonError, ...] = (),
    ) -> None:
        super().__init__(message, attempts=attempts)
        self.status = status
        self.server_message = server_message
        self.model_name = model_name
        self.retry_after_seconds = retry_after_seconds


class InvalidRequestError(InferenceError):
    """The server refused the request's content: one of the batch's elements is at fault."""

    splits_batch = True


class ModelNotFoundError(InferenceError):
    """The server has no such model or version."""


class ModelNotReadyError(InferenceError):
    """The model exists but cannot serve now: loading, unloaded, or between two versions."""

    retryable = True
    counts_as_failure = True


class ServerOverloadedError(InferenceError):
    """The server sheds load: its queue is full, or it answers 429."""

    retryable = True
    is_overload = True


class ServerUnavailableError(InferenceError):
    """502, 503 or 504: the server, or a proxy before it, cannot answer now."""

    retryable = True
    counts_as_failure = True


class ModelExecutionError(InferenceError):
    """A plain 500: the model raised while it executed the request."""

    retryable = True
    may_have_run = True
    splits_batch = True
    counts_as_failure = True


class CircuitOpenError(TritonError):
    """The circuit breaker of every endpoint is open, and the policy says not to wait (any longer).

    ``open_seconds_left`` is the time until the next probe.
    """

    retryable = True

    def __init__(
        self,
        message: str = "",
        *,
        open_seconds_left: float = 0.0,
        attempts: tuple[TritonError, ...] = (),
    ) -> None:
        super().__init__(message, attempts=attempts)
        self.open_seconds_left = open_seconds_left


def with_message(error: TritonError, message: str) -> TritonError:
    """The same error told in other words; its attributes and earlier attempts stay."""
    told = type(error)(message)
    told.__dict__.update(error.__dict__)
    return told


def without_frames(error: BaseException) -> None:
    """Let go of the frames that ``error`` came through.

    They hold the request's and the answer's bytes, and whoever keeps the error: a cycle that keeps megabytes
    until the garbage collector comes by. What is raised to the user gets frames anew.
    """
    told: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in told:
            told.add(id(each))
            each.__traceback__ = None
            left += [each.__cause__, each.__context__]
