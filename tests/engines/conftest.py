"""The tools that engines need, and a real Triton whose models are as slow as the tests need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import DirectRunner
from engines.install import all_engines
from engines.jobs import accuracy, score_digits
from engines.served import write_repository
from engines.tools import MissingToolsError


@pytest.fixture(scope="session", autouse=True)
def engines() -> None:
    """Everything is installed; where a tool is missing the run ends here, with one line that names it."""
    try:
        all_engines()
    except MissingToolsError as error:
        pytest.exit(f"error: {error}", returncode=1)


@pytest.fixture(scope="session")
def model_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def triton(model_repository: Path) -> Iterator[LocalTriton]:
    """A server that tests share; one that kills it starts its own."""
    with LocalTriton(model_repository, stop_timeout_seconds=2) as server:
        yield server


@pytest.fixture(scope="session")
def digits(triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """What the DirectRunner makes of the digits: every engine has to come to the same."""
    folder = tmp_path_factory.mktemp("direct")
    with DirectRunner(folder) as engine:
        results = score_digits(engine, triton.endpoint, folder / "results.jsonl")
    assert len(results) == 898
    assert accuracy(results) >= 0.95
    return results
