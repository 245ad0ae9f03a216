"""The report as a page, and its charts as drawings."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime, timezone
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from beam_triton.dispatch.activity import OpenedModel
from beam_triton.watching.charts import BOTTOM, HEIGHT, TOP, Chart, Series
from beam_triton.watching.history import History, Sample
from beam_triton.watching.report import Report, report_html
from beam_triton.watching.units import clock, duration, number, size, span

HOSTILE = """</script></style><script>alert(1)</script><img src=x onerror="alert(2)">'&amp;"""


def history(seconds: int = 20) -> History:
    """Samples of a second with a hundred requests of 32 elements, none in the fifth."""
    made = History()
    for index in range(seconds):
        count = 0 if index == 5 else 100
        made.add(
            Sample(
                start=float(index),
                seconds=1.0,
                elements=32 * count,
                requests=count,
                latencies=Counter({155: count}) if count else Counter(),
                sizes=Counter({32: count}) if count else Counter(),
                in_flight=4.0,
                limit=6.0,
                active=4.0,
            )
        )
    return made


def page_of(made: History, title: str = "", outcome: str = "finished") -> str:
    began_at = datetime(2026, 11, 28, 6, 30, 5, tzinfo=timezone.utc)
    return report_html(Report(history=made, title=title, began_at=began_at, outcome=outcome))


def test_what_users_and_servers_say_is_text() -> None:
    """Titles, messages, names and settings cannot become markup, in the page, its data or its title."""
    made = history()
    made.failed(HOSTILE, HOSTILE, 3, 1.0)
    made.servers[HOSTILE] = None
    made.models.append(OpenedModel(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}))
    page = page_of(made, HOSTILE, f"failed: {HOSTILE}")
    tags: Counter[str] = Counter()
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags[tag] += 1
            assert not any(name.startswith("on") for name, _ in attributes)

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Reader().feed(page)
    assert tags["script"] == 2 and tags["style"] == 1 and tags["img"] == 0
    assert texts.count(HOSTILE) == 8


def test_nothing_of_the_page_lies_elsewhere() -> None:
    """No address but those in its text, and a policy that forbids to load any."""
    page = page_of(history())
    assert re.findall(r"\s(?:src|href|srcset|action)=|url\(|@import", page) == []
    assert "default-src 'none'" in page
    assert 'http-equiv="refresh"' not in page
    assert 'http-equiv="refresh" content="60"' in page_of(history(), outcome="running")


def test_the_figures_are_those_of_the_history() -> None:
    """In the tiles, the summary and the data under the pointer."""
    page = page_of(history())
    assert "<b>3,040</b><span>elements/s</span><small>60,800 in 20.0 s</small>" in page
    assert "<b>32</b><span>elements in a request</span><small>1,900 requests</small>" in page
    assert "<td>requests</td><td>1,900</td><td>32 elements each, 0 sent again</td>" in page
    assert "28 November 2026, 06:30:05 UTC" in page
    assert "every element has a result" in page
    found = re.search(r'id="data">(.*?)</script>', page)
    assert found is not None
    data = json.loads(found[1])
    assert data["series"][0][0][:7] == [3200.0, 3200.0, 3200.0, 3200.0, 3200.0, 0.0, 3200.0]
    assert data["series"][1][2][4:7] == [pytest.approx(0.0188, rel=0.1), None, pytest.approx(0.0188, rel=0.1)]


def test_a_run_without_a_request_says_why() -> None:
    """An empty page would look like a fault."""
    page = page_of(History())
    assert "No request of this process has ended" in page
    assert page.count("not seen</text>") == 6


def chart(
    *series: Series, seconds: float = 4.0, unit: str = "number", log: bool = False
) -> ElementTree.Element:
    times = [0.5 + index for index in range(len(series[0].values))]
    drawing = Chart("Title", unit, times, seconds, series, is_logarithmic=log).svg()
    return ElementTree.fromstring(drawing)


def paths(drawing: ElementTree.Element, style: str) -> list[list[tuple[float, float]]]:
    found = [each.attrib["d"] for each in drawing.iter("path") if style in each.attrib["class"].split()]
    numbers = [[float(each) for each in re.findall(r"[\d.]+", path)] for path in found]
    return [list(zip(each[::2], each[1::2], strict=True)) for each in numbers]


def labels(drawing: ElementTree.Element) -> list[str | None]:
    return [each.text for each in drawing.iter("text")]


def test_a_gap_is_not_bridged() -> None:
    """A line for each part, a short one for a single point; nothing lies outside of the chart."""
    first, second = paths(chart(Series("a", 1, [0.0, 100.0, None, 50.0])), "line")
    assert [round(y) for _, y in first] == [HEIGHT - BOTTOM, TOP]
    assert len({y for _, y in second}) == 1 and len(second) == 2


def test_steps_are_those_that_people_count_in() -> None:
    """From 0 to the highest value or a little more."""
    assert labels(chart(Series("a", 1, [0.0, 7.0, 3.0, 1.0])))[:5] == ["0", "2", "4", "6", "8"]
    assert labels(chart(Series("a", 1, [1.0, 1.0, 1.0, 1.0]), unit="rate"))[0] == "0"
    assert labels(chart(Series("a", 1, [1e6, 0.0, 3e6, None])))[-6] == "3,000,000"
    assert labels(chart(Series("a", 1, [None, None, None, None])))[-1] == "not seen"


def test_a_slow_answer_leaves_the_others_their_height_on_a_logarithmic_scale() -> None:
    """The labels begin and end around the values."""
    drawing = chart(Series("a", 1, [0.02, 0.03, 2.0, 0.025]), unit="duration", log=True)
    assert labels(drawing)[0] == "10 ms" or labels(drawing)[0] == "20 ms"
    ((*_, last),) = paths(drawing, "line")
    assert last[1] < HEIGHT - BOTTOM - 3
    one = chart(Series("a", 1, [0.5, 0.5, 0.5, 0.5]), unit="duration", log=True)
    assert labels(one)[0] == "500 ms"


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (4.0, ["0", "1 s", "2 s", "3 s", "4 s"]),
        (90.0, ["0", "15 s", "30 s", "45 s", "1:00", "1:15", "1:30"]),
        (1200.0, ["0", "5 min", "10 min", "15 min", "20 min"]),
        (7200.0, ["0", "30 min", "1:00 h", "1:30 h", "2:00 h"]),
        (86400.0, ["0", "4 h", "8 h", "12 h", "16 h", "20 h", "24 h"]),
    ],
)
def test_times_are_labelled(seconds: float, wanted: list[str]) -> None:
    """Seven at most, from the beginning."""
    drawing = chart(Series("a", 1, [1.0, 1.0]), seconds=seconds)
    assert labels(drawing)[-len(wanted) :] == wanted


def test_numbers_are_short() -> None:
    """Three digits of what is measured, all digits of what is counted."""
    assert [number(each) for each in (0, 1.25, 3.0, 9.97, 1234.5)] == ["0", "1.2", "3", "10", "1,234"]
    assert [duration(each) for each in (0.00085, 0.0123, 0.9996, 1.2, 150.0)] == [
        *("850 µs", "12.3 ms", "1 s", "1.2 s", "150 s"),
    ]
    assert [clock(each) for each in (7, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
    assert [span(each) for each in (7.23, 59.97, 754, 3723)] == [
        "7.2 s",
        "1 min 0 s",
        "12 min 34 s",
        "1 h 2 min",
    ]
    assert [size(each) for each in (12, 12_345, 12_345_678, 2e9)] == ["12 B", "12.3 kB", "12.3 MB", "2 GB"]
