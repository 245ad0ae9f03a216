"""What runs on engines have shown, kept in ``out/engines.json`` for the table of ``docs/engines.md``.

``python -m engines.findings`` prints the table.
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
    "sessions_in_a_process": "sessions a process",
    "max_total": "`max_total`",
    "connections_in_a_process": "connections a process",
    "connection_waits": "requests that waited for a connection",
    "connections_at_server": "connections at the server",
    "torn_down": "torn down",
    "torn_down_on_cancel": "torn down on cancel",
    "connections_left": "connections left",
    "elements_a_request": "elements a request (of 64)",
}
"""Facts in the table's order, with their headings; others stay in the file."""


def record(engine: str, facts: Mapping[str, Any]) -> None:
    """Put facts about an engine beside those that are already there."""
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        findings = json.loads(file.read() or "{}")
        findings.setdefault(engine, {}).update(facts)
        file.truncate(0)
        file.write(json.dumps(findings, indent=2, sort_keys=True) + "\n")


def table(findings: Mapping[str, Mapping[str, Any]]) -> str:
    """The findings as a Markdown table: a row an engine, a column a fact."""
    lines = [["engine", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    lines += [[engine, *(str(facts.get(name, "")) for name in COLUMNS)] for engine, facts in findings.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(FILE.read_text())))
