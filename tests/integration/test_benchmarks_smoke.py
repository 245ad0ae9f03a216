"""Every benchmark case at the smallest scale: its results are right, whatever its times."""

from __future__ import annotations

import math
import os
import re
from dataclasses import astuple
from pathlib import Path
from xml.etree import ElementTree

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import PredictionResult

from beam_triton.testing import LocalTriton
from benchmarks.__main__ import main
from benchmarks.cases import CASES, profile
from benchmarks.cases.case import SMOKE, Case, CaseLeftOut
from benchmarks.cases.fleet import MEASURED_CASE
from benchmarks.cases.throughput import COMPARED_WORK
from benchmarks.charts import draw
from benchmarks.compare import ComparisonError, compare
from benchmarks.peers import BEAM_TRITON, NO_OP
from benchmarks.process import MeasurementError, peak_bytes, reset_peak, resident_bytes, run_in_fresh_process
from benchmarks.results import CaseResult, Curves, Figure, Point, Row, Summary, ratios, read_results
from benchmarks.server import ECHO, target
from benchmarks.tables import render_case, render_figures
from benchmarks.workload import Workload, run_pipeline

_MB = 1_000_000

EXAMPLE = CaseResult(
    "example",
    "An example",
    rows=[
        Row.of("beam_triton", {"elements/s": [3000.0, 1000.0, 2000.0]}),
        Row.of("other", {"elements/s": [500.0]}),
    ],
    figures=[
        Figure.of_rounds("elements/s relative to other", "at least", 2, [6.0, 2.0, 4.0]),
        Figure("memory", "at most", 0.1, 0.2),
    ],
    curves=[
        Curves(
            "example_curve",
            "A curve",
            "bytes an element",
            "elements/s",
            [Point(64, "defaults", 9, True), Point(64, "other", 10), Point(1024, "defaults", 8, True)],
        )
    ],
    notes=["left out: something"],
    chosen="elements/s",
)


# They wait for what happens to servers, at any scale.
_SLOW_CASES = ("situations", "processes", "polite")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, id=each.name, marks=[pytest.mark.long] if each.name in _SLOW_CASES else [])
        for each in CASES
    ],
)
def test_case_measures_and_checks_its_answers(case: Case, triton: LocalTriton, tmp_path: Path) -> None:
    """A case compares answers with what was sent, and gives figures, tables and charts."""
    try:
        result = case.measure(triton, 1, SMOKE)
    except CaseLeftOut as missing:
        pytest.skip(str(missing))
    assert result.case == case.name
    summaries = [summary for row in result.rows for summary in row.measured.values()]
    assert summaries and all(math.isfinite(value) for summary in summaries for value in astuple(summary))
    # Without wrk, some figures have no peer.
    assert result.figures or any(note.startswith("left out: wrk") for note in result.notes)
    assert all(math.isfinite(figure.reached) for figure in result.figures)
    result.write(tmp_path)
    assert [read.case for read in read_results(tmp_path)] == [case.name]
    assert all(figure.text in render_case(result) for figure in result.figures)
    for chart in draw([result], tmp_path):
        ElementTree.parse(chart)


@pytest.mark.long
def test_simulated_fleet_is_near_the_measured_one(triton: LocalTriton) -> None:
    """One process with sixteen instances, for some seconds: the simulation is not off by a fifth."""
    try:
        result = MEASURED_CASE.measure(triton, 1, SMOKE)
    except CaseLeftOut as missing:
        pytest.skip(str(missing))
    (row,) = result.rows
    for quantity in ("rate / best", "p50 / model's time"):
        predicted = row.measured[f"{quantity}, predicted"].median
        assert row.measured[quantity].median == pytest.approx(predicted, rel=0.2), quantity


def test_lost_element_fails_the_measurement(triton: LocalTriton) -> None:
    """A transform drops one element."""
    work = Workload(target(triton, ECHO), 100)
    with pytest.raises(AssertionError, match="elements=99"):
        run_pipeline(beam.Filter(lambda element: element[0] != 7), work)


def test_wrong_result_fails_the_measurement(triton: LocalTriton) -> None:
    """A single answer differs from what was sent."""
    work = Workload(target(triton, ECHO), 100)
    with pytest.raises(AssertionError, match="wrong=1,"):
        run_pipeline(beam.Map(_wrong_at_seven), work)


def test_duplicate_in_place_of_a_lost_element_fails_the_measurement(triton: LocalTriton) -> None:
    """The number of results is right, and one element has two of them."""
    work = Workload(target(triton, ECHO), 100)
    with pytest.raises(AssertionError, match="elements=100, wrong=0, number_sum=4951"):
        run_pipeline(beam.FlatMap(_eight_instead_of_seven), work)


def _wrong_at_seven(element: np.ndarray) -> PredictionResult:
    answer = element + 1 if element[0] == 7 else element
    return PredictionResult(element, {"y": answer})


def _eight_instead_of_seven(element: np.ndarray) -> list[np.ndarray]:
    return {7: [], 8: [element, element]}.get(int(element[0]), [element])


