"""One request, its attempts, and when it gives up."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import pytest

from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.errors import (
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelExecutionError,
    PoolTimeoutError,
    RemoteProtocolError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy
from beam_triton.transport.exchange import Exchange
from tests.support import faults, sockets
from tests.support.answers import Answer, Request, always
from tests.support.dispatching import NO_RETRIES, QUICK_RETRIES, ask, free_slots, open_channel, post, read
from tests.support.fault_server import Fault, FaultServer, serve
from tests.support.socket_pair_connections import waits_for_a_job

OK = always(Answer(200, b"answer"))
OVERRUN_SECONDS = 0.5


def status(code: int, *headers: tuple[str, str]) -> Fault:
    return faults.answered(Answer(code, b'{"error":"the reason"}', headers))


BUSY = faults.answered(Answer(503, b'{"error":"Exceeds maximum queue size"}'))


def test_record_counts_connections_bytes_and_attempts() -> None:
    """The record of a call counts its connections, bytes and attempts."""
    with FaultServer(OK) as server, closing(open_channel(server.endpoint)) as channel:
        first, second = ask(channel).record, ask(channel).record
    assert (first.connections_opened, first.connections_reused) == (1, 0)
    assert (second.connections_opened, second.connections_reused) == (0, 1)
    assert (first.attempts, first.retries, first.request_bytes, first.response_bytes) == (1, 0, 4, 6)
    assert 0 < first.latency_seconds < 5


def test_stale_connection_costs_no_retry() -> None:
    """The request is sent again at once on another connection, even where no retry is allowed."""
    with (
        FaultServer(OK, [serve, faults.closed_without_answer]) as server,
        closing(open_channel(server.endpoint)) as channel,
    ):
        ask(channel)
        call = ask(channel)
        assert call.result == b"answer"
        assert (call.record.attempts, call.record.retries) == (2, 0)
        assert len(server.requests) == 3


def test_fresh_connection_that_ends_is_an_error() -> None:
    """A request is sent again without a retry only after a stale connection."""
    with (
        FaultServer(OK, [serve, serve, *[faults.closed_without_answer] * 9]) as server,
        closing(open_channel(server.endpoint)) as channel,
    ):
        ask(channel)
        call = ask(channel)
        call = ask(channel)
        assert isinstance(call.error, ConnectionLostError)
        assert call.record.attempts == 2


def test_sequence_request_that_may_have_run_is_not_sent_again() -> None:
    """A request that may have run is not repeated, because the model would see it twice."""
    for fault in (faults.closed_without_answer, faults.truncated(10), status(500)):
        with (
            FaultServer(OK, [serve, fault]) as server,
            closing(open_channel(server.endpoint, retry=QUICK_RETRIES)) as channel,
        ):
            ask(channel)
            call = ask(channel, is_sequence=True)
            assert call.error is not None and call.error.may_have_run
            assert len(server.requests) == 2


def test_sequence_request_that_cannot_have_run_is_retried() -> None:
    """A refusal because of overload leaves the sequence as it was."""
    with (
        FaultServer(OK, [BUSY]) as server,
        closing(open_channel(server.endpoint, retry=QUICK_RETRIES)) as channel,
    ):
        assert ask(channel, is_sequence=True).result == b"answer"


@pytest.mark.parametrize("fault", [status(503), status(502), BUSY, faults.reset_after_reading])
def test_transient_errors_are_retried(fault: Fault) -> None:
    """Transient errors are retried until an answer comes; the record counts the retries."""
    with (
        FaultServer(OK, [fault] * 3) as server,
        closing(open_channel(server.endpoint, retry=QUICK_RETRIES)) as channel,
    ):
        call = ask(channel)
        assert call.result == b"answer"
        assert (call.record.attempts, call.record.retries) == (4, 3)


def test_time_of_connecting_is_that_of_the_attempt_that_was_answered() -> None:
    """The refused attempt opened the connection, and the answer's latency does not hold that time."""
    with (
        FaultServer(OK, [BUSY]) as server,
        closing(open_channel(server.endpoint, retry=QUICK_RETRIES)) as channel,
    ):
        record = ask(channel).record
    assert (record.connections_opened, record.connections_reused) == (1, 1)
    assert record.connecting_seconds == 0


