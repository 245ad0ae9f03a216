"""Every error that beam_triton raises, in one hierarchy::

    TritonError
    ├── ConfigurationError            wrong use, found before anything is sent; also a ValueError
    │   └── ModelMismatchError        the served model is not the one of the lock file
    ├── TransportError                no complete answer came
    │   ├── PoolTimeoutError          no connection or admission became free in time
    │   ├── ConnectError              the request cannot have reached the server
    │   │   ├── ConnectTimeoutError
    │   │   ├── TlsError              certificate refused, handshake failed
    │   │   └── ProxyError            the proxy on the way refuses
    │   ├── ConnectionLostError       reset, closed or truncated: the request may have run
    │   ├── SilentConnectionError     nothing came for far longer than answers usually take
    │   └── DeadlineExceededError     `timeout_seconds` ran out; also a TimeoutError
    ├── ProtocolError                 bytes or tensors that do not fit the Open Inference Protocol
    │   ├── LocalProtocolError        our side: an element that does not fit the model
    │   └── RemoteProtocolError       the server's side: an answer that cannot be read
    │       └── UnexpectedOutputError outputs that are not those of the model's description
    ├── InferenceError                the server answered, and refused
    │   ├── InvalidRequestError       an element's fault: most 4xx, malformed-request 500s
    │   │   └── SequenceLostError     the server does not know the sequence, or no more
    │   ├── SharedMemoryError         the request's shared memory is not what the server knows
    │   ├── ModelNotFoundError        no such model or version
    │   ├── ModelNotReadyError        known, but not loaded at the moment
    │   ├── ServerOverloadedError     queue full, 429
    │   ├── ServerUnavailableError    502, 503, 504
    │   └── ModelExecutionError       a plain 500: the model raised
    ├── CircuitOpenError              the circuit breaker did not admit the request
    ├── SequenceEndedError            an earlier element of the sequence failed
    ├── LateElementError              later elements of the sequence have been scored
    └── TooManyFailuresError          more elements failed than the user allows; also a ValueError

Callers decide by attributes, never by a message:

==========================  ==============================================================
``retryable``               the same request may succeed later
``may_have_run``            the model may have executed it (a sequence request is not repeated)
``splits_batch``            an element of the batch may be at fault: bisecting isolates it
``counts_as_failure``       counts against the server's health (circuit breaker)
``is_overload``             the server is overloaded: fewer requests are kept in flight
``model_may_have_changed``  the model seems not to be the one that was described
``was_stale``               the server had closed a reused connection while it was idle
==========================  ==============================================================

All errors pickle: the message is the only positional argument, and everything else is in the instance's
``__dict__``, which ``BaseException.__reduce__`` carries across processes. No message holds a credential:
the URLs in messages are redacted.
"""

from __future__ import annotations


class TritonError(Exception):
    """Base of everything that this library raises.

    ``attempts`` holds the errors of the request's earlier attempts, oldest first; the error of the last
    attempt is the one raised.

    An error of a request that was sent says more: ``endpoint`` is the server of its last attempt, without
    credentials, ``status`` the HTTP status where one was answered, ``attempt_count`` the number of attempts,
    and ``request_id`` the id by which the server's log names the request. ``generated`` is the text that a
    generation had given before it failed.
    """

    retryable: bool = False
    may_have_run: bool = False
    splits_batch: bool = False
    counts_as_failure: bool = False
    is_overload: bool = False
    model_may_have_changed: bool = False
    was_stale: bool = False

    endpoint: str | None = None
    status: int | None = None
    attempt_count: int = 0
    request_id: str | None = None
    generated: str | None = None

    def __init__(self, message: str = "", *, attempts: tuple[TritonError, ...] = ()) -> None:
        super().__init__(message)
        self.attempts = attempts

    @property
    def message(self) -> str:
        """What went wrong, without what ``str`` adds: the earlier attempts, and the facts of the request."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        text = self.message
        if self.attempts:
            earlier = "; ".join(f"{type(error).__name__}: {error.message}" for error in self.attempts[-3:])
            text += f" (after {len(self.attempts)} earlier attempt(s): {earlier})"
        if self.endpoint is None:
            return text
        status = f" status={self.status}" if self.status else ""
        request_id = f" request_id={self.request_id}" if self.request_id else ""
        return f"{text} [endpoint={self.endpoint}{status} attempts={self.attempt_count}{request_id}]"


class ConfigurationError(TritonError, ValueError):
    """An option, endpoint or model description that cannot work; nothing was sent."""


class ModelMismatchError(ConfigurationError):
    """The served model does not keep the contract of the lock file that ``model_spec`` names."""


class TransportError(TritonError):
    """No complete answer came from the server."""

    retryable = True


class PoolTimeoutError(TransportError):
    """The request was not sent in time: all connections that the pool may open were in use, or every
    endpoint was at its limit of requests and admitted no more."""


class ConnectError(TransportError):
    """No connection could be opened; the request cannot have reached the server."""

    counts_as_failure = True


class ConnectTimeoutError(ConnectError):
    """The connection was not established within ``connect_timeout_seconds``."""


class TlsError(ConnectError):
    """The TLS handshake failed: the certificate, its host name, or the client's own certificate."""

    retryable = False


