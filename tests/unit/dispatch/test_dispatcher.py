"""Many calls in flight, several owners on one thread, several threads on few slots."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import closing

import pytest

from beam_triton.dispatch.channel import Channel
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy
from beam_triton.policy.server_times import Executions, ServerCounts
from tests.support import faults
from tests.support.answers import Answer, Request, always
from tests.support.dispatching import ask, free_slots, open_channel, post, read
from tests.support.fault_server import FaultServer

OK = always(Answer(200, b"answer"))


def echo(request: Request) -> Answer:
    return Answer(200, request.body)


def test_completed_calls_keep_their_tokens() -> None:
    """Tokens and answers stay together, whatever the order of the answers."""
    with (
        FaultServer(echo, [faults.late(0.2), faults.late(0.1)]) as server,
        closing(open_channel(server.endpoint)) as channel,
    ):
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        for number in range(20):
            dispatcher.submit(number, post(b"%d" % number), read)
        dispatcher.drain()
        answers = {number: call.result for number, call in dispatcher.completed}
    assert answers == {number: b"%d" % number for number in range(20)}


def test_max_concurrent_requests_bounds_requests_in_flight() -> None:
    """``submit`` waits while ``max_concurrent_requests`` are in flight."""
    with (
        FaultServer(OK, faults.late(0.05)) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=3)) as channel,
    ):
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        most = 0
        for number in range(9):
            dispatcher.submit(number, post(), read)
            most = max(most, dispatcher.in_flight)
        dispatcher.drain()
        assert most == 3 and server.most_open == 3
        assert dispatcher.throttled_seconds == 0


@pytest.mark.parametrize(("size", "most"), [(100, 4), (199, 4), (200, 2), (300, 2), (400, 1), (4000, 1)])
def test_large_requests_take_several_slots(size: int, most: int) -> None:
    """Requests of several times ``slot_bytes`` reduce the number in flight; none is too large to be sent."""
    with FaultServer(OK, faults.late(0.02)) as server:
        channel = open_channel(server.endpoint, max_concurrent_requests=4, slot_bytes=100)
        with closing(channel):
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            seen = 0
            for number in range(8):
                dispatcher.submit(number, post(bytes(size)), read)
                seen = max(seen, dispatcher.in_flight)
            dispatcher.drain()
            assert [call.result for _, call in dispatcher.completed] == [b"answer"] * 8
            assert seen == most
            assert free_slots(channel) == 4


def test_time_waited_for_a_slot_is_counted() -> None:
    """For a request, and for those that follow one another on a slot of their own."""
    with (
        FaultServer(OK, faults.late(0.1)) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=1)) as channel,
    ):
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        dispatcher.submit(0, post(), read)
        assert dispatcher.slot_seconds == 0
        dispatcher.submit(1, post(), read)
        waited_seconds = dispatcher.slot_seconds
        assert waited_seconds > 0.05
        dispatcher.take_slot(lambda: None)
        assert dispatcher.slot_seconds > waited_seconds + 0.05
        dispatcher.release_slot()
        dispatcher.drain()


def test_two_dispatchers_on_one_thread_do_not_deadlock() -> None:
    """Two owners fused on one thread share one slot without waiting for each other."""
    with (
        FaultServer(OK) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=1)) as channel,
    ):
        first: Dispatcher[int] = Dispatcher(channel)
        second: Dispatcher[int] = Dispatcher(channel)
        started = time.monotonic()
        for number in range(20):
            first.submit(number, post(), read)
            second.submit(number, post(), read)
        second.drain()
        first.drain()
        assert len(first.completed) == len(second.completed) == 20
        assert time.monotonic() - started < 5
        assert free_slots(channel) == 1


def test_backoff_of_one_dispatcher_does_not_block_another() -> None:
    """While the second owner waits, it drives the retry that occupies the only slot."""
    policy = RetryPolicy(initial_backoff_seconds=0.2)
    failing = faults.answered(Answer(503))
    with FaultServer(OK, [failing]) as server:
        channel = open_channel(server.endpoint, max_concurrent_requests=1, retry=policy)
        with closing(channel):
            first: Dispatcher[int] = Dispatcher(channel)
            second: Dispatcher[int] = Dispatcher(channel)
            first.submit(1, post(), read)
            second.submit(2, post(), read)
            second.drain()
            assert [call.result for _, call in first.completed] == [b"answer"]
            assert [call.result for _, call in second.completed] == [b"answer"]


def test_cancel_does_not_affect_other_dispatchers() -> None:
    """A bundle that fails releases what it holds, and the other one on its thread continues."""
    with FaultServer(OK, faults.late(0.1)) as server, closing(open_channel(server.endpoint)) as channel:
        first: Dispatcher[int] = Dispatcher(channel)
        second: Dispatcher[int] = Dispatcher(channel)
        for number in range(2):
            first.submit(number, post(), read)
            second.submit(number, post(), read)
        first.cancel()
        second.drain()
        assert [call.result for _, call in second.completed] == [b"answer"] * 2
        assert free_slots(channel) == 4


def test_threads_share_few_slots_without_lost_wake_ups() -> None:
    """Sixteen threads share two slots: all finish, at the speed of the slots and not of a timer."""
    with (
        FaultServer(OK, faults.late(0.005)) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=2)) as channel,
    ):
        done: Counter[str] = Counter()
        lock = threading.Lock()

        def work(name: str) -> None:
            for _ in range(10):
                assert ask(channel).result == b"answer"
                with lock:
                    done[name] += 1

        threads = [threading.Thread(target=work, args=(f"{n}",)) for n in range(16)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        elapsed = time.monotonic() - started
        assert done == Counter({f"{n}": 10 for n in range(16)})
        assert server.most_open <= 2
        # 160 requests; a lost wake-up each would cost 160 / 2 x 0.25 s.
        assert elapsed < 12
        assert free_slots(channel) == 2


def test_busy_thread_does_not_block_free_slots() -> None:
    """A free slot goes to a thread that waits, not to one that waited before and is busy now."""
    with (
        FaultServer(OK, faults.late(0.02)) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=1)) as channel,
    ):
        go_on = threading.Event()

        def once(channel: Channel) -> None:
            assert ask(channel).result == b"answer"
            go_on.wait(10)

        busy = [threading.Thread(target=once, args=(channel,)) for _ in range(3)]
        for thread in busy:
            thread.start()
        started = time.monotonic()
        for _ in range(20):
            assert ask(channel).result == b"answer"
        elapsed = time.monotonic() - started
        go_on.set()
        for thread in busy:
            thread.join(10)
        assert elapsed < 2.5


def test_cancel_ends_calls_in_every_phase() -> None:
    """Waiting, connecting, sending, backing off: one cancel ends them all."""
    with FaultServer(OK, [faults.answered(Answer(503)), faults.silence] * 10) as server:
        patient = RetryPolicy(initial_backoff_seconds=10.0)
        channel = open_channel(
            server.endpoint, retry=patient, pool={"max_total": 4, "max_idle": 2}, timeout_seconds=30.0
        )
        with closing(channel):
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            for number in range(4):
                dispatcher.submit(number, post(), read)
            patience = time.monotonic() + 5
            while len(server.requests) < 4 and time.monotonic() < patience:
                dispatcher.step()
                time.sleep(0.01)
            dispatcher.step()
            dispatcher.cancel()
            assert free_slots(channel) == 4
            assert channel.endpoints.endpoints[0].in_flight == 0
            dispatcher.drain()


def test_drain_and_step_of_an_idle_dispatcher_return_at_once() -> None:
    """Without a call in flight they do nothing."""
    with FaultServer(OK) as server, closing(open_channel(server.endpoint)) as channel:
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        dispatcher.step()
        dispatcher.drain()
        assert dispatcher.in_flight == 0


def test_overload_on_many_threads_loses_nothing() -> None:
    """Eight threads on a server that sheds load repeatedly: every request gets its answer."""
    busy = faults.answered(Answer(503, b'{"error":"Exceeds maximum queue size"}'))
    script = [busy if number % 4 == 0 else faults.late(0.002) for number in range(200)]
    policy = RetryPolicy(
        initial_backoff_seconds=0.01, max_backoff_seconds=0.05, budget_min_per_second=100.0, max_retries=50
    )
    with (
        FaultServer(OK, script) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=8, retry=policy)) as channel,
    ):
        answers: list[object] = []

        def work() -> None:
            answers.extend(ask(channel).result for _ in range(10))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert answers == [b"answer"] * 80
        assert free_slots(channel) == 8
        assert channel.endpoints.endpoints[0].in_flight == 0


def test_background_job_waits_for_its_turn_outside_the_deadline() -> None:
    """Others keep the only instance busy: a request each two seconds, which is reported as throttling."""

    def without_news(request: Request) -> Answer:
        return Answer(503 if request.target == "/stats" else 200, b"answer")

    with (
        FaultServer(without_news) as server,
        closing(
            open_channel(
                server.endpoint,
                timeout_seconds=0.5,
                circuit_breaker=CircuitBreakerPolicy(),
                politeness="background",
                statistics_path="/stats",
            )
        ) as channel,
    ):
        (endpoint,) = channel.endpoints.endpoints
        assert endpoint.background is not None
        for executed in (1_000, 2_000):
            endpoint.background.on_counts(
                ServerCounts(executed, executed, executed * 10**9, 0, executed * 10**9),
                {1: Executions(executed, executed * 10**9)},
                instances=1,
                in_flight=0,
                question_seconds=0.001,
            )
            time.sleep(0.01)
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        started = time.monotonic()
        for number in range(2):
            dispatcher.submit(number, post(), read)
        dispatcher.drain()
        assert 1.5 < time.monotonic() - started < 5
        assert [call.error for _, call in dispatcher.completed] == [None, None]
        assert dispatcher.throttled_seconds > 1
