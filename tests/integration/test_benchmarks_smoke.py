"""Every benchmark for the shortest of times: that its results are right, whatever its times."""

from __future__ import annotations

import math
import os
from pathlib import Path
from xml.etree import ElementTree

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import PredictionResult

from beam_triton.testing import LocalTriton
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.cases.case import Case, CaseLeftOut
from benchmarks.charts import draw
from benchmarks.isolation import MeasurementError, in_own_process
from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from benchmarks.report import told, told_figures
from benchmarks.results import CaseResult, Curves, Figure, Point, Row, ratio, read_results
from benchmarks.scale import SMOKE
from benchmarks.server import ECHO, target
from benchmarks.workload import Workload, run_pipeline

_MB = 1_000_000

EXAMPLE = CaseResult(
    "example",
    "An example",
    rows=[
        Row("beam_triton", {"elements/s": [3000.0, 1000.0, 2000.0]}),
        Row("other", {"elements/s": [500.0]}),
    ],
    figures=[Figure("elements/s of other's", "at least", 2, 4), Figure("memory", "at most", 0.1, 0.2)],
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case(case: Case, triton: LocalTriton, tmp_path: Path) -> None:
    """Each case checks what its peers answer against what was sent, and gives figures, text and charts."""
    try:
        result = case.measure(triton, 1, SMOKE)
    except CaseLeftOut as missing:
        pytest.skip(str(missing))
    assert result.case == case.name
    values = [value for row in result.rows for taken in row.measured.values() for value in taken]
    assert values and all(math.isfinite(value) for value in values)
    # Where wrk is missing, some figures have nothing to be compared with.
    assert result.figures or any(note.startswith("left out: wrk") for note in result.notes)
    assert all(math.isfinite(figure.reached) for figure in result.figures)
    result.write(tmp_path)
    assert [read.case for read in read_results(tmp_path)] == [case.name]
    assert all(figure.text in told(result) for figure in result.figures)
    for chart in draw([result], tmp_path):
        ElementTree.parse(chart)


def test_a_lost_element_is_noticed(triton: LocalTriton) -> None:
    """A transform that drops an element fails its measurement."""
    work = Workload(target(triton, ECHO), 100)
    with pytest.raises(AssertionError, match="elements=99"):
        run_pipeline(beam.Filter(lambda element: element[0] != 7), work)


def test_a_wrong_result_is_noticed(triton: LocalTriton) -> None:
    """An answer that is not what was sent fails its measurement, even if it is the only one."""
    work = Workload(target(triton, ECHO), 100)
    with pytest.raises(AssertionError, match="wrong=1,"):
        run_pipeline(beam.Map(_wrong_at_seven), work)


def test_one_lost_and_one_twice_is_noticed(triton: LocalTriton) -> None:
    """As many results as elements are not yet a result for each element."""
    work = Workload(target(triton, ECHO), 100)
    with pytest.raises(AssertionError, match="elements=100, wrong=0, number_sum=4951"):
        run_pipeline(beam.FlatMap(_eight_instead_of_seven), work)


def _wrong_at_seven(element: np.ndarray) -> PredictionResult:
    answer = element + 1 if element[0] == 7 else element
    return PredictionResult(element, {"y": answer})


def _eight_instead_of_seven(element: np.ndarray) -> list[np.ndarray]:
    return {7: [], 8: [element, element]}.get(int(element[0]), [element])


def test_another_process() -> None:
    """A measurement runs in another process, whose failure or death is told with its reason."""
    assert in_own_process(os.getpid) != os.getpid()
    with pytest.raises(MeasurementError, match="ValueError: invalid literal"):
        in_own_process(int, "text")
    with pytest.raises(MeasurementError, match="exit code 3"):
        in_own_process(os._exit, 3)


def test_peak_memory() -> None:
    """The peak counts what came and went since it was forgotten, and nothing from before."""
    added, later = in_own_process(_peaks)
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


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is ten times slower in one round changes no ratio."""
    assert ratio([20, 2, 20], [10, 1, 10]) == 2


def test_results_keep_through_json(tmp_path: Path) -> None:
    """What was measured is the same after it was written and read."""
    EXAMPLE.write(tmp_path)
    (read,) = read_results(tmp_path)
    assert read == EXAMPLE


def test_told_side_by_side() -> None:
    """Medians, and figures required and reached, stand in tables; a missed figure is marked."""
    text = told(EXAMPLE)
    assert "| beam_triton |      2,000 |" in text
    assert "| elements/s of other's |  at least 2 |       4 |   yes |" in text
    assert "| memory                | at most 0.1 |     0.2 |    NO |" in text
    assert "left out: something" in text
    assert told_figures([EXAMPLE, EXAMPLE]).count("NO") == 2


def test_charts_are_the_same_for_the_same_results(tmp_path: Path) -> None:
    """Drawn twice, byte by byte: only new measurements change what is committed."""
    first, second = (draw([EXAMPLE], tmp_path / folder) for folder in ("first", "second"))
    assert [path.name for path in first] == [
        "benchmark_example.svg",
        "benchmark_example_curve.svg",
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``charts`` draws what a folder holds; an unknown case is refused with the list of those there are."""
    EXAMPLE.write(tmp_path)
    assert main(["charts", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "benchmark_example.svg").exists()
    with pytest.raises(SystemExit):
        main(["no_such_case"])
    assert "there are: remote_like" in capsys.readouterr().err
