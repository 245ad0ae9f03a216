"""The examples of a page of the documentation, run as its reader would run them.

::

    ```python                     run, all of a page in one namespace; prints what follows ``print(…)  # ``
    ```console                    lines after ``$`` are run by bash; the others are looked for in the output
    <!-- file: PATH -->           above a block of any language: its text is that file
    <!-- printed -->              above a block: printed by the python block before it
    <!-- in the background -->    above a console block: it goes on running until the page ends
    <!-- not run: REASON -->      above a block: left out
    <!-- from: FILE -->           above a block: an excerpt of a file that tests run

``…`` in an output stands for anything. Servers of the page are replaced by those of the test.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.local_process import START_SECONDS

ROOT = Path(__file__).parents[2]

_PRINTS = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
_BLOCK = re.compile(r"^(?:<!-- ([^\n]*?) -->\n)?```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its marker (empty if there is none), language and text, and its line in the page."""

    marker: str
    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page that begin a line."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1] or "", found[2], found[3], text.count("\n", 0, found.start(3)) + 1)
        for found in _BLOCK.finditer(text)
    ]


@contextmanager
def _started(commands: list[str], folder: Path) -> Iterator[None]:
    """Processes that run meanwhile, each with its children in a group of its own."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    ["bash", "-c", command],
                    cwd=folder,
                    env=_environment(),
                    start_new_session=True,
                    stdout=(folder / "background.log").open("ab"),
                    stderr=subprocess.STDOUT,
                )
            )
        yield
    finally:
        for process in processes:
            # As Ctrl-C does, which reaches the children, too.
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_page(
    page: Path, folder: Path, *, replacements: Mapping[str, str], names: Mapping[str, Any] | None = None
) -> list[str]:
    """Run a page's examples in an empty folder, in their order; what each block that was run has printed, a
    Python block or none.

    Raises:
        AssertionError: an example failed, or gave another output; the message has the page's line.
    """
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem}", **(names or {})}
    printed = [""]
    background: list[Any] = []
    try:
        for block in blocks_of(page):
            text = block.text
            for shown, real in replacements.items():
                text = text.replace(shown, real)
            where = f"{page.name}:{block.line}"
            if block.marker.startswith(("not run", "from:", "symptom")):
                continue
            if block.marker.startswith("file: "):
                file = folder / block.marker.removeprefix("file: ")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            elif block.marker == "in the background":
                commands, expected = _split(text)
                running = _started(commands, folder)
                running.__enter__()
                background.append(running)
                _await_output(folder / "background.log", expected, where)
            elif block.language == "python":
                printed.append(_run_python(text, namespace, where))
                continue
            elif block.language == "console":
                _run_console(text, folder, where)
            elif block.marker == "printed":
                for line in filter(None, text.splitlines()):
                    assert _is_in(line, printed[-1]), f"{where}: {line!r} is not printed, but\n{printed[-1]}"
                continue
            else:
                continue
            printed.append("")
    finally:
        for running in reversed(background):
            running.__exit__(None, None, None)
    return printed[1:]


def _environment() -> dict[str, str]:
    """The commands of this interpreter come first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def _split(text: str) -> tuple[list[str], list[str]]:
    """The commands of a console block, and the other lines."""
    commands: list[str] = []
    expected: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append(line[2:])
        elif commands and commands[-1].endswith("\\") and not expected:
            commands[-1] = commands[-1][:-1] + line.strip()
        elif line.strip():
            expected.append(line)
    return commands, expected


def _await_output(log: Path, expected: list[str], where: str) -> None:
    give_up_at = time.monotonic() + 10 * START_SECONDS
    while True:
        printed = log.read_text(errors="replace")
        missing = [line for line in expected if not _is_in(line, printed)]
        if not missing:
            return
        assert time.monotonic() < give_up_at, f"{where}: {missing[0]!r} is not printed, but\n{printed}"
        time.sleep(0.1)


def _run_python(text: str, namespace: dict[str, Any], where: str) -> str:
    """Run a block and look for what its comments say that it prints; all that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(compile(text, where, "exec"), namespace)
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    printed = output.getvalue()
    for expected in _PRINTS.findall(text):
        assert _is_in(expected, printed), f"{where}: {expected!r} is not printed, but\n{printed}"
    return printed


def _run_console(text: str, folder: Path, where: str) -> None:
    """Run each command, and look for the lines that follow it in what it prints."""
    for part in re.split(r"^(?=\$ )", text, flags=re.MULTILINE):
        commands, expected = _split(part)
        for command in commands:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env=_environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, f"{where}: {command}\n{done.stdout}"
            for line in expected:
                assert _is_in(line, done.stdout), f"{where}: {command} prints no {line!r}, but\n{done.stdout}"


def _is_in(line: str, printed: str) -> bool:
    return re.search(".*".join(map(re.escape, line.strip().split("…"))), printed) is not None
