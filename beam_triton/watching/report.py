"""The report of a run: one HTML file with its charts, which loads nothing and sends nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

from beam_triton.watching.charts import LEFT, RIGHT, WIDTH, Chart, Series
from beam_triton.watching.history import History, quantile
from beam_triton.watching.terminal import headline
from beam_triton.watching.units import clock, duration, number, size, span


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows.

    Attributes:
        began_at: in UTC.
        outcome: ``running``, ``finished``, ``interrupted``, or ``failed: …``.
        facts: rows of the summary besides those of the requests: name, value, remark.
    """

    history: History
    title: str
    began_at: datetime
    outcome: str
    facts: Sequence[tuple[str, str, str]] = ()


def report_html(report: Report) -> str:
    """The page. Whatever comes from users and servers is text in it, never markup."""
    history = report.history
    charts = _charts(history)
    title = report.title or headline(history)
    is_running = report.outcome == "running"
    state = report.outcome.partition(":")[0]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        # Written again in a minute.
        '<meta http-equiv="refresh" content="60">' if is_running else "",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        f'<header><h1>{html.escape(title)}</h1><p class="state {state}">{html.escape(report.outcome)}</p>',
        f'<p class="when">{report.began_at:%d %B %Y, %H:%M:%S} UTC · ',
        f"{span(history.total.seconds)}</p></header>",
        _tiles(history),
    ]
    if not history.total.requests:
        parts.append(
            '<p class="hint">No request of this process has ended while it was watched. Workers in other '
            "processes or on other machines are not seen.</p>"
        )
    parts.append('<section class="charts">')
    for index, chart in enumerate(charts):
        legend = "".join(
            f'<span class="key c{each.colour} {each.kind}"><i></i>'
            f'{html.escape(each.name)} <b data-series="{index}.{number_}"></b></span>'
            for number_, each in enumerate(chart.series)
        )
        parts.append(
            f"<figure><figcaption><h2>{html.escape(chart.title)}</h2>"
            f'<p class="legend">{legend}</p></figcaption>{chart.svg()}</figure>'
        )
    parts += [
        "</section>",
        _table("Summary", _summary(report), ("", "", "")),
        _failures(history),
        *(
            _table(f"Settings of {model.name}", [("model", model.description), *model.settings.items()])
            for model in history.models
        ),
        f"<footer>{html.escape(_versions())}. A point of a chart stands for "
        f"{duration(max((each.seconds for each in history.samples), default=0.0))}.</footer></main>",
        f'<script type="application/json" id="data">{_data(charts)}</script>',
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(filter(None, parts))


def _charts(history: History) -> list[Chart]:
    samples = history.samples
    times = [each.start + each.seconds / 2 for each in samples]
    seconds = history.total.seconds

    def rates(counts: Iterable[int]) -> list[float | None]:
        return [count / each.seconds for count, each in zip(counts, samples, strict=True)]

    def sizes(q: float) -> list[float | None]:
        return [quantile(each.sizes, q) for each in samples]

    throughput = [Series("elements", 1, rates(each.done for each in samples), "area")]
    if history.total.failures:
        throughput.append(Series("failures", 6, rates(each.failures for each in samples), "marks"))
    percentiles = [
        Series(f"p{round(q * 100)}", colour, [each.latency(q) for each in samples])
        for q, colour in ((0.99, 5), (0.95, 4), (0.5, 3))
    ]
    waiting = [Series("waiting for their turn", 4, [each.waiting for each in samples], "dashed")]
    return [
        Chart("Elements per second", "rate", times, seconds, throughput),
        Chart("Latency of requests", "duration", times, seconds, percentiles, is_logarithmic=True),
        Chart(
            "Requests in flight",
            "number",
            times,
            seconds,
            [
                Series("in flight", 2, [each.in_flight for each in samples], "area"),
                Series("limit", 5, [each.limit for each in samples]),
                *(waiting if any(each.waiting for each in samples) else ()),
            ],
        ),
        Chart(
            "Wait in the server's queue",
            "duration",
            times,
            seconds,
            [Series("per request", 5, [each.queue_seconds for each in samples], "area")],
        ),
        Chart(
            "Elements in a request",
            "number",
            times,
            seconds,
            [
                Series("p5 to p95", 3, sizes(0.95), "band", sizes(0.05)),
                Series("median", 3, sizes(0.5)),
            ],
        ),
        Chart(
            "Connections",
            "number",
            times,
            seconds,
            [
                Series("active", 2, [each.active for each in samples], "area"),
                Series("idle", 4, [each.idle for each in samples]),
            ],
        ),
    ]


def _tiles(history: History) -> str:
    total, samples = history.total, history.samples
    percentiles = {q: total.latency(q) for q in (0.5, 0.95, 0.99)}
    p50, p95, p99 = ("-" if each is None else duration(each) for each in percentiles.values())
    batch = quantile(total.sizes, 0.5)
    queues = [each.queue_seconds for each in samples if each.queue_seconds is not None]
    limits = [each.limit for each in samples if each.limit is not None]
    tiles = [
        (
            f"{total.done / (total.seconds or 1):,.0f}",
            "elements/s",
            f"{total.done:,} in {span(total.seconds)}",
            "",
        ),
        (p50, "latency, median", f"p95 {p95}, p99 {p99}", ""),
        ("-" if batch is None else f"{batch:,}", "elements in a request", f"{total.requests:,} requests", ""),
        (
            number(max(limits)) if limits else "-",
            "limit, at most",
            f"{number(total.in_flight)} in flight on average",
            "",
        ),
        (
            duration(sum(queues) / len(queues)) if queues else "-",
            "in the server's queue",
            f"{duration(max(queues))} at most" if queues else "no queue was looked for",
            "",
        ),
        (
            f"{total.failures:,}",
            "failures",
            f"{100 * total.failures / total.done:.2g}% of the elements"
            if total.failures
            else "every element has a result",
            "bad" if total.failures else "good",
        ),
    ]
    if not total.done:
        tiles[-1] = ("0", "failures", "no element so far", "")
    return (
        '<section class="tiles">'
        + "".join(
            f'<div class="{style}"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
            f"<small>{html.escape(remark)}</small></div>"
            for value, name, remark, style in tiles
        )
        + "</section>"
    )


def _summary(report: Report) -> list[tuple[str, str, str]]:
    total = report.history.total
    seconds = total.seconds or 1
    batch = total.elements / (total.requests or 1)
    unhealthy = total.unhealthy
    return [
        *report.facts,
        ("requests", f"{total.requests:,}", f"{number(batch)} elements each, {total.retries:,} sent again"),
        ("sent", size(total.request_bytes), f"{size(total.request_bytes / seconds)}/s"),
        ("received", size(total.response_bytes), f"{size(total.response_bytes / seconds)}/s"),
        ("connections", f"{total.opened:,}", "opened"),
        *([("unhealthy", str(unhealthy), "endpoints at the worst moment")] if unhealthy else []),
        *(("model", "", each) for each in report.history.servers),
    ]


def _failures(history: History) -> str:
    if not history.reasons:
        return ""
    rows = [
        (kind, f"{reason.count:,}", clock(reason.at), " ".join(reason.message.split()))
        for kind, reason in history.reasons.items()
    ]
    return _table("Failures", rows, ("kind", "elements", "first at", "the first one"))


def _table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    heads = "".join(f"<th>{html.escape(each)}</th>" for each in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    top = f"<thead><tr>{heads}</tr></thead>" if any(head) else ""
    return (
        f'<section class="table {title.partition(" ")[0].lower()}"><h2>{html.escape(title)}</h2>'
        f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div></section>'
    )


def _data(charts: Sequence[Chart]) -> str:
    """The charts' values for the script, which shows those under the pointer."""

    def rounded(values: Iterable[float | None]) -> list[float | None]:
        return [None if value is None else float(f"{value:.3g}") for value in values]

    times = [round(time, 2) for time in charts[0].times]
    series = [[rounded(each.values) for each in chart.series] for chart in charts]
    data = {
        "seconds": charts[0].seconds,
        "times": times,
        "units": [chart.unit for chart in charts],
        "series": series,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
    }
    # No text of anybody's, which could end the script.
    return json.dumps(data, separators=(",", ":"))


def _versions() -> str:
    names = []
    for package in ("beam-triton", "apache-beam"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*names, f"Python {platform.python_version()}"])


_STYLE = """
:root {
  --page: #f6f7f9; --card: #fff; --text: #1b2330; --soft: #5c6676; --line: #e3e7ed;
  --c1: #16895b; --c2: #1f6fd6; --c3: #1f6fd6; --c4: #b7791f; --c5: #8a3ffc; --c6: #d1343f;
  --good: #16895b; --bad: #d1343f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --text: #e6eaf0; --soft: #98a3b3; --line: #2b333f;
    --c1: #3fc48a; --c2: #5aa2ff; --c3: #5aa2ff; --c4: #e0a94a; --c5: #b794ff; --c6: #ff6b74;
    --good: #3fc48a; --bad: #ff6b74;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 40px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; margin-bottom: 18px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 14px; margin: 0; font-weight: 600; }
.when { flex-basis: 100%; margin: 0; color: var(--soft); }
.state { margin: 0; padding: 1px 10px; border-radius: 99px; font-size: 12px; background: var(--line); }
.state { overflow-wrap: anywhere; }
.finished { color: var(--good); }
.failed, .interrupted { color: var(--bad); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles div, figure, .table {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.tiles div { padding: 14px 16px; display: flex; flex-direction: column; }
.tiles b { font-size: 26px; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles small { color: var(--soft); font-size: 12px; }
.good b { color: var(--good); }
.bad b { color: var(--bad); }
.hint { border-left: 3px solid var(--c4); padding: 4px 12px; color: var(--soft); }
.charts { display: grid; gap: 12px; margin: 12px 0; }
.charts { grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); }
figure { margin: 0; padding: 14px 16px 8px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; }
figcaption { margin-bottom: 8px; }
.legend { margin: 0; color: var(--soft); font-size: 12px; display: flex; flex-wrap: wrap; gap: 0 14px; }
.key i { display: inline-block; width: 14px; margin: 0 3px 4px 0; border-top: 2px solid var(--c); }
.key.dashed i { border-top-style: dashed; }
.key.band i { border-top-width: 8px; margin-bottom: 0; opacity: .3; }
.key.marks i { width: 2px; border-top-width: 9px; margin-bottom: 0; }
.key b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums; }
svg .none { font-size: 13px; }
.grid { stroke: var(--line); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 4 3; }
.fill { fill: var(--c); opacity: .15; }
.cursor { stroke: var(--soft); visibility: hidden; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.table { padding: 14px 16px; margin-top: 12px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 6px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 400; font-size: 12px; }
td, th { padding: 5px 16px 5px 0; vertical-align: top; }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere; }
td:first-child { width: 14em; color: var(--soft); overflow-wrap: normal; }
.failures td:first-child { color: var(--bad); }
.failures td:not(:last-child) { white-space: nowrap; }
.summary td:last-child, .failures td:last-child { width: 60%; }
footer { margin-top: 18px; color: var(--soft); font-size: 12px; }
@media (max-width: 520px) {
  .charts { grid-template-columns: 1fr; }
  .summary table, .failures table { min-width: 560px; }
  td:first-child { width: 9em; }
  svg text { font-size: 14px; }
}
@media print { body { background: none; } figure, section > div { break-inside: avoid; } }
"""

_SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const pictures = [...document.querySelectorAll("figure svg")];
  const number = value => value >= 9.95 ? Math.round(value).toLocaleString("en") : String(+value.toFixed(1));
  const duration = value => value < 999.5e-6 ? +(value * 1e6).toPrecision(3) + " µs"
    : value < .9995 ? +(value * 1e3).toPrecision(3) + " ms" : +value.toPrecision(3) + " s";
  const write = { number, rate: value => number(value) + "/s", duration };
  const show = index => {
    for (const place of document.querySelectorAll("[data-series]")) {
      const [chart, series] = place.dataset.series.split(".");
      const value = index === null ? null : data.series[chart][series][index];
      place.textContent = value === null ? "" : write[data.units[chart]](value);
    }
    const x = index === null ? 0 : data.left + (data.right - data.left) * data.times[index] / data.seconds;
    for (const line of document.querySelectorAll(".cursor")) {
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.style.visibility = index === null ? "hidden" : "visible";
    }
  };
  for (const picture of pictures) {
    picture.addEventListener("pointermove", event => {
      const box = picture.getBoundingClientRect();
      const x = (event.clientX - box.left) * data.width / box.width;
      const time = (x - data.left) / (data.right - data.left) * data.seconds;
      let nearest = null;
      data.times.forEach((each, index) => {
        if (nearest === null || Math.abs(each - time) < Math.abs(data.times[nearest] - time)) nearest = index;
      });
      show(nearest);
    });
    picture.addEventListener("pointerleave", () => show(null));
  }
})();
"""

# Only this page's own style and script; nothing is loaded from anywhere.
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'"
)
