"""Java, Maven and Go are found, and one line names those that are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines import tools
from engines.install import REPOSITORY

ALL_MISSING = (
    "error: the engines need tools that this machine lacks: "
    "Java 17 (no java on PATH), Maven (no mvn on PATH), Go (no go on PATH)\n"
)

# As the JVM does: options from the environment come first.
JAVA = """\
#!/bin/sh
test -z "$JAVA_TOOL_OPTIONS" || echo "Picked up JAVA_TOOL_OPTIONS: $JAVA_TOOL_OPTIONS" >&2
echo 'openjdk version "{version}" 2025-04-15' >&2
"""


def program(folder: Path, name: str, text: str = "#!/bin/sh\n") -> Path:
    """Write an executable file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return file


def bare_environment(path: Path) -> dict[str, str]:
    """This process's environment with only ``path`` on PATH, and without variables of Java and make."""
    dropped = ("JAVA_HOME", "JAVA_TOOL_OPTIONS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PATH": str(path)}


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH: Maven and Go, no Java yet."""
    folder = tmp_path / "on_path"
    program(folder, "mvn")
    program(folder, "go")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv("JAVA_TOOL_OPTIONS", raising=False)
    return folder


def test_java_is_found_with_java_tool_options_set(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is then not on the first line of Java's output."""
    java = program(on_path, "java", JAVA.format(version="17.0.15"))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dx=1")
    tools.require_all()
    assert tools.java() == java


def test_java_home_has_precedence_over_path(
    on_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Java 17 in JAVA_HOME is used, whichever java is first on PATH."""
    program(on_path, "java", JAVA.format(version="1.8.0_402"))
    java = program(tmp_path / "jdk" / "bin", "java", JAVA.format(version="17.0.15"))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    tools.require_all()
    assert tools.java() == java


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (JAVA.format(version="21.0.2"), "is Java 21"),
        (JAVA.format(version="1.8.0_402"), "is Java 8"),
        ("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1\n", "prints no version"),
    ],
    ids=["newer", "older", "none"],
)
def test_a_java_of_the_wrong_version_is_named(on_path: Path, text: str, what: str) -> None:
    """The line says which java was found, its version, and which variable to set."""
    java = program(on_path, "java", text)
    with pytest.raises(tools.MissingToolsError) as raised:
        tools.require_all()
    assert str(raised.value) == (
        f"the engines need tools that this machine lacks: Java 17 ({java} {what}; set JAVA_HOME to a Java 17)"
    )


def test_all_missing_tools_are_named_at_once(on_path: Path) -> None:
    """One line names Java and Maven, so that the user installs both before the next attempt."""
    (on_path / "mvn").unlink()
    with pytest.raises(tools.MissingToolsError) as raised:
        tools.require_all()
    assert str(raised.value) == (
        "the engines need tools that this machine lacks: Java 17 (no java on PATH), Maven (no mvn on PATH)"
    )


@pytest.mark.parametrize("command", ["install", "check-tools"])
def test_commands_name_missing_tools_in_one_line(command: str, tmp_path: Path) -> None:
    """Without Java, Maven and Go both commands name all three, and download nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "engines", command],
        env=bare_environment(tmp_path),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == ALL_MISSING


@pytest.mark.parametrize("target", ["test-engines", "flink-demo"])
def test_make_names_missing_tools_in_one_line(target: str, tmp_path: Path) -> None:
    """``make`` fails with the same line before it installs the server or the engines."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make on PATH")
    environment = tmp_path / "venv"
    # Stands in for the environment that make would install.
    program(environment / "bin", "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for stamp in ("demo.stamp", "all.stamp"):
        (environment / stamp).touch()
    done = subprocess.run(
        [make, f"VENV={environment}", target],
        env=bare_environment(tmp_path),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    said, of_make = done.stderr.splitlines(keepends=True)
    assert said == ALL_MISSING
    assert of_make.startswith("make: ***")