class ProxyError(ConnectError):
    """The proxy on the way to the server refuses to connect to it, or asks for credentials."""

    retryable = False


class ConnectionLostError(TransportError):
    """The connection ended before the answer was complete."""

    may_have_run = True
    counts_as_failure = True


class SilentConnectionError(TransportError):
    """Not a byte of an answer came for far longer than answers usually take: the network may have lost the
    connection without a sign."""

    may_have_run = True
    counts_as_failure = True


class DeadlineExceededError(TransportError, TimeoutError):
    """``timeout_seconds`` ran out before the last byte of the answer."""

    may_have_run = True
    counts_as_failure = True


class ProtocolError(TritonError):
    """Bytes or tensors that do not fit the Open Inference Protocol or the model."""


class LocalProtocolError(ProtocolError):
    """Our side: inputs that the model cannot take."""

    splits_batch = True


class RemoteProtocolError(ProtocolError):
    """The server's side: an answer that cannot be understood.

    ``is_foreign``: it is no answer of this protocol at all, as of another port or another kind of server.
    """

    is_foreign = False

    may_have_run = True


class UnexpectedOutputError(RemoteProtocolError):
    """The answer can be read, but its outputs are not those that the model was described with."""

    model_may_have_changed = True


class InferenceError(TritonError):
    """The server answered with an error status.

    ``status`` is the HTTP status, ``server_message`` the ``error`` field of the body as the server wrote it,
    ``model_name`` the requested model (empty if there is none), and ``retry_after_seconds`` the value of the
    ``Retry-After`` header.
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
    """The server refused the request's content: an element of the batch is at fault."""

    splits_batch = True


class SequenceLostError(InvalidRequestError):
    """The server has no state of the request's sequence: it was restarted, or has forgotten what was idle for
    ``max_sequence_idle_microseconds`` of the model's configuration."""

    splits_batch = False


class SharedMemoryError(InferenceError):
    """The server does not know the shared memory that the request refers to, as it was restarted, or an
    output does not fit into its place there. The request is sent again with its tensors in it."""


class ModelNotFoundError(InferenceError):
    """The server has no such model or version."""


class ModelNotReadyError(InferenceError):
    """The model exists but cannot serve now: it is loading, unloaded, or between two versions.

    ``is_unavailable``: the server lists it as unavailable, so it is not loading.
    """

    is_unavailable = False
    retryable = True
    counts_as_failure = True


class ServerOverloadedError(InferenceError):
    """The server sheds load: its queue is full, or its status is 429."""

    retryable = True
    is_overload = True


class ServerUnavailableError(InferenceError):
    """502, 503 or 504: the server, or a proxy in front of it, cannot answer now."""

    retryable = True
    counts_as_failure = True


class ModelExecutionError(InferenceError):
    """A plain 500: the model raised while it executed the request."""

    retryable = True
    may_have_run = True
    splits_batch = True
    counts_as_failure = True


class CircuitOpenError(TritonError):
    """The circuit breaker of every endpoint is open, and the policy allows no (further) waiting.

    ``open_seconds_left`` is the time until the next probe.
    """

    retryable = True

    def __init__(
        self, message: str = "", *, open_seconds_left: float = 0.0, attempts: tuple[TritonError, ...] = ()
    ) -> None:
        super().__init__(message, attempts=attempts)
        self.open_seconds_left = open_seconds_left


class SequenceEndedError(TritonError):
    """An earlier element of the sequence failed, so the model's state says nothing about this one."""


class LateElementError(TritonError):
    """Later elements of the sequence had been scored when this one came."""


class TooManyFailuresError(TritonError, ValueError):
    """More elements failed than the user allows, which ends the job.

    Also a ValueError, as Beam's own ``threshold`` raises.
    """


def with_message(error: TritonError, message: str, kind: type[TritonError] | None = None) -> TritonError:
    """A copy of the error with another message, of another ``kind`` where one is given; its attributes and
    earlier attempts stay."""
    reworded = (kind or type(error))(message)
    reworded.__dict__.update(error.__dict__)
    return reworded


def without_frames(error: BaseException) -> None:
    """Drop the tracebacks of ``error``, its causes and its contexts.

    Their frames hold the bytes of request and answer, and often the error itself: a reference cycle that
    keeps megabytes until the garbage collector runs. Raising the error to the user adds new frames.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += [each.__cause__, each.__context__]
