"""Options of client and transform: what is refused, with which message, and what is never shown."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.transport.config import ConnectionPoolConfig

URL = "http://triton:8000"


def options(**given: Any) -> InferenceOptions:
    return InferenceOptions(**{"endpoint": URL} | given)


def test_an_endpoint_alone_gives_the_default_options() -> None:
    """No other option is required."""
    made = options()
    assert (made.timeout_seconds, made.max_concurrent_requests) == (30.0, 32)
    assert made.pool == ConnectionPoolConfig(max_idle=32) and made.retry == RetryPolicy()
    assert made.circuit_breaker == CircuitBreakerPolicy()
    assert made.parameters == {} and made.header_values() == {}


def test_each_endpoint_may_keep_a_connection() -> None:
    """Endpoints take turns: with fewer idle connections each request would open one."""
    made = options(endpoint=[f"http://triton-{number}:8000" for number in range(150)])
    assert (made.pool.max_idle, made.pool.max_total) == (150, 150)


def test_policies_may_be_plain_dicts() -> None:
    """Each policy may be a plain dict, as YAML gives it; None is the default, or no breaker."""
    made = options(
        pool={"max_total": 50},
        retry={"max_retries": 3},
        batching={"max_batch_size": 8},
        circuit_breaker=None,
        tls=None,
    )
    assert made.pool == ConnectionPoolConfig(max_total=50) and made.retry == RetryPolicy(max_retries=3)
    assert made.batching == BatchingPolicy(max_batch_size=8) and made.circuit_breaker is None
    again = InferenceOptions.from_options({"endpoint": URL, "circuit_breaker": {"open_seconds": 5}})
    assert again.circuit_breaker == CircuitBreakerPolicy(open_seconds=5)


@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_compression_is_none_gzip_or_deflate(encoding: str | None) -> None:
    """Each is accepted for requests and for responses."""
    made = options(compression=encoding, response_compression=encoding)
    assert (made.compression, made.response_compression) == (encoding, encoding)


def test_a_model_spec_may_be_plain_dicts() -> None:
    """A model's description may be plain, too: lists and dicts all the way down."""
    x = {"name": "x", "datatype": "FP32", "shape": [3]}
    made = options(model_spec={"name": "m", "inputs": [x], "outputs": [x], "max_batch_size": 8})
    tensor = TensorSpec("x", "FP32", (3,))
    assert made.model_spec == ModelSpec("m", inputs=(tensor,), outputs=(tensor,), max_batch_size=8)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"timeout_seconds": 0}, ["timeout_seconds", "0"]),
        ({"timeout_seconds": "30"}, ["timeout_seconds", "'30'"]),
        ({"max_concurrent_requests": 0}, ["max_concurrent_requests", "0"]),
        ({"max_concurrent_requests": 1.5}, ["max_concurrent_requests", "1.5"]),
        ({"max_response_bytes": -1}, ["max_response_bytes", "-1"]),
        ({"pool": {"max_totl": 5}}, ["max_totl", "max_total"]),
        ({"pool": 5}, ["ConnectionPoolConfig", "int"]),
        ({"retry": RetryPolicy(), "batching": RetryPolicy()}, ["BatchingPolicy", "RetryPolicy"]),
        ({"circuit_breaker": {"when_open": "panic"}}, ["when_open", "panic"]),
        ({"model_version": "the latest"}, ["the latest"]),
        ({"binary": "yes"}, ["binary", "yes"]),
        ({"input_parameters": {"x": {"binary_data_size": 4}}}, ["binary_data_size"]),
        ({"outputs": []}, ["outputs", "[]"]),
        ({"outputs": [1]}, ["outputs", "[1]"]),
        ({"outputs": ["y", "y"]}, ["y", "twice"]),
        ({"classification": {"y": 0}}, ["classification", "'y'", "0"]),
        ({"outputs": ["y"], "classification": {"z": 1}}, ["classification", "'z'", "y"]),
        ({"model_spec": {"nam": "m"}}, ["ModelSpec", "'nam'", "'name'"]),
        ({"model_spec": {"name": "m", "inputs": [{"name": "x"}]}}, ["TensorSpec", "datatype"]),
        ({"model_spec": 5}, ["ModelSpec", "int"]),
        ({"compression": "br"}, ["compression", "'gzip', 'deflate'", "'br'"]),
        ({"compression": "GZIP"}, ["compression", "'GZIP'"]),
        ({"response_compression": "zip"}, ["response_compression", "'zip'"]),
        ({"politeness": "polite"}, ["politeness", "None, 'background'", "'polite'"]),
        ({"politeness": True}, ["politeness", "'background'"]),
        ({"shared_memory": True}, ["shared_memory", "'auto', 'always', 'never'"]),
        ({"discovery": "srv"}, ["discovery", "'dns'", "'srv'"]),
        ({"discovery": "dns", "discovery_interval_seconds": 0}, ["discovery_interval_seconds", "0"]),
        ({"request_parameters": {"triton_x": 1}}, ["triton_x"]),
        ({"request_parameters": {"x": object()}}, ["x"]),
        ({"outputs": "probabilities"}, ["outputs", "probabilities"]),
        ({"endpoint": []}, ["endpoint"]),
        ({"endpoint": None}, ["endpoint"]),
        ({"endpoint": b"http://triton:8000"}, ["endpoint"]),
        ({"endpoint": [URL, 5]}, ["endpoint", "int"]),
        ({"endpoint": {URL}}, ["endpoint", "set"]),
        ({"endpoint": [URL, "http://triton:8000/v2"]}, ["twice", "triton:8000"]),
        ({"headers": ["X-A"]}, ["headers"]),
        ({"headers": {"X A": "b"}}, ["X A"]),
        ({"headers": {"X-A": "b\r\nX-B: c"}}, ["X-A"]),
        ({"headers": {"X-A": 5}}, ["X-A"]),
        ({"headers": {"Content-Length": "5"}}, ["Content-Length"]),
        ({"proxies": ["http://p:1"]}, ["proxies", "http://proxy:3128"]),
        ({"proxies": {"https": "https://p:1"}}, ["proxies['https']", "http://host:port"]),
        ({"trust_env": "no"}, ["trust_env"]),
        ({"headers": {"Host": "a.example", "host": "b.example"}}, ["Host", "twice"]),
        ({"headers": {"authorization": "x"}, "auth_token": "y"}, ["auth_token", "Authorization"]),
        ({"auth_token": ""}, ["auth_token"]),
        ({"auth_token": "env:"}, ["auth_token"]),
        ({"auth_token": 5}, ["auth_token", "int"]),
    ],
)
def test_wrong_options_are_refused_by_name_and_value(given: dict[str, Any], says: list[str]) -> None:
    """Each wrong option is refused at construction, by name and value."""
    with pytest.raises(ConfigurationError) as caught:
        options(**given)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_the_default_pool_fits_the_other_options() -> None:
    """A pool that the user did not give never contradicts the options that the user gave."""
    options = InferenceOptions(endpoint="http://triton:8000", timeout_seconds=5, max_concurrent_requests=200)
    pool = options.pool
    assert (pool.connect_timeout_seconds, pool.max_total, pool.max_idle) == (2.5, 200, 200)
    few = InferenceOptions(endpoint="http://triton:8000", max_concurrent_requests=4)
    assert few.pool == ConnectionPoolConfig()