def test_last_error_keeps_the_earlier_ones() -> None:
    """The error of a request that fails for good is the last one, with the earlier ones as ``attempts``."""
    policy = RetryPolicy(max_retries=2, initial_backoff_seconds=0.01)
    script = [status(502), faults.truncated(10), status(503)]
    with FaultServer(OK, script) as server, closing(open_channel(server.endpoint, retry=policy)) as channel:
        error = ask(channel).error
        assert isinstance(error, ServerUnavailableError) and error.status == 503
        assert [type(each) for each in error.attempts] == [ServerUnavailableError, ConnectionLostError]
        assert len(server.requests) == 3


def test_plain_500_is_retried_once() -> None:
    """A plain 500 of one element is retried ``max_server_error_retries`` times; that of a batch, and a
    rejection of the content, never."""
    with (
        FaultServer(OK, status(500)) as server,
        closing(open_channel(server.endpoint, retry=QUICK_RETRIES)) as channel,
    ):
        assert isinstance(ask(channel).error, ModelExecutionError)
        assert len(server.requests) == 2
        assert isinstance(ask(channel, is_batch=True).error, ModelExecutionError)
        assert len(server.requests) == 3
        server.play(status(400))
        assert isinstance(ask(channel).error, InvalidRequestError)
        assert len(server.requests) == 4


def test_retry_after_delays_the_retry() -> None:
    """A server that names a time gets no request before it."""
    with (
        FaultServer(OK, [status(503, ("Retry-After", "1"))]) as server,
        closing(open_channel(server.endpoint, retry=QUICK_RETRIES)) as channel,
    ):
        started = time.monotonic()
        assert ask(channel).result == b"answer"
        assert 1.0 <= time.monotonic() - started < 1.7


def test_deadline_caps_retry_after() -> None:
    """Without holds a retry comes within the deadline, though the server names a later time."""
    # One retry, after half of the deadline: later ones would be sent so late that a busy machine may take
    # longer for them than is left.
    policy = RetryPolicy(initial_backoff_seconds=2.0)
    with (
        FaultServer(OK, [status(503, ("Retry-After", "60"))]) as server,
        closing(open_channel(server.endpoint, retry=policy, timeout_seconds=2.0)) as channel,
    ):
        assert ask(channel).result == b"answer"
        server.play(status(503, ("Retry-After", "60")))
        started = time.monotonic()
        assert isinstance(ask(channel).error, ServerUnavailableError)
        assert time.monotonic() - started < 2.0


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_beyond_the_deadline_holds_the_request(code: int) -> None:
    """Where the policy holds requests for an unhealthy server, it also holds them for a Retry-After."""
    patient = CircuitBreakerPolicy(max_wait_seconds=10.0)
    channel_options: dict[str, Any] = {"retry": QUICK_RETRIES, "timeout_seconds": 0.5}
    with (
        FaultServer(OK, [status(code, ("Retry-After", "1"))] * 2) as server,
        closing(open_channel(server.endpoint, circuit_breaker=patient, **channel_options)) as channel,
    ):
        started = time.monotonic()
        assert ask(channel).result == b"answer"
        assert 2.0 <= time.monotonic() - started < 4.0
        assert len(server.requests) == 3


def test_overloaded_server_holds_requests_until_max_wait_seconds() -> None:
    """Neither the deadline nor the number of retries ends the hold; ``max_wait_seconds`` does."""
    policy = RetryPolicy(max_retries=2, initial_backoff_seconds=0.02, max_backoff_seconds=0.05)
    patient = CircuitBreakerPolicy(max_wait_seconds=1.0)
    with (
        FaultServer(OK, [BUSY] * 12) as server,
        closing(
            open_channel(server.endpoint, retry=policy, circuit_breaker=patient, timeout_seconds=0.2)
        ) as channel,
    ):
        call = ask(channel)
        assert call.result == b"answer"
        assert (call.record.attempts, call.record.retries) == (13, 12)
        server.play(BUSY)
        started = time.monotonic()
        error = ask(channel).error
        assert 0.9 < time.monotonic() - started < 1.0 + OVERRUN_SECONDS
        assert isinstance(error, ServerOverloadedError) and error.attempts
        assert free_slots(channel) == 4


def test_passed_deadline_is_final_for_a_silent_server() -> None:
    """A policy that holds requests while a server is down holds none for a server that says nothing."""
    patient = CircuitBreakerPolicy(max_wait_seconds=30.0)
    with (
        FaultServer(OK, faults.silence) as server,
        closing(
            open_channel(server.endpoint, retry=QUICK_RETRIES, circuit_breaker=patient, timeout_seconds=0.4)
        ) as channel,
    ):
        started = time.monotonic()
        assert isinstance(ask(channel).error, DeadlineExceededError)
        assert time.monotonic() - started < 0.4 + OVERRUN_SECONDS


