"""The keyword arguments that client, transforms and model handler share, checked at construction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from beam_triton.auth.hook import Auth, check_auth, describe_auth
from beam_triton.compression import ENCODINGS
from beam_triton.credentials import (
    LIBRARY_HEADERS,
    Secret,
    check_header_name,
    check_reference,
    describe,
    is_reference,
    redact_headers,
    redact_url,
    resolve,
)
from beam_triton.errors import ConfigurationError
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy
from beam_triton.protocol import ModelSpec, check_request_options, checked_parameters
from beam_triton.protocol.paths import checked_version
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transport.config import ConnectionPoolConfig, NetworkConfig, TlsConfig
from beam_triton.transport.origin import EndpointUrl
from beam_triton.validation import Options, boolean, check, one_of, positive, positive_integer

DEFAULT_MAX_CONCURRENT_REQUESTS = 32

# Stands for a pool that the user did not give; replaced by one that fits the other options.
_FITTING_POOL = ConnectionPoolConfig()


@dataclass(frozen=True, kw_only=True, eq=False)
class InferenceOptions(Options):
    """How requests are made. Every field is a keyword argument of `TritonClient` and `TritonInference`.

    Attributes:
        endpoint: URL of the server (``http://host:8000``, ``http://[::1]:8000``, or for a unix socket
            ``http+unix://%2Fpath%2Fto.sock``), or a list of them: requests are spread over the healthy ones,
            and a request that fails at one is tried at another. URLs of Vertex AI
            (``https://…/projects/…/locations/…/endpoints/…``) and SageMaker (``https://…/invocations``) are
            recognised by their paths. A `WorkerTriton` is a server that each worker machine runs for itself.
        discovery: ``dns`` makes an endpoint of each address that a name in ``endpoint`` has, such as the
            pods of a headless Kubernetes Service. New addresses are used, those that are gone get no more
            requests. The ``Host`` header and the check of certificates keep the name. ``None`` connects to
            the name: all connections go to the address that the system prefers, while it answers.
        discovery_interval_seconds: how often names are looked up; more often while a server is unhealthy.
        model_version: ``None`` leaves the choice to the server. Triton's versions are numbers; other servers
            have strings such as ``v0.1.0``.
        timeout_seconds: deadline of a request, from acquiring its connection to the last byte of the
            answer, including all attempts and backoffs. Time in which a request is held because the server
            is down or overloaded does not count; ``circuit_breaker.max_wait_seconds`` bounds it.
        max_concurrent_requests: slots for requests in flight in a process, which bound its memory; a
            request of several times ``batching.max_batch_bytes`` (at least 4 MiB) takes as many slots.
        pool: connection pool, shared by all users in the process with an equal configuration. By default it
            is `ConnectionPoolConfig` with a connect timeout of at most half of ``timeout_seconds``, and at
            least as many connections, idle ones too, as ``max_concurrent_requests`` and as endpoints. A given
            pool that contradicts these options is refused.
        tls: certificates of ``https`` endpoints.
        trust_env: the environment of the worker is asked for what these options leave open, as requests and
            curl do: proxies of all but loopback addresses (``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``,
            ``NO_PROXY``, or in lower case), and the authorities to trust (``REQUESTS_CA_BUNDLE``,
            ``CURL_CA_BUNDLE``, ``SSL_CERT_FILE``, ``SSL_CERT_DIR``).
        proxies: URLs of HTTP proxies by scheme of the endpoint (``http``, ``https``, ``all``, or
            ``https://host`` for one host), as requests takes them; ``None`` for a scheme connects directly.
            They come before those of the environment. A value may be a secret reference or callable;
            credentials in it are shown nowhere. ``no_proxy`` lists hosts, with commas, that no proxy is for.
        batching, retry: see the policies.
        circuit_breaker: ``None`` switches it off.
        headers: sent with every request; a value may be a secret reference or callable. ``Host`` takes the
            place of the endpoint's, for an ingress that is reached by an address or another name; the name in
            a certificate is ``tls.server_hostname``.
        auth_token: sent as ``Authorization: Bearer``; preferably a reference (``env:NAME``, ``file:PATH``)
            or a callable, which is read on the worker, rather than the token itself.
        auth: a ``requests.auth.AuthBase``, or a callable that takes method, URL, header fields and the body
            as bytes and returns the header fields to add or to replace: signatures, tenants, tracing. It sees
            every attempt of every request (inference, metadata, health) after ``headers`` and ``auth_token``
            have been added, is called on several threads at once, and travels in the pickled pipeline. After
            a 401 or 403 it is asked once more; one that keeps a token may have a method ``renew()``, which is
            called before.
        tracing: ``None`` sends W3C trace context, and makes an OpenTelemetry span a request, where a span of
            the application's is current; ``True`` for every request, in new traces where there is none;
            ``False`` never. Spans need ``pip install beam-triton[tracing]`` and an OpenTelemetry SDK.
        compression: ``gzip`` or ``deflate`` for request bodies; ``None`` is faster in a data centre.
        response_compression: the same for answers; Triton takes ten times as long for a compressed one.
        priority: Triton's request priority: 1 is the highest, 0 or ``None`` the model's default.
        politeness: ``background`` makes a job give way to other users of the model on the same Triton: it
            keeps at most four times as many of the model's instances busy as are idle, and its requests have
            the lowest of the model's priorities unless ``priority`` is given. ``None`` shares the server with
            the others as they do (docs/tuning.md).
        shared_memory: ``auto`` passes large tensors (128 KiB and more, a request's inputs and outputs
            together) through Linux's shared memory where the endpoint is a loopback address or a unix socket
            and the server allows it: Triton does by default up to 2.68, and later with
            ``--allow-client-shm=true``. Otherwise they go by HTTP, which the log says once. ``always`` asks
            other endpoints, too, such as a container with ``--ipc=host``; ``never`` asks none. Results are
            views of the shared memory, which is not used again while anything refers to them
            (docs/shared-memory.md).
        request_parameters: sent with every request.
        input_parameters: input name to parameters, sent with that input of every request, such as MLServer's
            ``{"text": {"content_type": "str"}}``.
        binary: whether tensors travel in binary (Triton's extension) or as JSON. ``None`` asks the server,
            which announces it. KServe's takes binary without announcing it.
        outputs: names of the requested outputs; ``None`` requests all. A server that takes JSON only is not
            asked for any then, and gives those of its choice.
        classification: output name to k: its k best classes are returned as BYTES ``value:index:label``.
        default_value: the result of an element that failed for good: output name to value, or the value
            itself if one output is requested.
        max_response_bytes: a larger answer, before or after decompression, is refused.
        model_spec: the model's inputs, outputs and limits, if they should not be read from the server; or the
            path of a lock file that has them (``python -m beam_triton lock``, docs/lock-file.md), which is
            read here. A model by hand replaces what the server says. With a lock, workers compare the two:
            they refuse a model that differs harmfully.

    Raises:
        ConfigurationError: a value is out of range or of the wrong kind, or two contradict each other.
    """

    endpoint: str | Sequence[str] | WorkerTriton = field(repr=False)
    discovery: str | None = None
    discovery_interval_seconds: float = 30.0
    model_version: str | int | None = None
    timeout_seconds: float = 30.0
    max_concurrent_requests: int = DEFAULT_MAX_CONCURRENT_REQUESTS
    pool: ConnectionPoolConfig = _FITTING_POOL
    tls: TlsConfig = field(default_factory=TlsConfig)
    trust_env: bool = True
    proxies: Mapping[str, Secret | None] | None = field(default=None, repr=False)
    batching: BatchingPolicy = field(default_factory=BatchingPolicy)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    circuit_breaker: CircuitBreakerPolicy | None = field(default_factory=CircuitBreakerPolicy)
    headers: Mapping[str, Secret] | None = field(default=None, repr=False)
    auth_token: Secret | None = field(default=None, repr=False)
    auth: Auth | None = field(default=None, repr=False)
    tracing: bool | None = None
    compression: str | None = None
    response_compression: str | None = None
    priority: int | None = None
    politeness: str | None = None
    shared_memory: str = "auto"
    request_parameters: Mapping[str, Any] | None = None
    input_parameters: Mapping[str, Mapping[str, Any]] | None = None
    binary: bool | None = None
    outputs: Sequence[str] | None = None
    classification: Mapping[str, int] | None = None
    default_value: Any = None
    max_response_bytes: int = 1 << 30
    model_spec: ModelSpec | None = None

    def __post_init__(self) -> None:
        check(self, positive, "timeout_seconds", "discovery_interval_seconds")
        check(self, one_of((None, "dns")), "discovery")
        check(self, boolean, "binary", allow_none=True)
        check(self, one_of((None, True, False)), "tracing")
        check(self, positive_integer, "max_concurrent_requests", "max_response_bytes")
        check(self, one_of((None, "background")), "politeness")
        check(self, one_of(("auto", "always", "never")), "shared_memory")
        check(self, one_of((None, *ENCODINGS)), "compression", "response_compression")
        if self.pool is _FITTING_POOL:
            # Endpoints take turns: each needs a connection that stays open until its next one.
            connections = max(self.max_concurrent_requests, len(self.urls))
            fitting = ConnectionPoolConfig.for_requests(connections, self.timeout_seconds)
            object.__setattr__(self, "pool", fitting)
        for name, kind in (
            ("pool", ConnectionPoolConfig),
            ("tls", TlsConfig),
            ("batching", BatchingPolicy),
            ("retry", RetryPolicy),
        ):
            object.__setattr__(self, name, kind.from_options(getattr(self, name)))
        if self.circuit_breaker is not None:
            breaker = CircuitBreakerPolicy.from_options(self.circuit_breaker)
            object.__setattr__(self, "circuit_breaker", breaker)
        _ = self.urls, self.network
        if self.discovery is not None and isinstance(self.endpoint, WorkerTriton):
            raise ConfigurationError("discovery looks names up, and a WorkerTriton has none: leave it out")
        checked_version(self.model_version)
        checked_parameters(self.parameters)
        self._check_credentials()
        self._check_limits()
        self._check_doors()
        check_request_options(self.outputs, self.classification, self.input_parameters)
        if isinstance(self.model_spec, Mapping):
            object.__setattr__(self, "model_spec", ModelSpec.from_mapping(self.model_spec))
        elif isinstance(self.model_spec, str | os.PathLike):
            object.__setattr__(self, "model_spec", ModelSpec.load(self.model_spec))
        if self.model_spec is not None and not isinstance(self.model_spec, ModelSpec):
            kind_name = type(self.model_spec).__name__
            raise ConfigurationError(
                f"model_spec must be a ModelSpec or the path of a lock file, not a {kind_name}"
            )

    @property
    def urls(self) -> tuple[EndpointUrl, ...]:
        """The endpoints, parsed."""
        if isinstance(self.endpoint, WorkerTriton):
            return (EndpointUrl.parse(self.endpoint.url),)
        given = [self.endpoint] if isinstance(self.endpoint, str) else self.endpoint
        # The message names the value's type alone: it may hold a URL with a password.
        if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray | memoryview):
            raise ConfigurationError(
                f"endpoint must be a URL, a list of URLs or a WorkerTriton, not a "
                f"{type(self.endpoint).__name__}"
            )
        if not given:
            raise ConfigurationError("endpoint must be a URL or a list of URLs, not an empty list")
        urls = tuple(EndpointUrl.parse(url) for url in given)
        if len(set(urls)) != len(urls):
            raise ConfigurationError("endpoint names the same server twice: " + ", ".join(map(str, urls)))
        return urls

    @property
    def servers(self) -> str:
        """The endpoints as people know them, without credentials."""
        if isinstance(self.endpoint, WorkerTriton):
            return str(self.endpoint)
        return ", ".join(map(str, self.urls))

    @property
    def has_metadata(self) -> bool:
        """Whether all endpoints describe their models; some doors do not."""
        return all(url.door is None or url.door.has_metadata for url in self.urls)

    def spec_of(self, model_name: str) -> ModelSpec | None:
        """``model_spec``, where it describes the model of that name.

        Raises:
            ConfigurationError: it comes from the lock file of another model.
        """
        spec = self.model_spec
        if spec is None or spec.name == model_name:
            return spec
        if spec.lock_file:
            raise ConfigurationError(
                f"lock file {spec.lock_file!r} is that of model {spec.name!r}, not {model_name!r}"
            )
        return None

    def of_model(self, model_name: str, model_version: str | None) -> InferenceOptions:
        """These options for one of several models, in that version: ``model_spec`` says nothing about models
        of other names."""
        spec = self.model_spec if self.model_spec is None or self.model_spec.name == model_name else None
        return replace(self, model_spec=spec, model_version=model_version)

    @property
    def network(self) -> NetworkConfig:
        """The way to the servers."""
        proxies = {} if self.proxies is None else self.proxies
        if not isinstance(proxies, Mapping):
            raise ConfigurationError(
                "proxies must map schemes to URLs, such as {'https': 'http://proxy:3128'}"
            )
        return NetworkConfig(trust_env=self.trust_env, proxies=tuple(proxies.items()))

    @property
    def parameters(self) -> dict[str, Any]:
        """The request parameters, ``priority`` among them."""
        parameters = dict(self.request_parameters or {})
        if self.priority is not None:
            parameters.setdefault("priority", self.priority)
        return parameters

    @property
    def traces(self) -> bool | None:
        """``tracing``, which a ``traceparent`` of the user's own replaces."""
        has_own = any(name.lower() == "traceparent" for name in self.headers or ())
        return False if has_own else self.tracing

    def header_values(self) -> dict[str, str]:
        """The user's header fields, with the current value of every secret.

        Raises:
            ConfigurationError: a referenced secret does not exist, or a value is not valid in a header.
        """
        headers = self.headers or {}
        values = {name: resolve(secret, f"header {name}") for name, secret in headers.items()}
        if self.auth_token is not None:
            values["Authorization"] = f"Bearer {resolve(self.auth_token, 'auth_token')}"
        if self.response_compression is not None:
            values["Accept-Encoding"] = self.response_compression
        return values

    def shown(self) -> dict[str, str]:
        """The options that differ from their defaults, as text without secrets, for display data."""
        if isinstance(self.endpoint, WorkerTriton):
            shown = {"endpoint": str(self.endpoint)}
        else:
            endpoints = [self.endpoint] if isinstance(self.endpoint, str) else self.endpoint
            shown = {"endpoint": ", ".join(redact_url(url) for url in endpoints)}
        defaults = type(self)(endpoint="http://any")
        for option in fields(self):
            value, default = getattr(self, option.name), getattr(defaults, option.name)
            # Values without a default may be arrays, whose comparison has no single result.
            is_default = value is None if default is None else value == default
            if option.name == "endpoint" or is_default:
                continue
            if option.name == "headers":
                shown["headers"] = ", ".join(f"{k}: {v}" for k, v in redact_headers(value).items())
            elif option.name == "proxies":
                shown["proxies"] = ", ".join(f"{k}: {_shown_proxy(v)}" for k, v in value.items())
            elif option.name == "auth_token":
                shown["auth_token"] = describe(value)
            elif option.name == "auth":
                shown["auth"] = describe_auth(value)
            else:
                shown[option.name] = str(value)
        return shown

    def _check_credentials(self) -> None:
        if self.auth_token is not None:
            check_reference(self.auth_token, "auth_token")
        if self.auth is not None:
            check_auth(self.auth)
        if self.headers is None:
            return
        if not isinstance(self.headers, Mapping):
            raise ConfigurationError("headers must map names to values")
        names = [str(name).lower() for name in self.headers]
        if names.count("host") > 1:
            raise ConfigurationError("headers name Host twice: a request has one")
        for name, secret in self.headers.items():
            check_header_name(name)
            check_reference(secret, f"header {name}")
            if name.lower() in LIBRARY_HEADERS and name.lower() != "host":
                raise ConfigurationError(f"header {name} is set by the library: leave it out")
            if name.lower() == "authorization" and self.auth_token is not None:
                raise ConfigurationError(
                    "auth_token and a header Authorization contradict: give only one of them"
                )

    def _check_doors(self) -> None:
        for url in self.urls:
            if url.door is None:
                continue
            if self.compression is not None:
                raise ConfigurationError(
                    f"{url} is {url.door.name}, which takes no compressed tensors: leave compression out"
                )
            if url.door.has_metadata:
                continue
            if self.model_spec is None:
                raise ConfigurationError(
                    f"{url} is {url.door.name}, which does not describe its model: give model_spec, "
                    f"ModelSpec(name, inputs=…, outputs=…, max_batch_size=…)"
                )
            if self.model_version is not None:
                raise ConfigurationError(
                    f"{url} is {url.door.name}, which chooses the model's version itself: leave "
                    f"model_version out"
                )

    def _check_limits(self) -> None:
        if self.pool.max_total < self.max_concurrent_requests:
            raise ConfigurationError(
                f"max_total={self.pool.max_total} is below max_concurrent_requests="
                f"{self.max_concurrent_requests}: requests would wait for connections they may never get; "
                f"raise max_total or lower max_concurrent_requests"
            )
        if self.pool.connect_timeout_seconds >= self.timeout_seconds:
            raise ConfigurationError(
                f"connect_timeout_seconds={self.pool.connect_timeout_seconds:g} is not below timeout_seconds="
                f"{self.timeout_seconds:g}, which bounds the whole request; lower it or raise timeout_seconds"
            )


def _shown_proxy(proxy: Secret | None) -> str:
    if not proxy:
        return "none"
    return describe(proxy) if is_reference(proxy) else redact_url(str(proxy))
