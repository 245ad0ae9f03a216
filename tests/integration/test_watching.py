"""A pipeline and a `score` job on a real Triton, watched: a picture in a terminal, a report in a browser."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest

import beam_triton
from beam_triton import TritonInference
from beam_triton.testing import LocalTriton
from pipelines import score_files
from tests.support.pipelines import RUNNER

ELEMENTS, BAD = 20_000, 7


def elements(_: Any) -> Iterator[Any]:
    """Twice as many as a second takes at a time, with a pause between them; some do not fit the model."""
    for number in range(ELEMENTS):
        if number == ELEMENTS // 2:
            time.sleep(1.0)
        yield np.zeros(5 if number % 1000 == 0 and number < 1000 * BAD else 128, np.float32)


def write_rows(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"x": [number] * (3 if number == 5 else 128)}) + "\n")


@pytest.fixture(scope="module")
def report(triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a pipeline with failures and a secret."""
    path = tmp_path_factory.mktemp("report") / "run.html"
    scoring = TritonInference(
        triton.endpoint, "remote_like", headers={"X-Api-Key": "the-secret"}, max_concurrent_requests=20
    )
    with beam_triton.watch(path, progress_seconds=0), beam.Pipeline(RUNNER) as pipeline:
        _ = pipeline | beam.Create([None]) | beam.FlatMap(elements) | scoring.with_exception_handling()
    return path


def test_the_report_counts_what_the_pipeline_did(report: Path) -> None:
    """Elements, failures with their reason, and the settings without secrets."""
    page = report.read_text(encoding="utf-8")
    assert re.search(rf"<small>{ELEMENTS:,} in [\d.]+ s</small>", page)
    assert f"<b>{BAD}</b><span>failures</span>" in page
    assert "input &#x27;x&#x27; takes FP32 of shape [128], not shape [5]" in page
    assert ">remote_like on http://127.0.0.1:" in page and ">finished<" in page
    assert "<td>max_concurrent_requests</td><td>20</td>" in page
    assert "X-Api-Key" in page and "the-secret" not in page
    assert "at most 64 elements a request" in page


@pytest.mark.chromium
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_the_report_is_a_page_in_a_browser(report: Path, look: str) -> None:
    """Charts that are seen, no word on the console, no request besides the page's own, nothing beside the
    window; the pointer shows figures."""
    from tests.support.chromium import Chromium

    width = 390 if look == "phone" else 1280
    with Chromium() as browser, browser.open(report.as_uri(), width=width, dark=look == "dark") as page:
        assert page.evaluate("document.title").startswith("remote_like on http://")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        boxes = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(each => {"
            "  const box = each.getBoundingClientRect(); return [box.x, box.y, box.width, box.height] })"
        )
        assert len(boxes) == 6
        assert all(box[2] > 300 and box[3] > 100 for box in boxes)
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure')].map(each => "
            "  [...each.querySelectorAll('path.line, path.fill')].some(path => path.getBBox().width > 100))"
        )
        assert drawn == [True] * 6
        colours = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle(document.querySelector('path.line')).stroke]"
        )
        background, text, line = ([int(each) for each in re.findall(r"\d+", colour)] for colour in colours)
        assert (sum(background) < sum(text)) == (look == "dark")
        assert line not in (background, text)
        # The text of a chart stays readable.
        assert page.evaluate("document.querySelector('svg text').getBoundingClientRect().height") >= 8
        x, y, chart_width, chart_height = boxes[0]
        keys = "[...document.querySelectorAll('.key b')].map(each => each.textContent)"
        shown = []
        # A job that begins late, or a moment without an answer, has no latency there.
        for tenth in range(1, 10):
            page.point(x + chart_width * tenth / 10, y + chart_height / 2)
            shown.append(page.evaluate(keys))
        assert all(re.fullmatch(r"[\d,.]+/s", figures[0]) for figures in shown), shown
        assert any(each.endswith("ms") for figures in shown for each in figures), shown
        assert page.evaluate("getComputedStyle(document.querySelector('.cursor')).visibility") == "visible"
        page.point(1, 1)
        assert set(page.evaluate(keys)) == {""}
        assert page.requests == [report.as_uri()]
        assert page.complaints == []


@pytest.mark.chromium
def test_the_page_forbids_what_it_does_not_need(report: Path, tmp_path: Path) -> None:
    """A script that got into it would not run, a picture from elsewhere not be loaded: and the browser that
    looks would say so."""
    from tests.support.chromium import Chromium

    path = tmp_path / "changed.html"
    foreign = '<script>document.title = "taken over"</script><img src="http://127.0.0.1:9/x.png">'
    path.write_text(report.read_text(encoding="utf-8").replace("<footer>", f"{foreign}<footer>"))
    with Chromium() as browser, browser.open(path.as_uri()) as page:
        assert page.evaluate("document.title") != "taken over"
        assert len(page.complaints) >= 2