def test_passed_deadline_is_not_final_where_the_model_has_raised() -> None:
    """A server that refuses a batch is there: what it says nothing to is sent again."""
    patient = CircuitBreakerPolicy(max_wait_seconds=30.0)
    with (
        FaultServer(OK, [status(500), faults.silence]) as server,
        closing(
            open_channel(server.endpoint, retry=QUICK_RETRIES, circuit_breaker=patient, timeout_seconds=0.4)
        ) as channel,
    ):
        assert isinstance(ask(channel, is_batch=True).error, ModelExecutionError)
        assert ask(channel, is_batch=True, suspicion=0).result == b"answer"
        assert len(server.requests) == 3


def test_late_request_says_that_the_model_has_only_raised() -> None:
    """Not that the server has answered nothing."""
    with (
        FaultServer(OK, [status(500), faults.silence]) as server,
        closing(open_channel(server.endpoint, timeout_seconds=0.4)) as channel,
    ):
        ask(channel, is_batch=True)
        error = ask(channel, is_batch=True).error
    assert isinstance(error, DeadlineExceededError)
    assert "answered requests for this model with errors only so far" in error.message


@pytest.mark.parametrize("waits", [True, False])
def test_wait_for_admission_is_bounded(waits: bool) -> None:
    """Behind others that a lowered limit admits one at a time, no request waits without a bound."""
    patient = CircuitBreakerPolicy(max_wait_seconds=0.4, minimum_requests=100) if waits else None
    with FaultServer(OK, faults.silence) as server:
        channel = open_channel(
            server.endpoint, circuit_breaker=patient, timeout_seconds=0.4, max_concurrent_requests=8
        )
        with closing(channel):
            limit = channel.endpoints.endpoints[0].limit
            while limit.limit > 1:
                limit.on_overload(0.0)
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            started = time.monotonic()
            for number in range(8):
                dispatcher.submit(number, post(), read)
            dispatcher.drain()
            # One ends at its deadline, and another may be admitted just before it would give up.
            assert time.monotonic() - started < 2 * 0.4 + OVERRUN_SECONDS
            errors = [call.error for _, call in dispatcher.completed]
            assert sum(isinstance(error, PoolTimeoutError) for error in errors) >= 6
            assert "1 requests at a time" in str(errors)


def test_retry_that_waits_for_its_turn_is_not_late_for_it() -> None:
    """A connection is lost, and the server is busy with others for longer than a deadline."""
    one_at_a_time = threading.Lock()

    def slowly(request: Request) -> Answer:
        with one_at_a_time:
            time.sleep(0.25)
        return Answer(200, b"answer")

    with FaultServer(slowly, [faults.reset_after_reading]) as server:
        channel = open_channel(
            server.endpoint,
            retry=QUICK_RETRIES,
            circuit_breaker=CircuitBreakerPolicy(),
            timeout_seconds=1.0,
            max_concurrent_requests=10,
        )
        with closing(channel):
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            for number in range(10):
                dispatcher.submit(number, post(), read, suspicion=0)
            dispatcher.drain()
            calls = [call for _, call in dispatcher.completed]
    assert [call.error for call in calls] == [None] * 10
    assert sum(call.record.retries for call in calls) == 1


def test_retry_is_charged_to_the_endpoint_that_receives_it() -> None:
    """An unhealthy endpoint that gets no requests is not charged for retries elsewhere."""
    policy = RetryPolicy(
        initial_backoff_seconds=0.01, max_backoff_seconds=0.02, budget_ratio=0.5, budget_min_per_second=0.3
    )
    breaker = CircuitBreakerPolicy(minimum_requests=3, open_seconds=60.0, health_check_interval_seconds=None)
    with FaultServer(OK, status(503)) as unhealthy, FaultServer(OK) as healthy:
        channel = open_channel([unhealthy.endpoint, healthy.endpoint], retry=policy, circuit_breaker=breaker)
        with closing(channel):
            while channel.endpoints.endpoints[0].is_healthy:
                ask(channel)
            for _ in range(20):
                assert ask(channel).result == b"answer"
            started = time.monotonic()
            for _ in range(4):
                healthy.play([status(502)])
                assert ask(channel).result == b"answer"
            assert time.monotonic() - started < 2.0


