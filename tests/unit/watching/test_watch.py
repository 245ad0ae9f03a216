"""`watch` where there is no terminal, and the report's file, whatever happens to the run."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import beam_triton
from beam_triton import ConfigurationError
from beam_triton.dispatch.activity import ACTIVITY, EndedRequest, FailedElements
from beam_triton.watching.history import Sampler
from beam_triton.watching.watch import Watch


def wait_for(text: str, stream: io.StringIO) -> str:
    deadline = time.monotonic() + 20
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.02)
    return stream.getvalue()


def test_lines_are_written_where_there_is_no_terminal() -> None:
    """One now and then, each on a line of its own, with what is known."""
    stream = io.StringIO()
    with Watch(progress_seconds=0.1, stream=stream):
        wait_for("0 elements done", stream)
        for _ in range(100):
            ACTIVITY.tell(EndedRequest(64, 64, 0.02, 0, 0, 0))
        ACTIVITY.tell(FailedElements(3, "RowError", "no number"))
        shown = wait_for("6,403 elements done", stream)
    assert re.search(
        r"^ +\d+ s +6,403 elements done +[\d,]+/s  0 in flight  .*p50 .* ms .*3 failed$", shown, re.M
    )
    assert "\r" not in shown and "\x1b" not in shown
    assert ACTIVITY.watchers == ()
    assert not any(thread.name == "beam_triton-watch" for thread in threading.enumerate())


def test_an_interval_of_zero_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report is written all the same."""
    with beam_triton.watch(tmp_path / "run.html", progress_seconds=0):
        time.sleep(0.6)
    assert (tmp_path / "run.html").exists()
    assert capsys.readouterr() == ("", "")


def test_a_watch_inside_another_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Two would write over each other; the inner one's report is its own."""
    with beam_triton.watch(progress_seconds=0), Watch(progress_seconds=0.1, stream=io.StringIO()) as outer:
        inner = io.StringIO()
        with Watch(progress_seconds=0.1, stream=inner) as watch:
            time.sleep(0.6)
        assert inner.getvalue() == ""
        assert watch.history.total.seconds > 0.5
    assert outer.history.total.seconds > watch.history.total.seconds


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (
            RuntimeError("pages\nof traceback\nValueError: <b>no</b>"),
            "failed: ValueError: &lt;b&gt;no&lt;/b&gt;",
        ),
        (AssertionError(), "failed: AssertionError"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_run_that_fails_has_a_report(tmp_path: Path, error: BaseException, outcome: str) -> None:
    """It says how the run ended, and the error goes on."""
    path = tmp_path / "run.html"
    with pytest.raises(type(error)), beam_triton.watch(path, progress_seconds=0):
        assert ">running<" in path.read_text(encoding="utf-8")
        raise error
    assert f">{outcome}<" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """Before the run, with the path; and no other kind of file is overwritten."""
    with (
        pytest.raises(ConfigurationError, match=r"nowhere/run\.html cannot be written"),
        beam_triton.watch(tmp_path / "nowhere" / "run.html"),
    ):
        raise AssertionError("the run began")
    with pytest.raises(ConfigurationError, match=r"name it FILE\.html, not .*data\.csv"):
        beam_triton.watch(tmp_path / "data.csv")
    with pytest.raises(ConfigurationError, match="progress_seconds must be 0 or more, not -1"):
        beam_triton.watch(progress_seconds=-1)
    assert ACTIVITY.watchers == ()


def test_a_report_that_cannot_be_written_in_the_end_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run has its results by then."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with beam_triton.watch(folder / "run.html", progress_seconds=0):
        (folder / "run.html").unlink()
        folder.rmdir()
    assert "run.html could not be written" in caplog.text


def test_what_breaks_the_watching_does_not_break_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and events are not collected for nobody."""

    def broken(sampler: Sampler, now: float) -> None:
        raise ZeroDivisionError("sampling")

    with Watch(progress_seconds=0) as watch:
        monkeypatch.setattr(Sampler, "sample", broken)
        deadline = time.monotonic() + 10
        while ACTIVITY.watchers and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ACTIVITY.watchers == ()
        monkeypatch.undo()
    assert caplog.text.count("this run is not watched any more") == 1
    assert watch.history.total.seconds > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_picture_that_breaks_does_not_break_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it is left, so that the next run has a picture."""
    monkeypatch.setenv("TERM", "xterm")

    def broken() -> str:
        raise ZeroDivisionError("drawing")

    with Watch(progress_seconds=1, stream=Terminal(), note=broken):
        pass
    assert "could not be ended" in caplog.text
    again = Terminal()
    with Watch(progress_seconds=1, stream=again):
        pass
    assert "no request so far" in again.getvalue()
    assert ACTIVITY.watchers == ()


def test_a_watch_that_cannot_begin_leaves_nothing_behind() -> None:
    """Such as one that has ended."""
    used = Watch(progress_seconds=1, stream=io.StringIO())
    with used:
        pass
    with pytest.raises(RuntimeError, match="once"), used:
        pass
    assert ACTIVITY.watchers == ()
    with Watch(progress_seconds=0.1, stream=io.StringIO()) as next_one:
        assert isinstance(next_one._stream, io.StringIO)
        wait_for("elements done", next_one._stream)


def test_messages_that_utf8_lacks_are_in_the_report(tmp_path: Path) -> None:
    """JSON may hold half of a character, and errors name values."""
    with beam_triton.watch(tmp_path / "run.html", progress_seconds=0):
        ACTIVITY.tell(FailedElements(1, "RowError", "not a number: \ud800"))
    assert "not a number: \\ud800" in (tmp_path / "run.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("blocked", ["", "rich"])
def test_rich_is_imported_for_a_picture_only(blocked: str) -> None:
    """Neither by the package nor by lines, which are written without it, too."""
    program = f"""
import sys
{f"sys.modules[{blocked!r}] = None" if blocked else ""}
import time, beam_triton
with beam_triton.watch(progress_seconds=0.1):
    time.sleep(0.8)
assert sys.modules.get("rich") is None
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "0 elements done" in run.stderr and run.stdout == ""
