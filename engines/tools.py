"""Finds Java, Maven and Go, and names in one line which of them are missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

JAVA_MAJOR = 17
"""The newest Java that Flink 1.19 supports without calling it experimental."""


class MissingToolsError(RuntimeError):
    """Java, Maven or Go is missing or has the wrong version; the message is one line."""


def java() -> Path:
    """Return the ``java`` to run Flink with: that of ``$JAVA_HOME``, else the first on ``PATH``.

    Raises MissingToolsError if there is none, or if it is not Java 17.
    """
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if found is None:
        where = f"in JAVA_HOME={home}" if home else "on PATH"
        raise MissingToolsError(f"Java {JAVA_MAJOR} (no java {where})")
    major = _java_major(found)
    if major != JAVA_MAJOR:
        wanted = f"Java {JAVA_MAJOR}"
        # macOS ships a java that prints where to download Java, and no version.
        what = f"is Java {major}" if major else "prints no version"
        raise MissingToolsError(f"{wanted} ({found} {what}; set JAVA_HOME to a {wanted})")
    return Path(found)


def maven() -> Path:
    """Return the first ``mvn`` on ``PATH``. Raises MissingToolsError if there is none."""
    return _on_path("mvn", "Maven")


def go() -> Path:
    """Return the first ``go`` on ``PATH``. Raises MissingToolsError if there is none."""
    return _on_path("go", "Go")


def require_all() -> None:
    """Raise one MissingToolsError that names every missing tool."""
    missing = []
    for find in (java, maven, go):
        try:
            find()
        except MissingToolsError as error:
            missing.append(str(error))
    if missing:
        raise MissingToolsError(f"the engines need tools that this machine lacks: {', '.join(missing)}")


def _on_path(command: str, name: str) -> Path:
    found = shutil.which(command)
    if found is None:
        raise MissingToolsError(f"{name} (no {command} on PATH)")
    return Path(found)


def _java_major(command: str) -> int:
    # Java prints its version to stderr, up to Java 8 as 1.8, below a line with JAVA_TOOL_OPTIONS if set.
    answer = subprocess.run([command, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    return int(match.group(1)) if match else 0
