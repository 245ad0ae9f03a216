"""Limits that cannot work are rejected where they are written."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig


def test_defaults_are_those_of_the_options_table() -> None:
    """The defaults are those that the documentation's options table names."""
    config = ConnectionPoolConfig()
    assert (config.max_idle, config.max_total, config.max_per_host) == (20, 100, None)
    assert (config.keep_alive_seconds, config.max_age_seconds, config.connect_timeout_seconds) == (
        300,
        30,
        10,
    )
    assert config.reuse_enabled and not config.monitoring_enabled


@pytest.mark.parametrize(
    "name",
    [
        "max_idle",
        "max_total",
        "max_per_host",
        "keep_alive_seconds",
        "max_age_seconds",
        "connect_timeout_seconds",
    ],
)
@pytest.mark.parametrize("value", [0, -1, "5", True, float("nan")])
def test_values_that_are_not_positive_are_rejected(name: str, value: Any) -> None:
    """The error contains name and value."""
    with pytest.raises(ConfigurationError, match=name) as caught:
        ConnectionPoolConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "both"),
    [
        ({"max_idle": 7, "max_total": 6}, ["max_idle=7", "max_total=6"]),
        ({"max_per_host": 9, "max_total": 8, "max_idle": 8}, ["max_per_host=9", "max_total=8"]),
        ({"max_total": 5}, ["max_idle=20", "max_total=5"]),
    ],
)
def test_contradicting_limits_are_both_named(options: dict[str, int], both: list[str]) -> None:
    """The error names both limits that cannot hold together."""
    with pytest.raises(ConfigurationError) as caught:
        ConnectionPoolConfig(**options)  # type: ignore[arg-type] # mypy can't see the names
    assert all(part in str(caught.value) for part in both)


@pytest.mark.parametrize(
    "options",
    [
        {"client_key": "key.pem"},
        {"verify": False, "ca_bundle": "ca.pem"},
        {"verify": "ca.pem"},
        {"server_hostname": ""},
        {"server_hostname": 5},
        {"server_hostname": "https://triton"},
        {"server_hostname": "triton:8443"},
    ],
)
def test_contradicting_tls_options_are_rejected(options: dict[str, Any]) -> None:
    """A key alone, a CA bundle without verification, a path as ``verify``, a URL as a name."""
    with pytest.raises(ConfigurationError):
        TlsConfig(**options)


@pytest.mark.parametrize("name", ["triton.internal", "triton", "10.0.0.1", "::1", "a_b.example."])
def test_server_hostname_is_a_name_or_an_address(name: str) -> None:
    """As certificates hold them."""
    assert TlsConfig(server_hostname=name).server_hostname == name


def test_configurations_are_values() -> None:
    """They are equal, hashable, and the same after pickling."""
    config = ConnectionPoolConfig(max_total=50)
    assert {config, ConnectionPoolConfig.from_options({"max_total": 50})} == {config}
    assert pickle.loads(pickle.dumps(config)) == config
