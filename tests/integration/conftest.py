"""One real Triton with every model of the catalogue, started once in each test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from tests.support.models import write_models
from tests.support.pipelines import release_the_last_model


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A server shared by all tests: a test that kills, reloads or overloads a server starts its own."""
    repository: Path = write_models(tmp_path_factory.mktemp("models"))
    # A hanging model never finishes its request, so waiting for it on shutdown would be pointless.
    with LocalTriton(
        repository, grpc=True, metrics=True, stop_timeout_seconds=0.1, startup_timeout_seconds=300
    ) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def no_model_of_another_file() -> None:
    """Beam keeps the last model of a process alive, with a session; tests count those."""
    release_the_last_model()
