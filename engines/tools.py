"""The three tools that engines are built and run with, and one line for those that are missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from engines import versions

_JAVA_OPENED = (
    "java.lang",
    "java.lang.reflect",
    "java.net",
    "java.io",
    "java.nio",
    "sun.nio.ch",
    "java.text",
    "java.time",
    "java.util",
    "java.util.concurrent",
    "java.util.concurrent.atomic",
    "java.util.concurrent.locks",
)
JAVA_MODULE_OPTIONS = (
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
    "--add-exports=java.rmi/sun.rmi.registry=ALL-UNNAMED",
    *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _JAVA_OPENED),
)
"""What Flink reaches into that Java 17 keeps closed; Flink's own start scripts pass the same."""


class MissingToolsError(RuntimeError):
    """Java, Maven or Go is not on this machine, or is of the wrong version; the message is one line."""


def java() -> Path:
    """Return the ``java`` to run Flink with: ``$JAVA_HOME``'s, else the first on ``PATH``.

    Raises MissingToolsError where there is none, or where it is not Java 17.
    """
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if found is None:
        where = f"in JAVA_HOME={home}" if home else "on PATH"
        raise MissingToolsError(f"Java {versions.JAVA_MAJOR} (no java {where})")
    major = _java_major(found)
    if major != versions.JAVA_MAJOR:
        wanted = f"Java {versions.JAVA_MAJOR}"
        # macOS has a java that only says where to get one.
        what = f"is Java {major}" if major else "tells no version"
        raise MissingToolsError(f"{wanted} ({found} {what}; set JAVA_HOME to a {wanted})")
    return Path(found)


def maven() -> Path:
    """Return the first ``mvn`` on ``PATH``. Raises MissingToolsError where there is none."""
    return _on_path("mvn", "Maven")


def go() -> Path:
    """Return the first ``go`` on ``PATH``. Raises MissingToolsError where there is none."""
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
        raise MissingToolsError(f"the engines need, and this machine lacks: {', '.join(missing)}")


def _on_path(command: str, name: str) -> Path:
    found = shutil.which(command)
    if found is None:
        raise MissingToolsError(f"{name} (no {command} on PATH)")
    return Path(found)


def _java_major(command: str) -> int:
    # Java writes its version to stderr, before 9 as 1.8, and after a line that tells JAVA_TOOL_OPTIONS.
    answer = subprocess.run([command, "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    return int(match.group(1)) if match else 0
