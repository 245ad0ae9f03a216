"""Results as Markdown tables: for the terminal, and within pages of the documentation.

A page marks the place: the text between ``<!-- measured: NAME -->`` and ``<!-- end of measured -->`` is
replaced. ``figures`` are those required and reached, ``defaults`` how near the defaults come to the best
setting, and the name of a case is the table of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import CaseResult, Figure, Row

_PLACE = re.compile(r"(<!-- measured: (\w+) -->\n)(?:.*?\n)??(<!-- end of measured -->)", re.DOTALL)
_FIGURE_HEADER = ["figure", "required", "reached", "quartiles", "holds"]


def fill_page(page: Path, results: Sequence[CaseResult]) -> bool:
    """Write the tables of ``results`` into a page; True if that changed it.

    Raises:
        KeyError: the page wants a table of a case that has no result.
    """
    text = page.read_text(encoding="utf-8")
    filled = filled_text(text, results)
    if filled == text:
        return False
    page.write_text(filled, encoding="utf-8")
    return True


def filled_text(text: str, results: Sequence[CaseResult]) -> str:
    """The text with its tables made again from ``results``."""
    named = {result.case: result for result in results}

    def table(place: re.Match[str]) -> str:
        before, name, after = place.groups()
        if name == "figures":
            body = render_figures([result for result in results if not result.is_of_defaults])
        elif name == "defaults":
            body = render_defaults([result for result in results if result.is_of_defaults])
        else:
            body = render_rows(named[name].rows)
        return f"{before}{body}\n{after}"

    return _PLACE.sub(table, text)


def render_case(result: CaseResult) -> str:
    """A case with its rows, figures and notes."""
    parts = [f"## {result.case}: {result.title}"]
    if result.rows:
        parts.append(render_rows(result.rows))
    if result.figures:
        parts.append(_table(_FIGURE_HEADER, [_figure_cells(figure) for figure in result.figures]))
    if result.notes:
        parts.append("\n".join(f"- {note}" for note in result.notes))
    return "\n\n".join(parts) + "\n"


def render_figures(results: Sequence[CaseResult]) -> str:
    """All figures of all cases in one table."""
    cells = [[result.case, *_figure_cells(figure)] for result in results for figure in result.figures]
    return _table(["case", *_FIGURE_HEADER], cells, names=2)


def render_rows(rows: Sequence[Row]) -> str:
    """Each peer's medians."""
    quantities = list(dict.fromkeys(quantity for row in rows for quantity in row.measured))
    cells = []
    for row in rows:
        medians = [_number(row.measured[each].median) if each in row.measured else "" for each in quantities]
        cells.append([row.name, *medians])
    return _table(["median of", *quantities], cells)


def render_defaults(results: Sequence[CaseResult]) -> str:
    """For each sweep, the place where the defaults are farthest from the best setting."""
    cells = []
    for result in results:
        worst = min(result.figures, key=lambda figure: figure.reached)
        place = worst.text.partition(", ")[2]
        required = f"{worst.relation} {_number(worst.required)}"
        cells.append([result.case, place, required, _number(worst.reached)])
    header = ["case", "where the defaults are farthest from the best", "required", "reached"]
    return _table(header, cells, names=2)


def _figure_cells(figure: Figure) -> list[str]:
    quartiles = ""
    if figure.rounds is not None and figure.rounds.n > 1:
        quartiles = f"{_number(figure.rounds.lower_quartile)} to {_number(figure.rounds.upper_quartile)}"
    return [
        figure.text,
        f"{figure.relation} {_number(figure.required)}",
        _number(figure.reached),
        quartiles,
        "yes" if figure.holds else "NO",
    ]


def _number(value: float) -> str:
    if abs(value) >= 1000 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """The first ``names`` columns hold names, aligned left; the others hold numbers."""
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
    return "\n".join([line(header), line(rule), *map(line, cells)])
