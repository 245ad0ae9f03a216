"""A real nginx in front of a real Triton: certificates, idle connections, restarts and reloads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_triton import TritonClient, TritonInference
from beam_triton.errors import InferenceError, TlsError
from beam_triton.testing import LocalTriton
from tests.support.certificates import Certificates
from tests.support.models import throwaway_triton, write_models
from tests.support.nginx import Nginx
from tests.support.numbered_run import MODEL, Progress, kill_and_restart, repeat_during_run, run_numbered

pytestmark = pytest.mark.nginx

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def port_of(triton: LocalTriton) -> int:
    return int(triton.endpoint.rpartition(":")[2])


def echoes(endpoint: str, tls: Mapping[str, Any]) -> bool:
    quick_pool = {"connect_timeout_seconds": 4.0}
    with TritonClient(endpoint, tls=tls, timeout_seconds=5.0, pool=quick_pool) as client:
        return bool(np.array_equal(client.infer(MODEL, {"x": X}).outputs["y"], X))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_valid_certificate_is_trusted(triton: LocalTriton, certificates: Certificates, host: str) -> None:
    """With the authority's bundle the server is trusted, by host name and by address."""
    with Nginx([port_of(triton)], certificate=certificates.good) as nginx:
        endpoint = f"https://{host}:{nginx.port}"
        assert echoes(endpoint, {"ca_bundle": str(certificates.ca)})


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [("expired", r"expired"), ("wrong_host", r"mismatch|doesn't match|not valid for")],
)
def test_invalid_certificate_raises_tls_error_at_once(
    triton: LocalTriton, certificates: Certificates, certificate: str, reason: str
) -> None:
    """``TlsError`` says what is wrong with the certificate; nothing is retried."""
    with Nginx([port_of(triton)], certificate=getattr(certificates, certificate)) as nginx:
        started = time.monotonic()
        with pytest.raises(TlsError, match=reason):
            echoes(nginx.endpoint, {"ca_bundle": str(certificates.ca)})
        assert time.monotonic() - started <= 1.0


def test_unknown_authority_is_refused_unless_verification_is_off(
    triton: LocalTriton, certificates: Certificates
) -> None:
    """Without the bundle the certificate is refused; ``verify=False`` accepts any certificate."""
    with Nginx([port_of(triton)], certificate=certificates.good) as nginx:
        with pytest.raises(TlsError, match=r"(?i)certificate verify failed|unable to get local issuer"):
            echoes(nginx.endpoint, {})
        with pytest.raises(TlsError):
            echoes(nginx.endpoint, {"ca_bundle": str(certificates.stranger_ca)})
        assert echoes(nginx.endpoint, {"verify": False})
    with Nginx([port_of(triton)], certificate=certificates.expired) as nginx:
        assert echoes(nginx.endpoint, {"verify": False})


