"""The examples of the documentation's pages run, in the order in which a reader meets them."""

from __future__ import annotations

from pathlib import Path

from beam_triton.testing.ports import free_port
from tests.support.pages import ROOT, run_page

DOCS = ROOT / "docs"


def test_getting_started(tmp_path: Path) -> None:
    """From nothing to dead letters, with a server that the page starts."""
    port = free_port()
    own_port = {"127.0.0.1:8000": f"127.0.0.1:{port}", "--http_port 8000": f"--http_port {port}"}
    assert run_page(DOCS / "getting-started.md", tmp_path, replacements=own_port) == 8
