"""A check that the engines are installed, a Triton with slow models, and the digits to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import DirectRunner
from engines.digits_job import accuracy, score_digits
from engines.install import NotInstalledError, require_all
from engines.tools import MissingToolsError
from tests.engines.numbers_job import write_repository


@pytest.fixture(scope="session", autouse=True)
def engines() -> None:
    """The engines are installed; otherwise the run ends with one line that says what is missing."""
    try:
        require_all()
    except (MissingToolsError, NotInstalledError) as error:
        pytest.exit(f"error: {error}", returncode=1)


@pytest.fixture(scope="session")
def model_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def triton(model_repository: Path) -> Iterator[LocalTriton]:
    """A server that tests share; a test that kills a server starts its own."""
    with LocalTriton(model_repository, stop_timeout_seconds=2) as server:
        yield server


@pytest.fixture(scope="session")
def digits(triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """The DirectRunner's results for the digits; every engine has to give the same."""
    folder = tmp_path_factory.mktemp("direct")
    with DirectRunner(folder) as engine:
        results = score_digits(engine, triton.endpoint, folder / "results.jsonl")
    assert len(results) == 898
    assert accuracy(results) >= 0.95
    return results
