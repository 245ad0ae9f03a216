"""Fleets of processes and servers: what the simulation says, and what was measured where both can be had."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, CaseLeftOut, Scale
from benchmarks.cases.situations import keep_busy
from benchmarks.fleet import Ended, Event, Fleet, Outcome, quantile, simulate
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Curves, Point, Row
from tests.support.models import sleeping
from tests.support.nginx import LoggedAnswer, Nginx, nginx_binary

_RATE, _P50, _P99 = "rate / best", "p50 / model's time", "p99 / model's time"
_LEAST, _MOST = "least share", "most share"
_CONNECTIONS, _OPENED = "most connections at a server", "opened a second at a server"
_QUESTIONS = "questions a second at a server"
_RETRIES, _LOST, _WASTED = "retries / requests", "lost", "wasted / executed"


def _measures(outcome: Outcome, begin: float, end: float = math.inf) -> dict[str, float]:
    """What a fleet reaches between two times, in seconds from its start."""
    fleet = outcome.fleet
    end = min(end, fleet.seconds)
    answers = outcome.between(begin, end)
    latencies = [each.latency_seconds for each in answers]
    shares = Counter(each.process for each in answers)
    fair = len(answers) / fleet.processes
    counts = [shares[number] for number in range(fleet.processes)]
    opened = sum(count for second, count in outcome.opened.items() if begin <= second < end)
    ended = len(outcome.ended)
    return {
        _RATE: len(answers) / (end - begin) / fleet.capacity,
        _P50: quantile(latencies, 0.5) / fleet.model_seconds,
        _P99: quantile(latencies, 0.99) / fleet.model_seconds,
        _LEAST: min(counts) / fair if fair else 0.0,
        _MOST: max(counts) / fair if fair else 0.0,
        _CONNECTIONS: float(outcome.most_connections),
        _OPENED: opened / (end - begin) / fleet.servers,
        _QUESTIONS: outcome.questions / fleet.seconds / fleet.servers,
        _RETRIES: sum(each.attempts - 1 for each in outcome.ended) / max(1, ended),
        _LOST: float(sum(outcome.errors.values())),
        _WASTED: outcome.wasted / max(1, sum(outcome.executed.values())),
    }


def _picked(measures: Mapping[str, float], *names: str) -> dict[str, list[float]]:
    return {name: [measures[name]] for name in names}


# Growing fleets.

_PROCESSES = (1, 10, 100, 1000)
_SERVERS = (1, 4, 20, 100)


def _sizes(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Every number of processes against every number of servers, with default options."""
    rows, points = [], []
    for processes in scale.points(_PROCESSES):
        for servers in scale.points(_SERVERS):
            # A process learns from each answer: where it gets few, that takes longer.
            seconds = scale.seconds(80.0 if processes > 10 * servers else 30.0, least=3.0)
            fleet = Fleet(processes, servers, seconds=seconds, ramp_seconds=seconds / 4)
            measures = _measures(simulate(fleet), 0.6 * seconds)
            name = f"{processes:,} with {servers:,}"
            picked = (_RATE, _P50, _P99, _LEAST, _MOST, _CONNECTIONS, _OPENED, _QUESTIONS, _LOST)
            rows.append(Row.of(name, _picked(measures, *picked)))
            points.append((processes, servers, measures))
            print(f"  {name}: {measures}", flush=True)
    curves = [
        Curves(
            f"fleet_{short}",
            title,
            "processes",
            quantity,
            [
                Point(processes, f"{servers} servers" if servers > 1 else "1 server", measures[quantity])
                for processes, servers, measures in points
            ],
            logarithmic_y=quantity is not _RATE,
            y_start=0.0 if quantity is _RATE else None,
        )
        for short, title, quantity in (
            ("rate", "Share of the servers' capacity that a fleet uses", _RATE),
            ("p99", "Latency of a fleet, as multiples of the model's time", _P99),
            ("connections", "Connections at a server", _CONNECTIONS),
        )
    ]
    return CaseResult(SIZES_CASE.name, SIZES_CASE.title, rows, curves=curves)


# Settings, for a job of many processes.


