"""Flink's own Triton function: what its release has, and that it can be measured beside the library."""

from __future__ import annotations

import math
import re
import zipfile
from dataclasses import astuple
from pathlib import Path

import pytest

from beam_triton.testing import LocalTriton
from benchmarks.cases.case import SMOKE, Case
from benchmarks.cases.flink_function import FLINK_FUNCTION, PROPOSAL
from benchmarks.peers.flink_function import FlinkFunction
from benchmarks.server import ECHO, target
from benchmarks.tables import render_case
from engines import install
from tests.support.models import write_models

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-flink.md"
OPTION_ROW = re.compile(r"^\| (`.+?`) \| (yes|no) \|", re.MULTILINE)


def test_the_page_knows_which_options_are_released() -> None:
    """Those that it says are in the release are the jar's, all of them, and no others."""
    released, others = set[str](), set[str]()
    for names, is_released in OPTION_ROW.findall(PAGE.read_text(encoding="utf-8")):
        (released if is_released == "yes" else others).update(re.findall(r"`([\w-]+)`", names))
    jar = install.flink_function() / f"flink-model-triton-{install.FLINK_FUNCTION}.jar"
    with zipfile.ZipFile(jar) as archive:
        options = archive.read("org/apache/flink/model/triton/TritonOptions.class")
    assert len(released) == 12
    assert {name for name in released | others if _constant(name) in options} == released


def _constant(text: str) -> bytes:
    """A string as a class file holds it."""
    return b"\x01" + len(text).to_bytes(2, "big") + text.encode()


@pytest.mark.parametrize(
    "case", [FLINK_FUNCTION, pytest.param(PROPOSAL, marks=pytest.mark.long)], ids=lambda case: case.name
)
def test_case_measures_and_checks_its_answers(case: Case, triton: LocalTriton) -> None:
    """Every row of every peer comes back as it was sent, and gives figures."""
    result = case.measure(triton, 1, SMOKE)
    assert result.case == case.name
    for peer in ("Flink's function", "beam_triton"):
        assert any(peer in row.name for row in result.rows)
    summaries = [summary for row in result.rows for summary in row.measured.values()]
    assert all(math.isfinite(value) for summary in summaries for value in astuple(summary))
    assert all(figure.text in render_case(result) for figure in result.figures)


def test_a_job_that_fails_gives_no_figure(tmp_path: Path) -> None:
    """The measurement ends with what Flink said: here, that a tensor has another name than the one sent.

    Flink says what it hears of first, which may be that the source finds the task no longer there.
    """
    with (
        LocalTriton(write_models(tmp_path, [ECHO]), grpc=True, stop_timeout_seconds=2) as server,
        pytest.raises(
            AssertionError,
            match=r"Triton inference failed with HTTP 400|Task is not running, but in state FAILED",
        ),
    ):
        FlinkFunction("released").run(target(server, ECHO), 20)
