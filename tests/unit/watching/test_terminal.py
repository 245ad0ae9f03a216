"""The picture in a real pseudo-terminal: drawn in place, above it what the program writes."""

from __future__ import annotations

import signal
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="need rich (pip install beam-triton[live])")
pytest.importorskip("pyte", reason="need pyte")

from tests.support.pseudo_terminal import PseudoTerminal

# Requests that end as a pipeline's do, and what pipelines write: log lines by a handler that was made before,
# by one that is made meanwhile, prints and warnings.
PROGRAM = """
import logging, sys, time, warnings
import beam_triton
from beam_triton.dispatch.activity import ACTIVITY, EndedRequest, FailedElements

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
seconds, progress_seconds = float(sys.argv[1]), float(sys.argv[2])
with beam_triton.watch(progress_seconds=progress_seconds, title="a run"):
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for _ in range(10):
            ACTIVITY.tell(EndedRequest(32, 32, 0.02, 0, 1000, 1000))
        number += 1
        if number == 20:
            logging.info("a line by logging, %s", "x" * 100)
            late = logging.StreamHandler()
            logging.getLogger("late").addHandler(late)
            logging.getLogger("late").propagate = False
            logging.getLogger("late").warning("a line by a late handler")
            print("a line by print")
            warnings.warn("a line by warnings")
            ACTIVITY.tell(FailedElements(7, "RowError", "[b]no[/b]\\n\\x1b[31mnumber"))
        time.sleep(0.05)
logging.info("a line behind by logging")
logging.getLogger("late").warning("a line behind by a late handler")
handlers = (logging.getLogger().handlers[0], late)
print("the end", sys.stdout.isatty(), all(each.stream is sys.stderr for each in handlers))
"""

ROWS = ("elements", "in flight", "limit", "latency", "queue", "connections", "failures")


def command(seconds: float, progress_seconds: float = 2.0) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(seconds), str(progress_seconds)]


def picture_of(lines: Sequence[str]) -> list[str]:
    """The lines of the picture, the last one where there are several."""
    start = max(index for index, line in enumerate(lines) if line.startswith("a run"))
    return list(lines[start : start + 1 + len(ROWS)])


def has_picture(terminal: PseudoTerminal) -> bool:
    return any(line.startswith("failures") and " 7 " in line for line in terminal.lines)


def test_the_picture_stands_below_what_the_program_writes() -> None:
    """Seven rows and a headline, once; each line of the program is whole, and none is lost."""
    with PseudoTerminal(command(5.0)) as terminal:
        terminal.wait_until(lambda: has_picture(terminal))
        picture = picture_of(terminal.lines)
        assert [line.split("  ")[0].strip() for line in picture[1:]] == list(ROWS)
        assert "\u2588" in picture[1] and "/s" in picture[1] and "done" in picture[1]
        assert "19.7 ms" in picture[4] and "batches of 32" in picture[4]
        # Neither rich's markup nor a terminal's commands.
        assert "RowError: [b]no[/b]  [31mnumber" in picture[7]
        assert terminal.wait() == 0
        text, lines = terminal.text, terminal.lines
        assert not terminal.screen.cursor.hidden
        assert termios.tcgetattr(terminal._master) == terminal.attributes
    for line in ("a line by logging", "a line by a late handler", "a line by print", "a line by warnings"):
        assert text.count(line) == 1, text
    assert text.replace("\n", "").count("x" * 100) == 1
    assert text.count("a run") == 1
    # The last picture stays, and the program goes on below it.
    picture = picture_of(lines)
    behind = lines[lines.index(picture[-1]) + 1 :]
    assert [line for line in behind if line] == [
        "INFO a line behind by logging",
        "a line behind by a late handler",
        "the end True True",
    ]


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    """The cursor shows, input is echoed, and the traceback stands below the picture."""
    with PseudoTerminal(command(60.0), rows=40) as terminal:
        terminal.wait_until(lambda: has_picture(terminal))
        terminal.press(b"\x03")
        assert terminal.wait() == -signal.SIGINT
        lines = terminal.lines
        assert termios.tcgetattr(terminal._master) == terminal.attributes
        assert not terminal.screen.cursor.hidden
    assert "KeyboardInterrupt" in lines
    assert lines.index("KeyboardInterrupt") > lines.index(picture_of(lines)[-1])


def test_a_program_that_is_killed_leaves_nothing_to_mend() -> None:
    """The cursor was never hidden, the terminal's settings never changed."""
    with PseudoTerminal(command(60.0)) as terminal:
        terminal.wait_until(lambda: has_picture(terminal))
        assert not terminal.screen.cursor.hidden
        terminal.process.kill()
        terminal.wait()
        assert not terminal.screen.cursor.hidden
        assert termios.tcgetattr(terminal._master) == terminal.attributes


@pytest.mark.parametrize(("columns", "rows"), [(60, 30), (160, 30), (40, 30)])
def test_the_picture_follows_the_size_of_the_window(columns: int, rows: int) -> None:
    """Drawn anew, no line wider than the window."""
    with PseudoTerminal(command(60.0), columns=100) as terminal:
        terminal.wait_until(lambda: has_picture(terminal))
        terminal.resize(columns, rows)
        terminal.screen.reset()
        terminal.wait_until(lambda: has_picture(terminal))
        picture = picture_of(terminal.lines)
        assert [line.split("  ")[0].split(" \u2588")[0].strip() for line in picture[1:]] == list(ROWS)
        assert len(picture[0]) <= columns


def test_a_low_window_shows_the_first_rows() -> None:
    """The picture is cut, and does not scroll."""
    with PseudoTerminal(command(3.0), rows=6) as terminal:
        terminal.wait_until(lambda: any(line.startswith("elements") for line in terminal.lines))
        assert terminal.wait() == 0
        assert terminal.text.count("elements  ") == 1


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_dumb_terminal_gets_lines(term: str) -> None:
    """Nothing is drawn that it would show as rubbish."""
    with PseudoTerminal(command(3.0, 0.5), term=term) as terminal:
        assert terminal.wait() == 0
        text = terminal.text
    assert "elements done" in text and "\u2588" not in text and "a run" not in text


def test_what_is_written_to_a_file_stays_there(tmp_path: Path) -> None:
    """stdout that is no terminal is not drawn above the picture, which is on stderr."""
    path = tmp_path / "out.txt"
    arguments = command(2.0)
    shell = ["sh", "-c", f'exec "$0" "$@" >{path}', *arguments]
    with PseudoTerminal(shell) as terminal:
        assert terminal.wait() == 0
        assert "a line by print" not in terminal.text and "elements" in terminal.text
    assert path.read_text() == "a line by print\nthe end False True\n"


def test_a_terminal_without_blocks_gets_other_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its encoding says."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with PseudoTerminal(command(60.0)) as terminal:
        terminal.wait_until(lambda: any("##" in line for line in terminal.lines))
        assert terminal.text.isascii()
