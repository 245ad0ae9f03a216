"""Which proxy a URL goes through: what requests says, and what an option says before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import requests
from requests.utils import select_proxy

from beam_triton.errors import ConfigurationError
from beam_triton.transport import proxies as module
from beam_triton.transport.config import NetworkConfig
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.proxies import Proxy, choose_proxy

NAMES = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")]
URLS = [
    "http://triton:8000",
    "https://triton",
    "http://10.0.0.7:8000",
    "http://[2001:db8::7]:8000",
    "https://a.b.example",
]
LOOPBACK = ["http://localhost:8000", "https://LOCALHOST", "http://127.8.0.1:8000", "http://[::1]:8000"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One that names no proxies, and a log that has said nothing yet."""
    for name in (*NAMES, *map(str.upper, NAMES), "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    module._log_once.cache_clear()
    return monkeypatch


def proxy_of_requests(url: str) -> str | None:
    settings = requests.Session().merge_environment_settings(url, {}, None, None, None)
    return select_proxy(url, settings["proxies"])


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HTTP_PROXY": "http://p:1"},
        {"http_proxy": "http://p:1", "HTTP_PROXY": "http://q:2"},
        {"HTTPS_PROXY": "http://p:1"},
        {"ALL_PROXY": "http://p:1", "https_proxy": "http://q:2"},
        {"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"},
        {"http_proxy": "http://p:1", "REQUEST_METHOD": "GET"},
        {"ALL_PROXY": "http://p:1", "NO_PROXY": "triton"},
        {"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.7,2001:db8::7,.example"},
        {"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8, triton:8000"},
        {"ALL_PROXY": "http://p:1", "no_proxy": "b.example", "NO_PROXY": "*"},
        {"ALL_PROXY": "http://p:1", "NO_PROXY": "*"},
    ],
    ids=str,
)
def test_the_environment_means_what_requests_takes_it_for(
    environment: pytest.MonkeyPatch, url: str, variables: dict[str, str]
) -> None:
    """Schemes, cases, CGI scripts, names, networks and ports."""
    for name, value in variables.items():
        environment.setenv(name, value)
    expected = proxy_of_requests(url)
    proxy = choose_proxy(url, {}, trust_env=True)
    assert (None if proxy is None else str(proxy)) == expected
    assert choose_proxy(url, {}, trust_env=False) is None


@pytest.mark.parametrize("url", LOOPBACK)
def test_a_proxy_for_this_machines_own_addresses_has_to_be_given(
    environment: pytest.MonkeyPatch, url: str
) -> None:
    """One of the environment is on another machine, as a rule, and would look for the server there."""
    environment.setenv("ALL_PROXY", "http://p:1")
    assert choose_proxy(url, {}, trust_env=True) is None
    assert str(choose_proxy(url, {"all": "http://q:2"}, trust_env=True)) == "http://q:2"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"http": "env:OTHER_PROXY"}, "http://q:2"),
        ({"all": "http://q:2"}, "http://q:2"),
        ({"http://triton": "http://q:2", "http": "http://r:3"}, "http://q:2"),
        ({"http://other": "http://q:2"}, "http://p:1"),
        ({"https": "http://q:2"}, "http://p:1"),
        ({"http": None}, None),
        ({"http": ""}, None),
        ({"all": "http://q:2", "no_proxy": "triton"}, None),
        ({"no_proxy": "triton"}, None),
        ({"all": "http://q:2", "no_proxy": "other"}, "http://q:2"),
        ({"http": "q"}, "http://q:80"),
    ],
    ids=str,
)
def test_a_given_proxy_comes_before_the_environments(
    environment: pytest.MonkeyPatch, given: Mapping[str, str | None], expected: str | None
) -> None:
    """And so does a given absence of one."""
    environment.setenv("HTTP_PROXY", "http://p:1")
    environment.setenv("OTHER_PROXY", "http://q:2")
    proxy = choose_proxy("http://triton:8000", given, trust_env=True)
    assert (None if proxy is None else str(proxy)) == expected


def test_credentials_are_decoded_and_never_shown() -> None:
    """Percent-encoded as in every URL."""
    proxy = Proxy.parse("user:s3c%40ret@proxy:3128")
    assert proxy.authorization == "Basic dXNlcjpzM2NAcmV0"
    endpoint = EndpointUrl.parse("http://triton:8000")
    endpoint = endpoint._replace(origin=endpoint.origin._replace(proxy=proxy))
    shown = f"{proxy} {proxy!r} {endpoint} {endpoint!r} {endpoint.origin} {endpoint.origin!r}"
    assert "s3c" not in shown and "dXNlc" not in shown and "user" not in shown
    assert str(endpoint) == "http://triton:8000 (through the proxy http://proxy:3128)"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("https://user:s3cret@proxy:3128", "give it as http://host:port"),
        ("socks5://user:s3cret@proxy", "only HTTP proxies"),
        ("http://user:s3cret@proxy:port", "host or port"),
        ("http://user:s3cret@", "http://host:port"),
        ("http://user:s3cret@pro xy", "http://host:port"),
    ],
)
def test_urls_of_no_proxy_are_refused_without_their_credentials(
    environment: pytest.MonkeyPatch, url: str, hint: str
) -> None:
    """Given ones at once, those of the environment on the worker; the error says whose they are."""
    with pytest.raises(ConfigurationError, match=hint) as given:
        NetworkConfig(proxies=(("http", url),))
    environment.setenv("http_proxy", url)
    with pytest.raises(ConfigurationError, match=hint) as named:
        NetworkConfig().routed(EndpointUrl.parse("http://triton:8000"))
    assert "proxies['http']" in str(given.value) and "HTTP_PROXY" in str(named.value)
    assert "s3cret" not in f"{given.value}{named.value}"


@pytest.mark.parametrize("key", ["ftp", "HTTP", "triton", 5, "http://user@host"])
def test_keys_that_select_nothing_are_refused(key: str) -> None:
    """They would be ignored in silence."""
    with pytest.raises(ConfigurationError, match="proxies"):
        NetworkConfig(proxies=((key, "http://p:1"),))


def test_secret_references_are_read_where_requests_are_made(environment: pytest.MonkeyPatch) -> None:
    """Not where the pipeline is built."""
    network = NetworkConfig(proxies=(("http", "env:TEAM_PROXY"), ("https", lambda: "http://q:2")))
    with pytest.raises(ConfigurationError, match="TEAM_PROXY"):
        network.routed(EndpointUrl.parse("http://triton"))
    environment.setenv("TEAM_PROXY", "http://user:s3cret@p:1")
    assert str(network.routed(EndpointUrl.parse("http://triton")).origin.proxy) == "http://p:1"
    assert "env:" not in repr(network) and "s3cret" not in repr(network)


def test_the_log_says_once_which_proxy_is_used(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its credentials."""
    environment.setenv("HTTP_PROXY", "http://user:s3cret@p:1")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            choose_proxy("http://triton:8000", {}, trust_env=True)
    (told,) = caplog.records
    assert "http://triton:8000 goes through the proxy http://p:1 (HTTP_PROXY" in told.getMessage()
    assert "s3cret" not in caplog.text