def test_request_to_a_frozen_endpoint_fails_over() -> None:
    """Where answers usually come soon, an endpoint that never answers costs a second."""
    with FaultServer(OK) as frozen, FaultServer(OK) as healthy:
        channel = open_channel([frozen.endpoint, healthy.endpoint], retry=QUICK_RETRIES, timeout_seconds=2.0)
        with closing(channel):
            for _ in range(4):
                ask(channel)
            frozen.play(faults.silence)
            # They take turns.
            calls = [ask(channel) for _ in range(2)]
            assert [call.result for call in calls] == [b"answer"] * 2
            assert sum(call.record.retries for call in calls) >= 1


def test_slow_model_keeps_the_whole_deadline() -> None:
    """Where answers usually take a good part of the deadline, no attempt is given up early."""
    with FaultServer(OK, faults.late(0.5)) as first, FaultServer(OK, faults.late(0.5)) as second:
        channel = open_channel([first.endpoint, second.endpoint], retry=QUICK_RETRIES, timeout_seconds=0.9)
        with closing(channel):
            calls = [ask(channel) for _ in range(3)]
            assert [call.record.attempts for call in calls] == [1, 1, 1]


def test_slow_server_is_trusted_for_longer_though_no_time_was_left_for_a_third_connection() -> None:
    """The second connection was as slow as the first one, which therefore was not silent."""
    with FaultServer(OK) as server:
        channel = open_channel(server.endpoint, retry=QUICK_RETRIES, timeout_seconds=2.6)
        with closing(channel):
            ask(channel)
            server.play([faults.silence, faults.late(0.8)])
            call = ask(channel)
            assert (call.result, call.record.attempts) == (b"answer", 2)
            assert channel.endpoints.endpoints[0].silence.bound_seconds(0.01) == 2.0


def test_late_connection_loss_is_not_stale() -> None:
    """The server may have run the request: without retries it is not sent again."""

    def late_reset(exchange: Any) -> None:
        exchange.request()
        time.sleep(0.4)
        exchange.reset()

    with (
        FaultServer(OK, [serve, late_reset]) as server,
        closing(open_channel(server.endpoint)) as channel,
    ):
        ask(channel)
        assert isinstance(ask(channel).error, ConnectionLostError)
        assert len(server.requests) == 2


def test_retry_budget_bounds_retries() -> None:
    """A server that fails everything gets as many retries as the budget has, and then none."""
    policy = RetryPolicy(
        initial_backoff_seconds=0.01, max_backoff_seconds=0.02, budget_ratio=0.0, budget_min_per_second=0.3
    )
    with (
        FaultServer(OK, status(503)) as server,
        closing(open_channel(server.endpoint, retry=policy, timeout_seconds=0.5)) as channel,
    ):
        calls = [ask(channel) for _ in range(3)]
        assert all(isinstance(call.error, ServerUnavailableError) for call in calls)
        assert len(server.requests) == 3 + 3


def test_fail_over_has_no_backoff() -> None:
    """Where another endpoint is available, a failed request is sent there at once."""
    patient = RetryPolicy(initial_backoff_seconds=4.0, max_backoff_seconds=4.0)
    with (
        FaultServer(OK, status(503)) as unhealthy,
        FaultServer(OK) as healthy,
        faults.refusing_port() as port,
    ):
        endpoints = [f"http://127.0.0.1:{port}", unhealthy.endpoint, healthy.endpoint]
        with closing(open_channel(endpoints, retry=patient, timeout_seconds=9.0)) as channel:
            started = time.monotonic()
            calls = [ask(channel) for _ in range(6)]
            assert [call.result for call in calls] == [b"answer"] * 6
            assert time.monotonic() - started < 2.0


def test_requests_go_to_the_endpoint_with_the_fewest_in_flight() -> None:
    """Requests are spread evenly over two endpoints, but for what their limits differ at first."""
    with FaultServer(OK, faults.late(0.05)) as left, FaultServer(OK, faults.late(0.05)) as right:
        with closing(open_channel([left.endpoint, right.endpoint])) as channel:
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            for number in range(40):
                dispatcher.submit(number, post(), read)
            dispatcher.drain()
        assert abs(len(left.requests) - len(right.requests)) <= 4


