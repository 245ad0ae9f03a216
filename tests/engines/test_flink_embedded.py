"""Flink inside the job server's process, with the DoFns in the process that submits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from engines import FlinkJobServer
from engines.checks import check_promises
from engines.findings import record
from engines.jobs import score_digits
from engines.observation import observe

ELEMENTS = 20_000


@pytest.fixture(scope="module")
def flink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkJobServer]:
    with FlinkJobServer(tmp_path_factory.mktemp("flink")) as server:
        yield server


def test_score_files_gives_the_same_results(
    flink: FlinkJobServer, triton: LocalTriton, digits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """The main job, unchanged, comes to what the DirectRunner comes to."""
    assert score_digits(flink, triton.endpoint, tmp_path / "results.jsonl") == digits


def test_processes_and_connections(flink: FlinkJobServer, triton: LocalTriton, tmp_path: Path) -> None:
    """Two DoFns of each of two models share one session, whose connections stay within max_total."""
    observation = observe(flink, triton.endpoint, tmp_path, elements=ELEMENTS)
    check_promises(observation, elements=ELEMENTS)
    assert observation.dofns.instances == 4
    record("Flink, embedded", observation.facts())