def test_score_writes_a_report(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the rows of its table, and its failures by kind; the table itself is what it was."""
    write_rows(tmp_path / "rows.jsonl", 3000)
    code = score_files.main(
        [
            *("--files", str(tmp_path / "rows.jsonl"), "--endpoint", triton.endpoint),
            *("--model", "remote_like", "--output", str(tmp_path / "out.jsonl")),
            *("--report", str(tmp_path / "run.html"), "--progress_seconds=0"),
        ]
    )
    assert code == 0
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert f"<td>results</td><td>2,999</td><td>in {tmp_path / 'out.jsonl'}</td>" in page
    assert f"<td>failures</td><td>1</td><td>in {tmp_path / 'out-failures.jsonl'};" in page
    assert "<td>RowError</td><td>1</td>" in page
    assert "<b>1</b><span>failures</span>" in page
    shown = capsys.readouterr()
    assert "results            2,999" in shown.out and shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "{folder}/no/run.html"], r"no/run\.html cannot be written"),
        (["--report", "{folder}/rows.jsonl"], r"name it FILE\.html"),
        (["--report", "run.html", "--runner=FlinkRunner"], "leave it out"),
    ],
)
def test_a_report_that_cannot_be_is_wrong_use(
    triton: LocalTriton,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before the job begins; the input is not overwritten."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 10)
    before = rows.read_bytes()
    code = score_files.main(
        [
            *("--files", str(rows), "--endpoint", triton.endpoint, "--model", "remote_like"),
            *("--output", str(tmp_path / "out.jsonl"), "--progress_seconds=0"),
            *(each.format(folder=tmp_path) for each in arguments),
        ]
    )
    assert code == 2
    assert re.search(message, capsys.readouterr().err)
    assert rows.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


def score_command(triton: LocalTriton, folder: Path, count: int) -> list[str]:
    write_rows(folder / "rows.jsonl", count)
    return [
        *(sys.executable, "-m", "beam_triton", "score", "--files", str(folder / "rows.jsonl")),
        *("--endpoint", triton.endpoint, "--model", "remote_like", "--batch_size=8"),
        *("--output", str(folder / "out.jsonl"), "--max_concurrent_requests=4"),
    ]


def test_score_draws_a_picture_on_a_terminal(triton: LocalTriton, tmp_path: Path) -> None:
    """While it works; in the end the table stands in its place."""
    pytest.importorskip("rich", reason="need rich (pip install beam-triton[live])")
    pytest.importorskip("pyte", reason="need pyte")
    from tests.support.pseudo_terminal import PseudoTerminal

    with PseudoTerminal(score_command(triton, tmp_path, 6000)) as terminal:
        terminal.wait_until(lambda: bool(re.search(r"limit +[1-4] .*[▁-█]", terminal.text)))
        terminal.wait_until(lambda: bool(re.search(r"latency +2\d(\.\d)? ms", terminal.text)))
        assert re.search(r"elements .*/s .* done, \d+% read", terminal.text)
        assert "batches of 8" in terminal.text
        assert terminal.wait() == 0
        lines = [line for line in terminal.lines if line]
    assert lines[0].startswith("  elements           6,000"), lines
    assert any(line.startswith("  time") for line in lines), lines


def test_score_is_interrupted_as_without_a_picture(triton: LocalTriton, tmp_path: Path) -> None:
    """Exit code 130, one line, a cursor that shows, and no file."""
    pytest.importorskip("rich", reason="need rich (pip install beam-triton[live])")
    pytest.importorskip("pyte", reason="need pyte")
    from tests.support.pseudo_terminal import PseudoTerminal

    arguments = [*score_command(triton, tmp_path, 60_000), "--report", str(tmp_path / "run.html")]
    with PseudoTerminal(arguments) as terminal:
        terminal.wait_until(lambda: "done" in terminal.text)
        terminal.press(b"\x03")
        assert terminal.wait() == 130
        assert not terminal.screen.cursor.hidden
        assert [line for line in terminal.lines if line][-1].endswith("interrupted; no result was written")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows.jsonl", "run.html"]
    assert re.search(
        r">(interrupted|failed: [^<]*KeyboardInterrupt[^<]*)<", (tmp_path / "run.html").read_text()
    )
