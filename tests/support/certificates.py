"""New certificates for tests: a CA, good and bad ones for a server, and ones for clients."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import trustme


@dataclass(frozen=True)
class CertificateFiles:
    """PEM files of a certificate with its chain, and of its private key."""

    certificate: Path
    key: Path


class Certificates:
    """Certificates in ``folder`` for a server named ``localhost`` and 127.0.0.1, and for its clients.

    ``stranger`` is a client certificate from ``stranger_ca``, a CA that no server trusts.
    """

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA(organization_name="beam_triton tests")
        stranger = trustme.CA(organization_name="beam_triton strangers")
        yesterday = datetime.now(timezone.utc) - timedelta(days=1)
        names = ("localhost", "127.0.0.1")
        self.ca = folder / "ca.pem"
        self.stranger_ca = folder / "stranger_ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        stranger.cert_pem.write_to_path(str(self.stranger_ca))
        self.good = _write(folder, "good", authority.issue_cert(*names))
        self.expired = _write(
            folder,
            "expired",
            authority.issue_cert(*names, not_before=yesterday - timedelta(days=30), not_after=yesterday),
        )
        self.wrong_host = _write(folder, "wrong_host", authority.issue_cert("elsewhere.example"))
        self.client = _write(folder, "client", authority.issue_cert("client.example"))
        self.stranger = _write(folder, "stranger", stranger.issue_cert("client.example"))


def _write(folder: Path, name: str, issued: trustme.LeafCert) -> CertificateFiles:
    files = CertificateFiles(folder / f"{name}.pem", folder / f"{name}.key")
    for index, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(files.certificate), append=index > 0)
    issued.private_key_pem.write_to_path(str(files.key))
    return files