def test_disabled_verification_logs_a_warning(
    triton: LocalTriton, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """``verify=False`` logs a warning."""
    with Nginx([port_of(triton)], certificate=certificates.good) as nginx:
        echoes(nginx.endpoint, {"verify": False})
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("verif" in message for message in warnings), warnings


def test_client_certificate_is_verified_by_the_server(
    triton: LocalTriton, certificates: Certificates
) -> None:
    """The client's own certificate is accepted; the error for a missing or foreign one gives the reason."""
    nginx = Nginx([port_of(triton)], certificate=certificates.good, client_ca=certificates.ca)
    ca = {"ca_bundle": str(certificates.ca)}
    own = {
        "client_certificate": str(certificates.client.certificate),
        "client_key": str(certificates.client.key),
    }
    foreign = {
        "client_certificate": str(certificates.stranger.certificate),
        "client_key": str(certificates.stranger.key),
    }
    with nginx:
        assert echoes(nginx.endpoint, ca | own)
        for wrong in (ca, ca | foreign):
            with pytest.raises((InferenceError, TlsError), match=r"(?i)certificate"):
                echoes(nginx.endpoint, wrong)


def test_large_tensors_pass_through_tls_unchanged(triton: LocalTriton, certificates: Certificates) -> None:
    """Megabytes go both ways through TLS records and nginx's buffers."""
    large = np.random.default_rng(1).random((8, 300_000), np.float32)
    with (
        Nginx([port_of(triton)], certificate=certificates.good) as nginx,
        TritonClient(nginx.endpoint, tls={"ca_bundle": str(certificates.ca)}) as client,
    ):
        assert np.array_equal(client.infer(MODEL, {"x": large}).outputs["y"], large)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connections_closed_while_idle_cause_no_errors(
    triton: LocalTriton, certificates: Certificates, scheme: str
) -> None:
    """Connections that nginx closes while they are idle, or just as they are used, are never an error."""
    random = np.random.default_rng(2)
    nginx = Nginx(
        [port_of(triton)],
        certificate=certificates.good if scheme == "https" else None,
        keep_alive_seconds=0.1,
    )
    with (
        nginx,
        TritonClient(
            nginx.endpoint, tls={"ca_bundle": str(certificates.ca)} if scheme == "https" else {}
        ) as client,
        ThreadPoolExecutor(6) as threads,
    ):

        def infer_after(pause_seconds: float) -> bool:
            time.sleep(pause_seconds)
            return bool(np.array_equal(client.infer(MODEL, {"x": X}).outputs["y"], X))

        # Pauses around nginx's idle timeout, so that its close and the next request often cross.
        pauses = random.uniform(0.09, 0.13, 240)
        assert all(threads.map(infer_after, pauses))


def test_announced_connection_close_costs_no_retry(triton: LocalTriton) -> None:
    """A proxy that closes each connection after five requests, announced, costs only new connections."""
    with (
        Nginx([port_of(triton)], requests_per_connection=5) as nginx,
        TritonClient(nginx.endpoint, retry={"max_retries": 0}) as client,
    ):
        for _ in range(50):
            assert np.array_equal(client.infer(MODEL, {"x": X}).outputs["y"], X)


def test_server_restart_behind_nginx_loses_nothing(tmp_path: Path) -> None:
    """nginx's own 502s and 504s during the restart are waited out."""
    elements = 50_000
    with (
        throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server,
        Nginx([port_of(server)], read_timeout_seconds=2.0) as nginx,
    ):
        run = run_numbered(
            TritonInference(nginx.endpoint, MODEL, batching={"max_batch_size": 64}),
            elements,
            meanwhile=repeat_during_run(2, elements, kill_and_restart(server)),
        )
    assert run.counters["retries"] > 0
    assert run.counters.get("failures", 0) == 0


def run_over_tls(
    nginx: Nginx, certificates: Certificates, elements: int, disturb: Callable[[], None]
) -> None:
    """Asserts that all elements come out once although ``disturb`` happens twice during the run."""
    run = run_numbered(
        TritonInference(
            nginx.endpoint, MODEL, tls={"ca_bundle": str(certificates.ca)}, batching={"max_batch_size": 64}
        ),
        elements,
        meanwhile=repeat_during_run(2, elements, disturb),
    )
    assert run.counters["retries"] > 0
    assert run.counters.get("failures", 0) == 0


def test_server_killed_behind_tls_loses_nothing(tmp_path: Path, certificates: Certificates) -> None:
    """nginx returns 502 over TLS while Triton, killed with ``kill -9``, is down and restarts."""
    with (
        throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server,
        Nginx([port_of(server)], certificate=certificates.good, access_log=True) as nginx,
    ):
        run_over_tls(nginx, certificates, 50_000, kill_and_restart(server))
        assert nginx.statuses()[502] > 0


def test_server_frozen_behind_tls_loses_nothing(tmp_path: Path, certificates: Certificates) -> None:
    """nginx returns 504 over TLS for a Triton that is stopped for longer than nginx waits, then continues."""
    with (
        throwaway_triton(write_models(tmp_path / "models", [MODEL])) as server,
        Nginx(
            [port_of(server)], certificate=certificates.good, read_timeout_seconds=0.5, access_log=True
        ) as nginx,
    ):

        def freeze() -> None:
            pid = server.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(1.5)
            finally:
                os.kill(pid, signal.SIGCONT)

        run_over_tls(nginx, certificates, 50_000, freeze)
        assert nginx.statuses()[504] > 0


def test_proxy_maintenance_behind_tls_loses_nothing(triton: LocalTriton, certificates: Certificates) -> None:
    """nginx returns 503 over TLS for a second, as during maintenance; reloads begin and end it."""
    with Nginx([port_of(triton)], certificate=certificates.good, access_log=True) as nginx:

        def go_into_maintenance() -> None:
            nginx.answer_always(503)
            time.sleep(1.0)
            nginx.answer_always(None)

        run_over_tls(nginx, certificates, 50_000, go_into_maintenance)
        assert nginx.statuses()[503] > 0


def test_nginx_reloads_lose_nothing(triton: LocalTriton) -> None:
    """Five reloads under load: old workers drain, and no element is lost or repeated."""
    elements = 100_000
    with Nginx([port_of(triton)]) as nginx:
        run_numbered(
            # Small requests, few in flight: a faster run would end before its fifth reload.
            TritonInference(nginx.endpoint, MODEL, batching={"max_batch_size": 8}, max_concurrent_requests=4),
            elements,
            meanwhile=repeat_during_run(5, elements, nginx.reload),
        )


def test_switching_nginx_to_another_server_loses_nothing(triton: LocalTriton, tmp_path: Path) -> None:
    """A deployment: nginx is switched to a new server and the old one is stopped in mid-run."""
    elements = 50_000
    with (
        throwaway_triton(write_models(tmp_path / "models", [MODEL])) as old,
        Nginx([port_of(old)]) as nginx,
    ):

        def meanwhile(progress: Progress) -> None:
            assert progress.reached(elements // 3)
            nginx.reload([port_of(triton)])
            old.stop()

        run = run_numbered(
            TritonInference(nginx.endpoint, MODEL, batching={"max_batch_size": 64}),
            elements,
            meanwhile=meanwhile,
        )
    assert run.counters.get("failures", 0) == 0