@pytest.mark.parametrize(
    ("fault", "sees"),
    [
        (faults.silence, DeadlineExceededError),
        (faults.deafness, DeadlineExceededError),
        (faults.trickle(0.05), DeadlineExceededError),
        (faults.chunked(ending=b""), DeadlineExceededError),
        (status(503), ServerUnavailableError),
        (BUSY, ServerOverloadedError),
    ],
)
def test_request_ends_at_the_deadline(fault: Fault, sees: type[Exception]) -> None:
    """Whatever the server does, and including all retries, the request ends at ``timeout_seconds``."""
    with (
        FaultServer(OK, fault) as server,
        closing(open_channel(server.endpoint, retry=QUICK_RETRIES, timeout_seconds=0.4)) as channel,
    ):
        started = time.monotonic()
        call = ask(channel)
        assert time.monotonic() - started < 0.4 + OVERRUN_SECONDS
        assert isinstance(call.error, sees)
        assert free_slots(channel) == 4
        assert channel.pool.statistics().active == 0


def test_deadline_includes_the_wait_for_a_connection() -> None:
    """Waiting in the pool's queue counts, and says nothing about the server."""
    with FaultServer(OK) as server:
        channel = open_channel(
            server.endpoint, timeout_seconds=0.4, pool={"max_total": 1, "max_idle": 1}, retry=QUICK_RETRIES
        )
        with closing(channel):
            origin = channel.endpoints.endpoints[0].url.origin
            holding = channel.pool.acquire(origin, 5.0, lambda: None)
            started = time.monotonic()
            error = ask(channel).error
            assert time.monotonic() - started < 0.4 + OVERRUN_SECONDS
            assert isinstance(error, PoolTimeoutError) and not error.counts_as_failure
            channel.pool.cancel(holding)
            assert ask(channel).result == b"answer"


def test_overload_lowers_the_number_in_flight() -> None:
    """An overloaded server gets fewer requests at a time, and the time lost is reported as throttling."""
    with FaultServer(OK, [BUSY] * 4) as server:
        channel = open_channel(server.endpoint, retry=QUICK_RETRIES, max_concurrent_requests=8)
        with closing(channel):
            (endpoint,) = channel.endpoints.endpoints
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            for number in range(8):
                dispatcher.submit(number, post(), read)
            dispatcher.drain()
            assert all(call.result == b"answer" for _, call in dispatcher.completed)
            assert endpoint.limit.limit < 8
            assert endpoint.in_flight == 0
            assert dispatcher.throttled_seconds > 0


def test_exception_of_the_reader_fails_only_its_call() -> None:
    """An unexpected exception counts as an answer that cannot be read."""

    def broken(exchange: Exchange) -> bytes:
        raise KeyError("name")

    with FaultServer(OK) as server, closing(open_channel(server.endpoint)) as channel:
        dispatcher: Dispatcher[str] = Dispatcher(channel)
        dispatcher.submit("broken", post(), broken)
        dispatcher.submit("good", post(), read)
        dispatcher.drain()
        calls = dict(dispatcher.completed)
        assert calls["good"].result == b"answer"
        assert isinstance(calls["broken"].error, RemoteProtocolError)
        assert "KeyError" in calls["broken"].error.message
        assert free_slots(channel) == 4


def test_unreadable_secret_fails_the_request_and_is_read_again() -> None:
    """A header that cannot be built fails the request and leaks nothing; the next request tries again."""
    works = False

    def headers() -> Mapping[str, str]:
        if not works:
            raise ConfigurationError("auth_token: the environment variable TOKEN is not set on this worker")
        return {"Authorization": "Bearer x"}

    with FaultServer(OK) as server, closing(open_channel(server.endpoint, headers=headers)) as channel:
        assert isinstance(ask(channel).error, ConfigurationError)
        assert server.requests == []
        assert free_slots(channel) == 4
        works = True
        assert ask(channel).result == b"answer"
        assert server.requests[0].header("Authorization") == "Bearer x"


def test_rotated_secret_is_read_after_a_401() -> None:
    """Heads are cached for a second: a request refused for the old secret is sent again with the new one."""
    token = "old"

    def origin(request: Any) -> Answer:
        allowed = request.header("Authorization") == "new"
        return Answer(200, b"answer") if allowed else Answer(401, b'{"error":"no"}')

    with (
        FaultServer(origin) as server,
        closing(open_channel(server.endpoint, headers=lambda: {"Authorization": token})) as channel,
    ):
        refused = ask(channel)
        assert refused.error is not None and refused.record.attempts == 1
        token = "new"
        call = ask(channel)
        assert call.result == b"answer"
        assert (call.record.attempts, call.record.retries) == (2, 0)
        token = "other"
        assert ask(channel).result == b"answer", "the kept head is still good"