@pytest.mark.parametrize(
    ("given", "both"),
    [
        (
            {"pool": {"max_total": 20}, "max_concurrent_requests": 21},
            ["max_total=20", "max_concurrent_requests=21"],
        ),
        ({"timeout_seconds": 10.0, "pool": {}}, ["connect_timeout_seconds=10", "timeout_seconds=10"]),
        (
            {"timeout_seconds": 5, "pool": {"connect_timeout_seconds": 7.5}},
            ["connect_timeout_seconds=7.5", "timeout_seconds=5"],
        ),
    ],
)
def test_contradicting_limits_are_refused_with_both_values(given: dict[str, Any], both: list[str]) -> None:
    """Both values are in the message."""
    with pytest.raises(ConfigurationError) as caught:
        options(**given)
    assert all(part in str(caught.value) for part in both), str(caught.value)


def test_a_misspelt_option_is_refused_with_a_suggestion() -> None:
    """A misspelt option is refused with the one that was probably meant."""
    with pytest.raises(ConfigurationError, match=r"timeout_second.*did you mean 'timeout_seconds'"):
        InferenceOptions.from_options({"endpoint": URL, "timeout_second": 5})


def test_priority_is_sent_as_a_request_parameter() -> None:
    """``priority`` travels with the request parameters; one given there is not overwritten."""
    assert options(priority=1, request_parameters={"a": "b"}).parameters == {"a": "b", "priority": 1}
    assert options(priority=1, request_parameters={"priority": 2}).parameters == {"priority": 2}


