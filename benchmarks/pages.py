"""Tables of measurements within the documentation's pages: made of the results, so that the two agree.

A page says where: what stands between ``<!-- measured: NAME -->`` and ``<!-- end of measured -->`` is
replaced. ``figures`` are those required and reached, ``defaults`` how near the defaults come to the best
setting, and the name of a case is the table of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import told_defaults, told_figures, told_rows
from benchmarks.results import CaseResult

_PLACE = re.compile(r"(<!-- measured: (\w+) -->\n).*?(\n<!-- end of measured -->)", re.DOTALL)


def fill(page: Path, results: Sequence[CaseResult]) -> bool:
    """Write the tables of ``results`` into a page; whether that changed it.

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
    """The text with its tables made anew."""
    named = {result.case: result for result in results}

    def table(place: re.Match[str]) -> str:
        before, name, after = place.groups()
        if name == "figures":
            body = told_figures([result for result in results if not result.is_of_defaults])
        elif name == "defaults":
            body = told_defaults([result for result in results if result.is_of_defaults])
        else:
            body = told_rows(named[name].rows)
        return f"{before}{body.rstrip()}{after}"

    return _PLACE.sub(table, text)