def test_unresolvable_host_raises_connect_error() -> None:
    """The error names the host, and is retried like a refused connection."""
    policy = RetryPolicy(max_retries=1, initial_backoff_seconds=0.01)
    with closing(open_channel("http://no-such-host.invalid:8000", retry=policy)) as channel:
        error = ask(channel).error
        assert isinstance(error, ConnectError) and not error.may_have_run
        assert "no-such-host.invalid" in error.message
        assert len(error.attempts) == 1


def test_sixteen_megabytes_are_exchanged() -> None:
    """Sixteen megabytes are sent and received through buffers much smaller than that."""
    body = bytes(range(256)) * (1 << 16)

    def echo(exchange: Exchange) -> bytes:
        return bytes(exchange.body)

    with FaultServer(lambda request: Answer(200, request.body), receive_buffer_bytes=65536) as server:
        channel = open_channel(server.endpoint, max_response_bytes=1 << 25, timeout_seconds=30)
        with closing(channel):
            assert ask(channel, post(body), reads=echo).result == body


def let_connecting_threads_end() -> None:
    """A thread that has just handed over its connection keeps the request until it runs again."""
    for thread in threading.enumerate():
        if thread.name == "beam_triton-connect":
            assert waits_for_a_job(thread, within_seconds=5)


@pytest.mark.parametrize("fault", [serve, status(400), status(503), faults.reset_after_reading])
def test_requests_are_freed_without_the_garbage_collector(fault: Fault) -> None:
    """When a call is dropped its request is freed: neither an error nor a success keeps it in a cycle."""
    with (
        FaultServer(OK, fault) as server,
        closing(open_channel(server.endpoint, retry=NO_RETRIES)) as channel,
    ):
        ask(channel)
        gc.collect()
        gc.disable()
        try:
            call = ask(channel)
            gone = weakref.ref(call)
            del call
            let_connecting_threads_end()
            assert gone() is None
            assert gc.collect() == 0
        finally:
            gc.enable()


def test_queued_requests_are_freed_without_the_garbage_collector() -> None:
    """Waiting for a slot or an admission leaves no cycle behind."""
    with (
        FaultServer(OK, serve) as server,
        closing(open_channel(server.endpoint, max_concurrent_requests=4)) as channel,
    ):
        ask(channel)
        limit = channel.endpoints.endpoints[0].limit
        while limit.limit > 1:
            limit.on_overload(0.0)
        gc.collect()
        gc.disable()
        try:
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            for number in range(32):
                dispatcher.submit(number, post(), read)
            dispatcher.drain()
            gone = [weakref.ref(call) for _, call in dispatcher.completed]
            assert len(gone) == 32
            dispatcher.cancel()
            let_connecting_threads_end()
            assert [ref() for ref in gone] == [None] * 32
        finally:
            gc.enable()


def test_stored_error_does_not_keep_its_request_alive() -> None:
    """Collecting errors does not collect the requests that they came from."""
    with (
        FaultServer(OK, faults.truncated(10)) as server,
        closing(open_channel(server.endpoint, retry=QUICK_RETRIES, timeout_seconds=0.3)) as channel,
    ):
        call = ask(channel)
        gone = weakref.ref(call)
        error = call.error
        del call
        let_connecting_threads_end()
        gc.collect()
        assert error is not None and gone() is None


def test_cancel_releases_slot_admission_and_connection() -> None:
    """Whatever state a call is in, cancelling it releases all that it holds."""
    with FaultServer(OK, faults.silence) as server:
        channel = open_channel(
            server.endpoint, pool={"max_total": 2, "max_idle": 2}, max_concurrent_requests=4
        )
        with closing(channel):
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            for number in range(4):
                dispatcher.submit(number, post(), read)
            for _ in range(5):
                dispatcher.step()
                time.sleep(0.01)
            dispatcher.cancel()
            dispatcher.cancel()
            assert dispatcher.in_flight == 0 and not dispatcher.completed
            assert free_slots(channel) == 4
            assert channel.endpoints.endpoints[0].in_flight == 0
            assert sockets.settles(lambda: channel.pool.statistics().active, 0) == 0
            # A connection that was being opened is kept for the next request; those in use are closed.
            assert sockets.settles(lambda: server.open_now - channel.pool.statistics().idle, 0) == 0
            server.play(serve)
            assert ask(channel).result == b"answer"
