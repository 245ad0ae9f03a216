"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from beam_triton.errors import TritonError
from benchmarks.cases import CASES, NAMED_CASES
from benchmarks.cases.case import FULL, QUICK, CaseLeftOut, Scale
from benchmarks.cases.throughput import COMPARED_WORK
from benchmarks.charts import draw
from benchmarks.compare import ComparisonError, compare
from benchmarks.process import MeasurementError
from benchmarks.results import CaseResult, read_results
from benchmarks.server import benchmark_server
from benchmarks.tables import fill_page, render_case, render_figures

_ROOT = Path(__file__).resolve().parent.parent
RESULTS, _IMAGES = _ROOT / "benchmarks" / "results", _ROOT / "docs" / "images"
_MEASURED = (
    "performance",
    "engines",
    "reliability",
    "scale",
    "shared-memory",
    "migrating-from-flink",
    "tuning",
)
PAGES = tuple(_ROOT / "docs" / f"{name}.md" for name in _MEASURED)
"""The pages with tables of these results."""
_QUICK_OUTPUT = _ROOT / "out" / "benchmarks"
_CHARTS, _COMPARE = "charts", "compare"
_EVERY_CASE = {case.name: case for case in (*CASES, *NAMED_CASES)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw or compare; the exit code is 1 where a case failed, and 0 where a figure is missed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [_COMPARE]:
        return _compare(arguments[1:])
    parser = _parser()
    given = parser.parse_args(arguments)
    output = given.output or (_QUICK_OUTPUT if given.quick else RESULTS)
    images = _IMAGES if output == RESULTS else output
    unknown = sorted(set(given.cases) - {*_EVERY_CASE, _CHARTS})
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are: {', '.join(_EVERY_CASE)}")
    if given.cases == [_CHARTS]:
        return _draw(output, images)
    # Beam logs at every start which optional packages are missing.
    logging.getLogger().setLevel(logging.ERROR)
    failed = _measure(given.cases, given.rounds, QUICK if given.quick else FULL, output)
    return _draw(output, images) or (1 if failed else 0)


def _measure(names: Sequence[str], rounds: int, scale: Scale, output: Path) -> bool:
    """Measure the named cases, or all; True if one failed, which doesn't stop the others."""
    failed = False
    results: list[CaseResult] = []
    with benchmark_server() as server:
        for case in [case for name, case in _EVERY_CASE.items() if name in names] or CASES:
            print(f"{case.name}: {case.title}", file=sys.stderr, flush=True)
            try:
                result = case.measure(server, rounds, scale)
            except CaseLeftOut as missing:
                print(f"{case.name} is left out: {missing}", file=sys.stderr)
                continue
            except (MeasurementError, TritonError, AssertionError) as error:
                print(f"{case.name} failed: {error}", file=sys.stderr)
                failed = True
                continue
            result.write(output)
            results.append(result)
            print(render_case(result), flush=True)
    if len(results) > 1:
        print(render_figures(results))
    return failed


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {_COMPARE}",
        description="Runs this checkout and another one in turns, against one Triton, and prints the ratios.",
    )
    parser.add_argument("other", type=Path, metavar="PATH_OF_OTHER_CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each checkout (default: 5)")
    parser.add_argument(
        "--cases", default=",".join(COMPARED_WORK), help="separated by commas (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a twentieth of the elements: a first look")
    given = parser.parse_args(arguments)
    cases = given.cases.split(",")
    if unknown := sorted(set(cases) - set(COMPARED_WORK)):
        parser.error(f"no case {', '.join(unknown)}; there are: {', '.join(COMPARED_WORK)}")
    scale = QUICK if given.quick else FULL
    try:
        with benchmark_server() as server:
            works = {name: COMPARED_WORK[name](server, scale) for name in cases}
            for comparison in compare(works, given.other, given.rounds):
                print(comparison.render(), flush=True)
    except ComparisonError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _draw(output: Path, images: Path) -> int:
    results = results_of(output)
    if not results:
        print(f"no results in {output}: measure first", file=sys.stderr)
        return 1
    for path in draw(results, images):
        print(path)
    if output == RESULTS:
        for page in PAGES:
            if fill_page(page, results):
                print(page)
    return 0


def results_of(folder: Path) -> list[CaseResult]:
    """A folder's results, in the order of the cases."""
    order = {name: position for position, name in enumerate(_EVERY_CASE)}
    return sorted(read_results(folder), key=lambda result: order.get(result.case, len(order)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures the library beside its peers against a real Triton on this machine.",
        epilog=f"cases: {', '.join(case.name for case in CASES)}; "
        f"only when named, with Java 17, Maven and, for engines, Go: "
        f"{', '.join(case.name for case in NAMED_CASES)}. "
        f"'{_COMPARE} PATH' measures this checkout beside another one: see '{_COMPARE} --help'",
    )
    parser.add_argument(
        "cases", nargs="*", metavar="case", help=f"all by default; '{_CHARTS}' alone draws the stored results"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each peer (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work: a first look")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder for JSON and charts (default: {RESULTS.relative_to(_ROOT)} and "
        f"{_IMAGES.relative_to(_ROOT)}, with --quick {_QUICK_OUTPUT.relative_to(_ROOT)})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
