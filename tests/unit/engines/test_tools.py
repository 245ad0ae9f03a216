"""Who runs the engines is told in one line what is missing for them, and refused for nothing else."""

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
    "error: the engines need, and this machine lacks: "
    "Java 17 (no java on PATH), Maven (no mvn on PATH), Go (no go on PATH)\n"
)

# What the JVM does: options from the environment are told first.
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
    """This process's environment, with ``path`` as all that is on PATH, and nothing of Java or of make."""
    of_others = ("JAVA_HOME", "JAVA_TOOL_OPTIONS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in of_others}
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


def test_java_is_found_behind_the_line_that_tells_its_options(
    on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With JAVA_TOOL_OPTIONS set the version is not on the first line."""
    java = program(on_path, "java", JAVA.format(version="17.0.15"))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dx=1")
    tools.require_all()
    assert tools.java() == java


def test_java_home_comes_before_path(on_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Java 17 in JAVA_HOME is what runs, whichever java is first on PATH."""
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
        ("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1\n", "tells no version"),
    ],
    ids=["newer", "older", "none"],
)
def test_another_java_is_named_with_its_version(on_path: Path, text: str, what: str) -> None:
    """The line says which java was found, what it is, and what to set."""
    java = program(on_path, "java", text)
    with pytest.raises(tools.MissingToolsError) as raised:
        tools.require_all()
    assert str(raised.value) == (
        f"the engines need, and this machine lacks: Java 17 ({java} {what}; set JAVA_HOME to a Java 17)"
    )


def test_every_missing_tool_is_in_the_line(on_path: Path) -> None:
    """Nobody installs one only to be told of the next."""
    (on_path / "mvn").unlink()
    with pytest.raises(tools.MissingToolsError) as raised:
        tools.require_all()
    assert str(raised.value) == (
        "the engines need, and this machine lacks: Java 17 (no java on PATH), Maven (no mvn on PATH)"
    )


@pytest.mark.parametrize("options", [[], ["--tools_only"]], ids=["install", "look"])
def test_the_installer_says_what_is_missing_in_one_line(options: list[str], tmp_path: Path) -> None:
    """Without Java, Maven and Go the installer names all three, and downloads nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "engines", *options],
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
def test_make_says_what_is_missing_in_one_line(target: str, tmp_path: Path) -> None:
    """``make`` fails with the same line, before the server and the engines are installed."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make on PATH")
    environment = tmp_path / "venv"
    # In the place of the one that make would install: whatever runs these tests will do.
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