def _settings(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """A thousand processes with twenty servers: ways to reach them, and options."""
    seconds = scale.seconds(100.0, least=3.0)
    base = Fleet(scale.count(1000, least=8), 20, seconds=seconds, ramp_seconds=seconds / 4)
    one = {"max_concurrent_requests": 1}
    fleets = {
        "defaults, a list of servers": base,
        "max_concurrent_requests=1": replace(base, options=one),
        "max_concurrent_requests=4": replace(base, options={"max_concurrent_requests": 4}),
        "one balanced URL": replace(base, is_balanced=True),
        "one balanced URL, max_concurrent_requests=1": replace(base, is_balanced=True, options=one),
        "defaults, servers without statistics": replace(base, has_statistics=False),
        "defaults, queues of 32 at most": replace(base, max_queue_size=32),
        "defaults, a model of 1 s": replace(base, model_seconds=1.0),
        "streaming: 0.5 requests a second each": replace(base, requests_per_second=0.5),
    }
    rows = []
    for name, fleet in fleets.items():
        measures = _measures(simulate(fleet), 0.6 * seconds)
        picked = (_RATE, _P50, _P99, _LEAST, _MOST, _CONNECTIONS, _OPENED, _RETRIES, _WASTED, _LOST)
        rows.append(Row.of(name, _picked(measures, *picked)))
        print(f"  {name}: {measures}", flush=True)
    return CaseResult(SETTINGS_CASE.name, SETTINGS_CASE.title, rows)


# What happens to servers.

_EVENT_SHARE = 0.4
_BEFORE, _AFTER, _LATER = "rate / best before", "in the 10 s after", "later"
_P99_AFTER = "p99 / model's time after"


def _events(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """A server that is lost, vanishes, joins or becomes slow, in a fleet of 100 processes with 10 servers."""
    seconds = scale.seconds(100.0, least=8.0)
    base = Fleet(
        scale.count(100, least=4),
        10,
        seconds=seconds,
        ramp_seconds=seconds / 10,
    )
    at = _EVENT_SHARE * seconds
    events = {
        "a server is killed": Event(at, "lost"),
        "a server vanishes": Event(at, "vanished"),
        "a server is added": Event(at, "added", base.servers - 1),
        "a server becomes five times slower": Event(at, "slowed", factor=5.0),
    }
    situations = {
        f"{way}: {what}": replace(base, is_balanced=is_balanced, events=[event])
        for way, is_balanced in (("a list", False), ("one balanced URL", True))
        for what, event in events.items()
    }
    rows, points = [], []
    for name, fleet in situations.items():
        outcome = simulate(fleet)
        before = outcome.rate(at / 2, at) / _capacity(fleet, before=True)
        best_after = _capacity(fleet, before=False)
        after = outcome.rate(at, min(at + 10.0, seconds)) / best_after
        later = outcome.rate(at + (seconds - at) / 2, seconds) / best_after
        measures = _measures(outcome, at)
        rows.append(
            Row.of(
                name,
                {
                    _BEFORE: [before],
                    _AFTER: [after],
                    _LATER: [later],
                    _P99_AFTER: [measures[_P99]],
                    **_picked(measures, _RETRIES, _WASTED, _LOST),
                },
            )
        )
        by_second = Counter(int(each.at) for each in outcome.ended if each.error is None)
        for second in range(0, int(seconds), 2):
            answers = by_second[second] + by_second[second + 1]
            points.append(Point(float(second), name, answers / 2 / base.capacity))
        print(f"  {name}: {before} {after} {later} {measures}", flush=True)
    curves = [
        Curves(
            f"fleet_events_{short}",
            f"Answers a second while something happens at {at:.0f} s: {way}",
            "seconds",
            "share of ten servers' capacity",
            [
                Point(point.x, point.setting.partition(": ")[2], point.y)
                for point in points
                if point.setting.startswith(way)
            ],
            logarithmic_x=False,
            logarithmic_y=False,
            y_start=0.0,
        )
        for short, way in (("list", "a list"), ("balanced", "one balanced URL"))
    ]
    return CaseResult(EVENTS_CASE.name, EVENTS_CASE.title, rows, curves=curves)


def _capacity(fleet: Fleet, *, before: bool) -> float:
    """Requests a second that the servers can execute before or after its event."""
    (event,) = fleet.events
    servers = float(fleet.servers)
    if event.kind == "added":
        servers -= before
    elif not before:
        servers -= 1.0 if event.kind in ("lost", "vanished") else 1.0 - 1.0 / event.factor
    return servers * fleet.instances / fleet.model_seconds


# Beside real servers.

_PREDICTED = ", predicted"
_COMPARED = (_RATE, _P50, _P99, _LEAST, _MOST)


def _measured(_: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The same fleets, small enough for one machine, in the simulation and with real Tritons.

    An nginx in front of each Triton writes down when it got each request, how long its answer took and who
    sent it.
    """
    if nginx_binary() is None:
        raise CaseLeftOut("nginx is not installed (Debian: apt-get install nginx-light)")
    seconds = scale.seconds(18.0, least=8.0)
    base = Fleet(
        8, 4, 4, model_seconds=0.1, model_spread=0.0, seconds=seconds, ramp_seconds=2.0, cpu_seconds=0.6e-3
    )
    one = {"max_concurrent_requests": 1}
    at = seconds / 2
    fleets = {
        "1 process, 1 server of 16 instances": replace(base, processes=1, servers=1, instances=16),
        "8 processes, 4 servers of 4": base,
        "16 processes, 4 servers of 1": replace(base, processes=16, instances=1),
        "16 processes, 4 servers of 4, one request each": replace(base, processes=16, options=one),
        "8 processes, 4 servers of 4, one killed": replace(base, events=[Event(at, "lost")]),
        "8 processes, 4 servers of 4, one five times slower": replace(
            base, events=[Event(0.0, "slowed", factor=5.0)]
        ),
    }
    rows = []
    for name, fleet in list(fleets.items())[: len(fleets) if scale.factor >= 0.01 else 1]:
        runs = [_run(fleet) for _ in range(rounds)]
        simulated = [simulate(replace(fleet, seed=seed)) for seed in range(1, 4)]
        begin = fleet.events[0].at + 2.0 if fleet.events and fleet.events[0].at else seconds / 3
        predicted = [_measures(outcome, begin) for outcome in simulated]
        measured = [_measures(run, begin) for run in runs]
        rows.append(
            Row(
                name,
                {
                    quantity + suffix: Row.of(name, {quantity: [each[quantity] for each in found]}).measured[
                        quantity
                    ]
                    for quantity in _COMPARED
                    for suffix, found in (("", measured), (_PREDICTED, predicted))
                },
            )
        )
        for suffix, found in (("measured", measured), ("predicted", predicted)):
            medians = {each: statistics.median(run[each] for run in found) for each in _COMPARED}
            print(f"  {name}, {suffix}: {medians}", flush=True)
    return CaseResult(MEASURED_CASE.name, MEASURED_CASE.title, rows, rounds=rounds)


def _run(fleet: Fleet) -> Outcome:
    """The fleet with real Tritons; its outcome has what nginx has seen."""
    slowed = {event.server: event.factor for event in fleet.events if event.kind == "slowed"}
    with ExitStack() as stack:
        servers: list[LocalTriton] = []
        proxies: list[Nginx] = []
        answers: list[LoggedAnswer] = []
        for number in range(fleet.servers):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="beam_triton_fleet_")))
            model_seconds = fleet.model_seconds * slowed.get(number, 1.0)
            sleeping("busy", model_seconds, instances=fleet.instances).write(folder)
            servers.append(stack.enter_context(LocalTriton(folder)))
            port = int(servers[-1].endpoint.rpartition(":")[2])
            proxies.append(stack.enter_context(Nginx([port], access_log=True)))
            with TritonClient(servers[-1].endpoint) as client:
                client.infer("busy", {"x": np.zeros((1, 1), np.float32)})
        endpoints = [proxy.endpoint for proxy in proxies]
        threads = stack.enter_context(ThreadPoolExecutor(fleet.processes))
        begin = time.time()
        end = begin + fleet.seconds
        runs = []
        for number in range(fleet.processes):
            time.sleep(max(0.0, begin + fleet.ramp_seconds * number / fleet.processes - time.time()))
            busy = partial(keep_busy, endpoints, "busy", str(number), end, **fleet.options)
            runs.append(threads.submit(run_in_fresh_process, busy))
        for event in fleet.events:
            if event.kind == "lost":
                time.sleep(max(0.0, begin + event.at - time.time()))
                # With its nginx, which would answer for it.
                answers += proxies[event.server].answers()
                proxies.pop(event.server).stop()
        for run in runs:
            run.result()
        answers += itertools.chain.from_iterable(proxy.answers() for proxy in proxies)
    outcome = Outcome(fleet)
    for answer in answers:
        if answer.status == 200 and answer.sender != "-":
            outcome.ended.append(
                Ended(answer.at - begin, int(answer.sender), answer.seconds, answer.seconds, 1, None)
            )
    return outcome


SIZES_CASE = Case("fleet", "Fleets of any size, simulated", _sizes)
SETTINGS_CASE = Case("fleet_settings", "1,000 processes with 20 servers, simulated", _settings)
EVENTS_CASE = Case("fleet_events", "What happens to servers, simulated", _events)
MEASURED_CASE = Case("fleet_measured", "Fleets, simulated and measured", _measured)
CASES = (SIZES_CASE, SETTINGS_CASE, EVENTS_CASE, MEASURED_CASE)
