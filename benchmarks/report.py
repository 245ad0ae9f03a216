"""Results as text: what each peer took, and the figures required and reached side by side."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import CaseResult, Row


def told(result: CaseResult) -> str:
    """A case for the terminal; Markdown as well."""
    lines = [f"## {result.case}: {result.title}", ""]
    if result.rows:
        lines += [told_rows(result.rows), ""]
    if result.figures:
        lines += [*_table(*_figure_cells(result)), ""]
    lines += [f"- {note}" for note in result.notes]
    return "\n".join(lines).rstrip() + "\n"


def told_figures(results: Sequence[CaseResult]) -> str:
    """All figures of all cases in one table."""
    header: list[str] = []
    cells: list[list[str]] = []
    for result in results:
        header, own = _figure_cells(result)
        cells += [[result.case, *row] for row in own]
    return "\n".join(_table(["case", *header], cells, names=2)) + "\n"


def told_rows(rows: Sequence[Row]) -> str:
    """What each peer took, as a table."""
    return "\n".join(_table(*_row_cells(rows)))


def told_defaults(results: Sequence[CaseResult]) -> str:
    """Where the defaults come least near the best setting, for each thing that grows."""
    cells = []
    for result in results:
        worst = min(result.figures, key=lambda figure: figure.reached)
        place = worst.text.partition(", ")[2]
        required = f"{worst.relation} {_number(worst.required)}"
        cells.append([result.case, place, required, _number(worst.reached)])
    header = ["case", "where the defaults are farthest from the best", "required", "reached"]
    return "\n".join(_table(header, cells, names=2))


def _row_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    quantities = list(dict.fromkeys(quantity for row in rows for quantity in row.measured))
    cells = []
    for row in rows:
        medians = [_number(row.median(each)) if each in row.measured else "" for each in quantities]
        cells.append([row.name, *medians])
    return ["median of", *quantities], cells


def _figure_cells(result: CaseResult) -> tuple[list[str], list[list[str]]]:
    cells = [
        [
            figure.text,
            f"{figure.relation} {_number(figure.required)}",
            _number(figure.reached),
            "yes" if figure.holds else "NO",
        ]
        for figure in result.figures
    ]
    return ["figure", "required", "reached", "holds"], cells


def _number(value: float) -> str:
    if abs(value) >= 1000 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], *, names: int = 1) -> list[str]:
    """``names``: how many columns at the start hold names; the others hold numbers."""
    widths = [max(len(row[column]) for row in [header, *cells]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if column < names else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        f":{'-' * (width - 1)}" if column < names else f"{'-' * (width - 1)}:"
        for column, width in enumerate(widths)
    ]
    return [line(header), line(rule), *map(line, cells)]