def test_measurement_runs_in_a_fresh_process() -> None:
    """The error of a process that raises or dies gives the reason."""
    assert run_in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(MeasurementError, match="ValueError: invalid literal"):
        run_in_fresh_process(int, "text")
    with pytest.raises(MeasurementError, match="exit code 3"):
        run_in_fresh_process(os._exit, 3)


def test_peak_memory_counts_from_its_reset() -> None:
    """The peak includes memory that is freed by now, and nothing from before the reset."""
    added, later = run_in_fresh_process(_peaks)
    assert added == pytest.approx(100 * _MB, rel=0.1)
    assert later < 10 * _MB


def _peaks() -> tuple[int, int]:
    reset_peak()
    before = resident_bytes()
    block = np.ones(100 * _MB, np.uint8)
    del block
    added = peak_bytes() - before
    reset_peak()
    return added, peak_bytes() - before


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is ten times slower in one round changes no ratio."""
    assert ratios([20, 2, 20], [10, 1, 10]) == [2, 2, 2]


def test_summary_has_median_and_quartiles() -> None:
    """The quartiles are those of the values themselves, and a single value is its own summary."""
    assert Summary.of([5, 1, 2, 4, 3]) == Summary(5, 1, 2, 3, 4, 5)
    assert Summary.of([7]) == Summary(1, 7, 7, 7, 7, 7)


def test_results_survive_json(tmp_path: Path) -> None:
    """A result is the same after it is written and read."""
    EXAMPLE.write(tmp_path)
    (read,) = read_results(tmp_path)
    assert read == EXAMPLE


def test_tables_show_medians_and_mark_missed_figures() -> None:
    """Figures required and reached stand side by side, with quartiles where there are rounds."""
    text = render_case(EXAMPLE)
    assert "| beam_triton |      2,000 |" in text
    assert "| elements/s relative to other |  at least 2 |       4 |    3 to 5 |   yes |" in text
    assert "| memory                       | at most 0.1 |     0.2 |           |    NO |" in text
    assert "left out: something" in text
    assert render_figures([EXAMPLE, EXAMPLE]).count("NO") == 2


def test_same_results_draw_identical_charts(tmp_path: Path) -> None:
    """Byte by byte: only new measurements change the committed charts."""
    first, second = (draw([EXAMPLE], tmp_path / folder) for folder in ("first", "second"))
    assert [path.name for path in first] == [
        "benchmark_example.svg",
        "benchmark_example_curve.svg",
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_command_line_draws_charts_and_rejects_unknown_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error for an unknown case lists the cases that exist."""
    EXAMPLE.write(tmp_path)
    assert main(["charts", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "benchmark_example.svg").exists()
    with pytest.raises(SystemExit):
        main(["no_such_case"])
    assert "there are: remote_like" in capsys.readouterr().err


def test_compare_runs_both_checkouts(triton: LocalTriton, tmp_path: Path) -> None:
    """Each round runs the workload once on each checkout; a folder without the library is rejected."""
    checkout = Path(__file__).parents[2]
    other = tmp_path / "other"
    other.mkdir()
    works = {ECHO: COMPARED_WORK[ECHO](triton, SMOKE)}
    with pytest.raises(ComparisonError, match="other is no checkout"):
        list(compare(works, other, 1))
    (other / "beam_triton").symlink_to(checkout / "beam_triton")
    (comparison,) = compare(works, other, 2)
    assert [run.elements for run in (*comparison.these, *comparison.others)] == [2_000] * 4
    assert "this / other" in comparison.render()


def test_compare_reports_a_failed_run(triton: LocalTriton, tmp_path: Path) -> None:
    """The error names the checkout whose run failed."""
    (tmp_path / "beam_triton").mkdir()
    (tmp_path / "beam_triton" / "__init__.py").write_text("raise ImportError")
    with pytest.raises(ComparisonError, match=re.escape(str(tmp_path))):
        list(compare({ECHO: COMPARED_WORK[ECHO](triton, SMOKE)}, tmp_path, 1))


@pytest.mark.parametrize("in_batches", [False, True], ids=["by element", "NumPy batches"])
def test_parts_of_a_profile_add_up(triton: LocalTriton, in_batches: bool) -> None:
    """Beam's share and the sections make up what the process spent: little is left that no part explains."""
    work = Workload(target(triton, ECHO), 64_000, batch_size=64, in_batches=in_batches)
    peers = (BEAM_TRITON, NO_OP, profile.KEEPS_WINDOWS)
    whole, empty, windows = (
        run_in_fresh_process(profile.profile, peer, work, has_sections=True) for peer in peers
    )
    plain = run_in_fresh_process(profile.profile, BEAM_TRITON, work, has_sections=False)
    parts = profile.parts_of(whole, plain, empty, windows)
    assert set(parts) == set(profile.PARTS)
    sections = (
        profile.TAKING,
        profile.ENCODE,
        profile.DISPATCH,
        profile.KERNEL,
        profile.DECODE,
        profile.RESULTS,
    )
    assert all(parts[name] > 1 for name in sections)
    assert whole.spent.cost < 0.2 * whole.process
    # A single round, beside other tests: the case's own figure is stricter.
    assert abs(parts[profile.REST]) < 0.25 * plain.all_of_it
