"""Redirects: which are followed, where they lead, and what they take along."""

from __future__ import annotations

import pytest

from beam_triton.transport.origin import EndpointUrl, Origin
from beam_triton.transport.proxies import Proxy
from beam_triton.transport.redirects import Redirect, redirected

HEADERS = {"X-Key": "s3cret", "Host": "m.example", "Accept-Encoding": "gzip"}
PATH = "/v2/models/m/infer"


def follow(endpoint: str, location: str, given_host: str | None = None) -> Redirect | str:
    return redirected(EndpointUrl.parse(endpoint), PATH, "POST", 308, location, given_host)


@pytest.mark.parametrize(
    ("method", "statuses"), [("POST", {307, 308}), ("GET", {301, 302, 303, 307, 308}), ("HEAD", {301, 307})]
)
def test_a_body_is_kept_by_two_statuses_only(method: str, statuses: set[int]) -> None:
    """The others would make a GET of a request."""
    url = EndpointUrl.parse("http://triton")
    for status in (200, 300, 301, 302, 303, 304, 305, 307, 308, 404):
        step = redirected(url, PATH, method, status, "/x", None)
        if status in statuses:
            assert isinstance(step, Redirect)
        elif method != "HEAD":
            assert step == ""
    assert redirected(url, PATH, method, 308, None, None) == ""


@pytest.mark.parametrize(
    ("endpoint", "location", "leads_to"),
    [
        ("http://triton:8000", "/other/v2?a=b#c", "http://triton:8000/other/v2?a=b"),
        ("http://triton:8000/team", "infer/", "http://triton:8000/team/v2/models/m/infer/"),
        ("http://triton:8000", "//two:9000/x", "http://two:9000/x"),
        ("http://triton", "https://triton/x y", "https://triton:443/x%20y"),
        ("http://triton", "HTTPS://Triton:8443", "https://triton:8443/"),
        ("http://[::1]:8000", "/x", "http://[::1]:8000/x"),
        ("http://triton", "http://user:pw@two/x", "http://two:80/x"),
        ("http+unix://%2Fa.sock", "/x", "http+unix://%2Fa.sock/x"),
        ("http+unix://%2Fa.sock", "http://localhost/x", "http+unix://%2Fa.sock/x"),
        ("https://triton/team", "%2Fx%20", "https://triton:443/team/v2/models/m/%2Fx%20"),
    ],
)
def test_locations_are_resolved(endpoint: str, location: str, leads_to: str) -> None:
    """Against the whole URL of the request; fragments and credentials are left out."""
    step = follow(endpoint, location)
    assert isinstance(step, Redirect)
    assert f"{step.url}{step.path}" == leads_to


@pytest.mark.parametrize(
    ("endpoint", "location", "reason"),
    [
        ("https://triton", "http://triton/x", "from https to http"),
        ("http://triton", "ftp://triton/x", "no http or https URL"),
        ("http://triton", "http://triton:port/x", "no http or https URL"),
        ("http://triton", "http://[::1/x", "no http or https URL"),
        ("http://triton", "http+unix://%2Fvar%2Frun%2Fdocker.sock/x", "unix socket"),
        ("http+unix://%2Fa.sock", "http://triton/x", "unix socket"),
    ],
)
def test_some_redirects_are_not_followed(endpoint: str, location: str, reason: str) -> None:
    """To where a request would be read by others, or where no server of the protocol can be."""
    step = follow(endpoint, location)
    assert isinstance(step, str) and reason in step


@pytest.mark.parametrize(
    ("endpoint", "location", "keeps"),
    [
        ("http://u:pw@triton:8000", "http://triton:8000/x", True),
        ("http://u:pw@triton", "https://triton/x", True),
        ("http://u:pw@triton:80", "http://triton/x", True),
        ("http://u:pw@triton:8000", "http://triton:8001/x", False),
        ("http://u:pw@triton:8000", "https://triton:8443/x", False),
        ("http://u:pw@triton", "http://two/x", False),
        ("http://u:pw@triton", "http://u:pw@two/x", False),
        ("http://u:pw@triton", "https://triton.evil.example/x", False),
    ],
)
def test_credentials_stay_with_their_server(endpoint: str, location: str, keeps: bool) -> None:
    """Any header may hold one; the library's own go along."""
    step = follow(endpoint, location)
    assert isinstance(step, Redirect)
    sent = step.url.authorize(HEADERS)
    assert ("X-Key" in sent, "Authorization" in sent, "Host" in sent) == (keeps, keeps, keeps)
    assert sent["Accept-Encoding"] == "gzip"


@pytest.mark.parametrize(
    ("location", "origin", "keeps"),
    [
        ("http://m.example/x", Origin("http", "10.0.0.7", 8080), True),
        ("http://m.example:8080/x", Origin("http", "10.0.0.7", 8080), True),
        ("https://m.example/x", Origin("https", "10.0.0.7", 443), False),
        ("https://m.example:8443/x", Origin("https", "10.0.0.7", 8443), False),
    ],
)
def test_redirect_to_the_given_host_stays_at_the_server(location: str, origin: Origin, keeps: bool) -> None:
    """That name may be in no DNS; it is sent on as Host."""
    step = follow("http://10.0.0.7:8080", location, "m.example")
    assert isinstance(step, Redirect)
    sent = step.url.authorize(HEADERS)
    assert (step.url.origin, "X-Key" in sent, sent["Host"]) == (origin, keeps, "m.example")
    through_default_ports = follow("http://10.0.0.7", "https://m.example/x", "m.example")
    assert isinstance(through_default_ports, Redirect)
    assert "X-Key" in through_default_ports.url.authorize(HEADERS)


def test_chosen_address_is_kept_and_a_proxy_chosen_anew() -> None:
    """The address belongs to the host, the proxy to the scheme."""
    url = EndpointUrl.parse("http://triton").at("10.0.0.7")
    proxied = url._replace(origin=url.origin._replace(proxy=Proxy("p", 1)))
    step = redirected(proxied, PATH, "POST", 308, "https://triton/x", None)
    assert isinstance(step, Redirect)
    assert (step.url.origin.address, step.url.origin.proxy) == ("10.0.0.7", None)
    other = redirected(proxied, PATH, "POST", 308, "https://two/x", None)
    assert isinstance(other, Redirect) and other.url.origin == Origin("https", "two", 443)
