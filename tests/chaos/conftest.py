"""Fixtures of the chaos tests: a Triton that no test disturbs, and certificates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from beam_triton.testing import LocalTriton
from tests.support import sockets
from tests.support.certificates import Certificates
from tests.support.models import write_models


@pytest.fixture(scope="package")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A server that no test kills or stops; at the end no connection to it is left."""
    folder = write_models(tmp_path_factory.mktemp("models"), ["echo_variable", "rejecting", "raising"])
    with LocalTriton(folder) as server:
        yield server
        port = int(server.endpoint.rpartition(":")[2])
        assert sockets.settles(lambda: sockets.established(port), 0) == 0
        # Triton 2.51 uses its whole exit timeout after batches that made a model raise an exception.
        server.kill()


@pytest.fixture(scope="package")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))