def test_secrets_are_read_when_they_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """References and callables are looked up at use, so that a rotated secret is taken up."""
    monkeypatch.delenv("TRITON_TOKEN", raising=False)
    key = tmp_path / "key"
    made = options(auth_token="env:TRITON_TOKEN", headers={"X-Key": f"file:{key}", "X-Now": lambda: "now"})
    with pytest.raises(ConfigurationError):
        made.header_values()
    monkeypatch.setenv("TRITON_TOKEN", "first")
    key.write_text("k1\n")
    assert made.header_values() == {"Authorization": "Bearer first", "X-Key": "k1", "X-Now": "now"}
    monkeypatch.setenv("TRITON_TOKEN", "second")
    key.write_text("k2\n")
    assert made.header_values()["Authorization"] == "Bearer second" and made.header_values()["X-Key"] == "k2"
    monkeypatch.setenv("TRITON_TOKEN", "third\nX-Evil: 1")
    with pytest.raises(ConfigurationError, match="auth_token") as caught:
        made.header_values()
    assert "Evil" not in str(caught.value)


def test_repr_and_display_data_show_no_secrets() -> None:
    """Neither contains a token, a header's value or a URL's password."""
    made = options(
        endpoint=["http://user:s3cret@one:8000", "http://two:8000?token".removesuffix("?token")],
        auth_token="s3cret",
        headers={"X-Key": "s3cret", "X-Call": lambda: "s3cret"},
    )
    shown = made.shown()
    assert "s3cret" not in repr(made) + repr(shown) + str(made)
    assert "one:8000" in shown["endpoint"] and "two:8000" in shown["endpoint"]
    assert "X-Key" in shown["headers"]


@pytest.mark.parametrize("kind", [set, dict.fromkeys, frozenset, iter])
@pytest.mark.parametrize("url", ["http://user:s3cret@one:8000", b"http://user:s3cret@one:8000"])
def test_a_refused_endpoint_is_not_shown_with_its_password(
    kind: Callable[[Any], Any], url: str | bytes
) -> None:
    """A value that is not a list of URLs is named by its type, since it may hold a password."""
    wrong = [kind([url]), [url.encode() if isinstance(url, str) else url], [[url]]]
    for endpoint in wrong if isinstance(url, str) else [*wrong, url]:
        with pytest.raises(ConfigurationError, match="endpoint") as caught:
            options(endpoint=endpoint)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value)), endpoint


def test_only_options_that_differ_from_the_defaults_are_shown() -> None:
    """Display data hold the endpoint and whatever is not the default."""
    assert options().shown() == {"endpoint": URL}
    assert options(timeout_seconds=20.0).shown() == {"endpoint": URL, "timeout_seconds": "20.0"}


@pytest.mark.parametrize("value", [np.array([0.5, 0.5]), {"y": np.zeros((2, 2))}, 0.0, [], "none"])
def test_any_default_value_is_in_the_display_data(value: Any) -> None:
    """An array among them, whose comparison has no single result, and values that are false."""
    assert options(default_value=value).shown() == {"endpoint": URL, "default_value": str(value)}
