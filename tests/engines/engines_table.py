"""The table of processes and connections in ``docs/engines.md``, from what the tests measured.

Tests write their figures into ``out/engines.json``; ``python -m tests.engines.engines_table`` prints them.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from typing import Any

from engines.install import REPOSITORY

FILE = REPOSITORY / "out" / "engines.json"

COLUMNS = {
    "processes": "processes",
    "dofn_instances": "DoFns",
    "sessions_in_a_process": "sessions per process",
    "max_total": "`max_total`",
    "connections_in_a_process": "connections per process",
    "connection_waits": "requests that waited for a connection",
    "connections_at_server": "connections at the server",
    "torn_down": "torn down",
    "torn_down_on_cancel": "torn down on cancel",
    "connections_left": "connections left",
    "elements_a_request": "elements per request (of 64)",
}
"""The table's columns in order: the name of a figure, and its heading."""


def record(engine: str, figures: Mapping[str, Any]) -> None:
    """Add an engine's figures to those in the file."""
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        recorded = json.loads(file.read() or "{}")
        recorded.setdefault(engine, {}).update(figures)
        file.truncate(0)
        file.write(json.dumps(recorded, indent=2, sort_keys=True) + "\n")


def table(recorded: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a Markdown table with a row for each engine."""
    lines = [["engine", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    for engine, figures in recorded.items():
        lines.append([engine, *(str(figures.get(name, "")) for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(FILE.read_text())))
