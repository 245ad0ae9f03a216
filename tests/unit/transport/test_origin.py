"""Parsing of endpoints, and passwords kept out of messages."""

from __future__ import annotations

import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.transport.origin import EndpointUrl, Origin


@pytest.mark.parametrize(
    ("url", "origin", "prefix", "host_header"),
    [
        ("http://triton:8000", Origin("http", "triton", 8000), "", "triton:8000"),
        ("HTTP://Triton", Origin("http", "triton", 80), "", "triton"),
        ("https://triton/", Origin("https", "triton", 443), "", "triton"),
        ("https://triton:443", Origin("https", "triton", 443), "", "triton"),
        ("https://triton:80", Origin("https", "triton", 80), "", "triton:80"),
        ("http://gateway/team/a/", Origin("http", "gateway", 80), "/team/a", "gateway"),
        ("http://gateway/team/v2", Origin("http", "gateway", 80), "/team", "gateway"),
        ("http://gateway/v2/models/", Origin("http", "gateway", 80), "", "gateway"),
        ("http://[::1]:8000", Origin("http", "::1", 8000), "", "[::1]:8000"),
        ("https://[2001:DB8::7]", Origin("https", "2001:db8::7", 443), "", "[2001:db8::7]"),
        ("http://[fe80::1%25eth0]:8000", Origin("http", "fe80::1%eth0", 8000), "", "[fe80::1]:8000"),
        ("http+unix://%2Fvar%2FRun%2Ft.sock", Origin("http+unix", "/var/Run/t.sock", 0), "", "localhost"),
        ("HTTP+unix://%2Ft%3A1%20b/team/v2", Origin("http+unix", "/t:1 b", 0), "/team", "localhost"),
        ("  http://127.0.0.1:8000\n", Origin("http", "127.0.0.1", 8000), "", "127.0.0.1:8000"),
    ],
)
def test_endpoints_are_parsed(url: str, origin: Origin, prefix: str, host_header: str) -> None:
    """Scheme, host, port and prefix, with the default ports of the protocols."""
    endpoint = EndpointUrl.parse(url)
    assert (endpoint.origin, endpoint.path_prefix, endpoint.host_header) == (origin, prefix, host_header)
    assert EndpointUrl.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("", "http://host:8000"),
        (8000, "int"),
        (None, "NoneType"),
        ("triton:8000", "did you mean http://triton:8000"),
        ("triton", "scheme is missing"),
        ("//triton:8000", "did you mean http://triton:8000"),
        ("grpc://triton:8001", "HTTP port"),
        ("ftp://triton", "http or https"),
        ("http://", "http or https"),
        ("http://triton:port", "port"),
        ("http://triton:70000", "port"),
        ("http://[::1", "host"),
        ("http+unix:///var/run/triton.sock", "http+unix://%2Fpath%2Fto.sock"),
        ("http+unix://triton.sock", "http+unix://%2Fpath%2Fto.sock"),
        ("http+unix://%2Ftriton.sock:8000", "http+unix://%2Fpath%2Fto.sock"),
        ("http://triton?x=1", "query"),
        ("http://triton#part", "fragment"),
        ("http://tri ton", "percent-encode"),
        ("http://triton/m\u00f6dels", "percent-encode"),
    ],
)
def test_invalid_endpoints_are_rejected_with_a_hint(url: object, hint: str) -> None:
    """The error says what to write instead."""
    with pytest.raises(ConfigurationError) as caught:
        EndpointUrl.parse(url)  # type: ignore[arg-type] # what a user may give
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@triton:port",
        "http://user:s3cret@triton:70000",
        "http://user:s3cret/x@triton:8000",
        "http://user:s3cret?x@triton:8000",
        "http://user:s3cret@triton?token=s3cret",
        "http://user:s3cret@tri ton",
        "ftp://user:s3cret@triton",
        "user:s3cret@triton:8000",
        "http://user:s3cret@[::1",
        "http://user:s3cret@triton\u2100",
        b"http://user:s3cret@triton",
        ["http://user:s3cret@triton"],
    ],
)
def test_errors_do_not_show_the_password(url: object) -> None:
    """Whatever is wrong with an endpoint, its password is not shown."""
    with pytest.raises(ConfigurationError) as caught:
        EndpointUrl.parse(url)  # type: ignore[arg-type] # what a user may give
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_url_credentials_become_an_authorization_header() -> None:
    """User name and password, percent-decoded, are sent as basic authorization, and shown nowhere."""
    endpoint = EndpointUrl.parse("http://us%40er:p%3Aw@triton:8000")
    assert endpoint.basic_authorization == "Basic dXNAZXI6cDp3"
    assert "p:w" not in repr(endpoint) + str(endpoint) and "dXN" not in repr(endpoint)


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_authorization_header_overrides_url_credentials(name: str) -> None:
    """In any case of letters; other headers are kept beside the one from the URL."""
    endpoint = EndpointUrl.parse("http://user:pw@triton:8000")
    assert endpoint.authorize({name: "Bearer x"}) == {name: "Bearer x"}
    made = {"X-Tenant": "a", "Authorization": endpoint.basic_authorization}
    assert endpoint.authorize({"X-Tenant": "a"}) == made
    assert EndpointUrl.parse("http://triton:8000").authorize({"X-Tenant": "a"}) == {"X-Tenant": "a"}
