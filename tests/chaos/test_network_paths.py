"""Ways to a real Triton: forward proxies, and fronts that route by the host's name."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from beam_triton import TritonClient, TritonInference
from beam_triton.errors import ProxyError, TlsError
from beam_triton.testing import LocalTriton
from tests.chaos.test_behind_nginx import X, port_of
from tests.support.certificates import Certificates
from tests.support.models import throwaway_triton, write_models
from tests.support.nginx import Nginx
from tests.support.numbered_run import MODEL, kill_and_restart, repeat_during_run, run_numbered
from tests.support.tinyproxy import Tinyproxy

pytestmark = [pytest.mark.nginx, pytest.mark.tinyproxy]


def test_tls_goes_through_a_tunnel(
    triton: LocalTriton, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One CONNECT a connection, whatever the number of requests; the proxy sees none of them."""
    tls = {"ca_bundle": str(certificates.ca), "server_hostname": "127.0.0.1"}
    with Nginx([port_of(triton)], certificate=certificates.good) as nginx, Tinyproxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        # The environment's proxies are not for loopback addresses.
        endpoint = nginx.endpoint.replace("127.0.0.1", "0.0.0.0")
        with TritonClient(endpoint, tls=tls) as client:
            # After 16 answers the server is asked for its statistics, on another connection.
            for _ in range(15):
                assert np.array_equal(client.infer(MODEL, {"x": X}).outputs["y"], X)
        (line,) = proxy.requests()
        assert line == f"CONNECT 0.0.0.0:{nginx.port} HTTP/1.1"
        with (
            TritonClient(endpoint) as client,
            pytest.raises(TlsError, match=r"through the proxy .* refused"),
        ):
            client.infer(MODEL, {"x": X})


def test_unix_socket_of_nginx_is_an_endpoint(triton: LocalTriton, tmp_path: Path) -> None:
    """A front on the worker's own machine, such as a sidecar."""
    path = tmp_path / "nginx.sock"
    with (
        Nginx([port_of(triton)], listen=f"unix:{path}"),
        TritonClient(f"http+unix://{quote(str(path), safe='')}") as client,
    ):
        large = np.random.default_rng(1).random((8, 300_000), np.float32)
        assert np.array_equal(client.infer(MODEL, {"x": large}).outputs["y"], large)


def test_ingress_that_redirects_to_tls_by_name(triton: LocalTriton, certificates: Certificates) -> None:
    """As one reached by its address, for a service whose name is in no DNS."""
    name = "elsewhere.example"
    with (
        Nginx([port_of(triton)], certificate=certificates.wrong_host) as secure,
        Nginx([1], redirects_to=f"https://{name}:{secure.port}") as plain,
    ):
        run = run_numbered(
            TritonInference(
                plain.endpoint,
                MODEL,
                headers={"Host": name},
                tls={"ca_bundle": str(certificates.ca), "server_hostname": name},
            ),
            5_000,
        )
    assert run.counters.get("failures", 0) == 0


def test_refused_tunnel_fails_at_once(triton: LocalTriton, certificates: Certificates) -> None:
    """It is the proxy's rule, and no retry changes it."""
    with (
        Nginx([port_of(triton)], certificate=certificates.good) as nginx,
        Tinyproxy(allows_tunnels=False) as proxy,
        TritonClient(nginx.endpoint, proxies={"https": proxy.url}) as client,
        pytest.raises(ProxyError, match=f"{proxy.url} refuses to connect to {nginx.endpoint}"),
    ):
        client.infer(MODEL, {"x": X})


def test_server_killed_behind_a_forward_proxy_loses_nothing(tmp_path: Path) -> None:
    """tinyproxy answers 500 while Triton, killed with ``kill -9``, is down and restarts."""
    with throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server, Tinyproxy() as proxy:
        run = run_numbered(
            TritonInference(
                server.endpoint, MODEL, proxies={"http": proxy.url}, batching={"max_batch_size": 64}
            ),
            20_000,
            meanwhile=repeat_during_run(1, 20_000, kill_and_restart(server)),
        )
        assert len(proxy.requests()) > 300
    assert run.counters["retries"] > 0
    assert run.counters.get("failures", 0) == 0
