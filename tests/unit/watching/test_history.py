"""Samples of a run: what they add up to, how many there are, and what makes them."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from contextlib import closing

import pytest

from beam_triton.dispatch.activity import ACTIVITY, EndedRequest, FailedElements
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.errors import InvalidRequestError
from beam_triton.policy.server_times import ServerTimes
from beam_triton.watching.history import SAMPLE_SECONDS, History, Sample, Sampler, quantile, spread
from tests.support import faults
from tests.support.answers import Answer, always
from tests.support.dispatching import open_channel, post, read
from tests.support.fault_server import FaultServer

OK = always(Answer(200, b"answer"))


def sample(index: int) -> Sample:
    """The one of that index, of which each has different counts."""
    return Sample(
        start=index * SAMPLE_SECONDS,
        seconds=SAMPLE_SECONDS,
        elements=index % 7,
        failures=index % 3,
        latencies=Counter({index % 200: 2}),
        in_flight=float(index % 10),
        limit=12.0,
        queue_seconds=0.25 if index % 2 else None,
    )


def test_a_history_of_hours_is_as_large_as_one_of_minutes() -> None:
    """Neighbours are merged; nothing is lost of the sums, and the means stay what they were."""
    history = History()
    count = round(6 * 3600 / SAMPLE_SECONDS)
    for index in range(count):
        history.add(sample(index))
        assert len(history.samples) <= 720
        assert len(history.recent) <= 60 / SAMPLE_SECONDS + 1
    assert len(history.samples) > 300
    for name in ("elements", "failures"):
        wanted = sum(getattr(sample(index), name) for index in range(count))
        assert getattr(history.total, name) == wanted
        assert sum(getattr(each, name) for each in history.samples) == wanted
    assert sum(sum(each.latencies.values()) for each in history.samples) == 2 * count
    assert history.total.seconds == pytest.approx(6 * 3600)
    ends = [each.start + each.seconds for each in history.samples]
    assert ends[:-1] == pytest.approx([each.start for each in history.samples[1:]])
    assert history.total.in_flight == pytest.approx(4.5, abs=0.01)
    assert {each.limit for each in history.samples} == {12.0}
    assert history.total.queue_seconds == pytest.approx(0.25)


def test_samples_that_come_late_are_merged_as_well() -> None:
    """Threads wake when they can: no sample has the length of the others."""
    history, start, chance = History(), 0.0, random.Random(3)
    for _ in range(20_000):
        seconds = SAMPLE_SECONDS * chance.uniform(1.0, 1.3)
        history.add(Sample(start=start, seconds=seconds, elements=1))
        start += seconds
    assert 300 < len(history.samples) <= 720
    assert history.total.elements == 20_000


def test_percentiles_are_those_of_the_requests() -> None:
    """To the width of a bucket, from microseconds to minutes."""
    chance = random.Random(5)
    sampler = Sampler(0.0)
    latencies = sorted(chance.lognormvariate(-4, 2) for _ in range(5000))
    for seconds in latencies:
        ACTIVITY.tell(EndedRequest(1, 1, seconds, 0, 0, 0))
    sampler.sample(1.0)
    sampler.close()
    for q in (0.01, 0.5, 0.95, 0.99):
        assert sampler.history.total.latency(q) == pytest.approx(latencies[round(q * 5000) - 1], rel=0.03)


def test_quantiles_of_counts() -> None:
    """The value that the share does not exceed; none of nothing."""
    assert quantile({1: 1, 64: 9}, 0.05) == 1
    assert quantile({1: 1, 64: 9}, 0.5) == 64
    assert quantile({64: 1}, 1.0) == 64
    assert quantile({}, 0.5) is None


def test_a_sampler_sees_requests_connections_and_limits() -> None:
    """Of a real dispatcher: what has ended, what is in flight, and the connections of its pool."""
    # What other tests have left open.
    before = Sampler(time.monotonic())
    before.sample(time.monotonic())
    before.close()
    with (
        FaultServer(OK, faults.late(0.3)) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=8)) as channel,
    ):
        began_at = time.monotonic()
        sampler = Sampler(began_at)
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        for number in range(4):
            dispatcher.submit(number, post(b"12345")._replace(rows=3), read)
        while len(dispatcher.completed) < 1:
            dispatcher.wait()
        sampler.sample(time.monotonic())
        dispatcher.drain()
        sampler.sample(time.monotonic())
    sampler.sample(time.monotonic())
    sampler.close()
    history = sampler.history
    first, _, last = history.recent
    total = history.total
    assert (total.elements, total.requests, total.failures) == (12, 4, 0)
    assert (total.request_bytes, total.response_bytes) == (4 * 5, 4 * 6)
    assert total.sizes == {3: 4}
    assert first.in_flight >= 1 and first.limit is not None and first.limit >= 1
    assert first.active >= 1
    assert total.opened == len(server.requests_per_connection)
    # The last use of model and session has ended.
    (others,) = before.history.recent
    assert (last.in_flight, last.limit, last.active) == (others.in_flight, others.limit, others.active)
    assert first.limit > (others.limit or 0)
    assert total.latency(0.5) == pytest.approx(0.3, abs=0.2)
    assert any(server.endpoint in name for name in history.servers)


def test_the_servers_queue_is_known_for_a_while() -> None:
    """What the server has said last, until it is too old."""
    with FaultServer(OK) as server, closing(open_channel(server.endpoint)) as channel:
        sampler = Sampler(0.0)
        endpoint = channel.endpoints.endpoints[0]
        sampler.sample(1.0)
        endpoint.statistics.observed = ServerTimes(0.012, 0.02)
        sampler.sample(2.0)
        sampler.sample(4.0)
        sampler.sample(60.0)
        sampler.close()
    assert [each.queue_seconds for each in sampler.history.samples] == [None, 0.012, 0.012, None]


def test_failures_are_counted_by_kind_with_the_first_message() -> None:
    """Of so many kinds; what comes then is counted together."""
    sampler = Sampler(0.0)
    ACTIVITY.failed(InvalidRequestError("the first", status=400), 2)
    ACTIVITY.failed(InvalidRequestError("the second", status=400), 3)
    for number in range(30):
        ACTIVITY.tell(FailedElements(1, f"Kind{number}", "m"))
    sampler.sample(1.0)
    sampler.close()
    reasons = sampler.history.reasons
    assert (reasons["InvalidRequestError"].count, reasons["InvalidRequestError"].message) == (5, "the first")
    assert len(reasons) == 21 and reasons["others"].count == 11
    assert sampler.history.total.failures == 35


def test_nothing_is_kept_for_nobody() -> None:
    """Each watcher gets every event until it closes; without one there is no deque to grow."""
    first, second = Sampler(0.0), Sampler(0.0)
    ACTIVITY.tell(FailedElements(1, "Kind", "m"))
    first.close()
    ACTIVITY.tell(FailedElements(1, "Kind", "m"))
    second.close()
    for each in (first, second):
        each.sample(1.0)
    assert (first.history.total.failures, second.history.total.failures) == (1, 2)
    assert ACTIVITY.watchers == ()


def test_a_forked_child_is_not_watched() -> None:
    """Nobody there would take the events."""
    sampler = Sampler(0.0)
    child = os.fork()
    if child == 0:
        os._exit(len(ACTIVITY.watchers))
    assert os.waitpid(child, 0)[1] == 0
    assert len(ACTIVITY.watchers) == 1
    sampler.close()


def test_cells_hold_still_while_time_goes_on() -> None:
    """A moment belongs to the same cell for the cell's length, and then to the one to its left."""
    samples = [Sample(start=index / 4, seconds=0.25, elements=index) for index in range(40)]
    before = spread(samples[:36], 5, 10.0, 9.0)
    assert before[0] is not None and before[0].start == 0.0
    counts = [None if each is None else each.elements for each in before]
    assert counts == [28, 92, 156, 220, 134]
    after = [None if each is None else each.elements for each in spread(samples, 5, 10.0, 10.1)]
    assert after == [92, 156, 220, 284, None]
