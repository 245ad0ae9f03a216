"""Bisection and counting, against a small scripted server of the protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from beam_triton import InferResponse, ModelSpec, RemoteProtocolError, TensorSpec, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import EncodedRequest
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.metrics import InferenceMetrics
from tests.support.answers import Answer, Request
from tests.support.fault_server import FaultServer

SPEC = ModelSpec("m", "1", (TensorSpec("x", "INT64", (1,)),), (TensorSpec("y", "INT64", (1,)),), 1024)


def refuse_negative(request: Request) -> Answer:
    """Returns x as y; 400 for a request with a negative value, 500 for one with -1000."""
    if request.method == "GET":
        return Answer(404, b"no statistics here")
    values = json.loads(request.body)["inputs"][0]["data"]
    flat = [value[0] if isinstance(value, list) else value for value in values]
    if min(flat) < 0:
        return Answer(500 if -1000 in flat else 400, b'{"error": "negative"}')
    tensor = {"name": "y", "datatype": "INT64", "shape": [len(flat), 1], "data": flat}
    return Answer(200, json.dumps({"model_name": "m", "model_version": "1", "outputs": [tensor]}).encode())


class Owner:
    """Sends batches of numbers, and records how each of them ended."""

    def __init__(self, model: RemoteModel) -> None:
        self.scored: list[Any] = []
        self.failed: list[Any] = []
        self.refuses_answers = False
        self._model = model
        self.batches: BisectingSender[list[Any]] = BisectingSender(
            model,
            InferenceMetrics(),
            encode=self._encode,
            on_answer=self._answer,
            on_failure=self._failure,
            renew=lambda batch: [batch],
            has_default=False,
        )

    def _encode(self, batch: list[Any], copies: int) -> EncodedRequest:
        return self._model.encoder.encode([[n] for n in batch + batch[-1:] * copies])

    def _answer(self, batch: list[Any], response: InferResponse, is_batched: bool) -> None:
        if self.refuses_answers:
            raise RemoteProtocolError("not this one")
        assert response.outputs["y"][:, 0].tolist() == batch
        self.scored += batch

    def _failure(self, batch: list[Any], error: TritonError) -> None:
        self.failed += batch


@contextmanager
def owner() -> Iterator[tuple[Owner, FaultServer]]:
    with FaultServer(refuse_negative) as server:
        options = InferenceOptions(
            endpoint=server.endpoint,
            circuit_breaker=None,
            retry={"max_retries": 0},  # type: ignore[arg-type]
        )
        model = RemoteModel(SPEC, options, binary=False)
        try:
            yield Owner(model), server
        finally:
            model.close()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100])
@pytest.mark.parametrize("bad_indices", [(), (0,), (1,), (0, 1), (5, 6, 50)])
def test_each_element_is_scored_or_failed_once(size: int, bad_indices: tuple[int, ...]) -> None:
    """The bad elements fail, all others are scored, in as few requests as bisection takes."""
    numbers = [-n - 1 if n in bad_indices else n for n in range(size)]
    bad = [n for n in numbers if n < 0]
    with owner() as (one, server):
        one.batches.send(numbers)
        one.batches.finish(size)
        assert sorted(one.failed) == sorted(bad)
        assert sorted(one.scored) == sorted(n for n in numbers if n >= 0)
        sent = [request for request in server.requests if request.method == "POST"]
        assert len(sent) - 1 <= 2 * math.ceil(math.log2(max(size, 2))) * len(bad)


def test_batches_are_bisected_independently() -> None:
    """Batches do not mix: each is bisected on its own while others continue."""
    with owner() as (one, _):
        for first in range(0, 200, 10):
            one.batches.send([n if n % 17 else -n - 1 for n in range(first, first + 10)])
            one.batches.take_ended()
        one.batches.finish(200)
        assert sorted(one.scored + [-n - 1 for n in one.failed]) == list(range(200))
        assert sorted(-n - 1 for n in one.failed) == list(range(0, 200, 17))


def test_batch_is_bisected_after_a_plain_500() -> None:
    """One element may make the model raise."""
    with owner() as (one, _):
        one.batches.send([1, 2, -1000, 4])
        one.batches.finish(4)
        assert (sorted(one.scored), one.failed) == ([1, 2, 4], [-1000])


def test_unencodable_element_is_found_without_a_request() -> None:
    """An element that cannot be encoded is found before anything is sent for it."""
    with owner() as (one, server):
        one.batches.send([1, 2, "text", 4])
        one.batches.finish(4)
        assert (sorted(one.scored), one.failed) == ([1, 2, 4], ["text"])
        assert len(server.requests) == 2


def test_error_that_no_element_causes_is_not_bisected() -> None:
    """An answer that its owner refuses fails the whole batch."""
    with owner() as (one, server):
        one.refuses_answers = True
        one.batches.send([1, 2, 3])
        one.batches.finish(3)
        assert (one.scored, one.failed) == ([], [1, 2, 3])
        assert len(server.requests) == 1


@pytest.mark.parametrize("expected", [2, 4])
def test_lost_or_repeated_element_fails_the_bundle(expected: int) -> None:
    """The elements that came out are compared with those that came in."""
    with owner() as (one, _):
        one.batches.send([1, 2, 3])
        with pytest.raises(AssertionError, match=f"lost count: {expected} elements came in, 3 went out"):
            one.batches.finish(expected)


def test_cancelled_batches_report_nothing() -> None:
    """Cancelled batches end neither scored nor failed, and cancelling twice does nothing."""
    with owner() as (one, server):
        one.batches.send([1, 2])
        one.batches.cancel()
        one.batches.cancel()
        one.batches.finish(0)
        assert (one.scored, one.failed) == ([], [])
        assert server.open_now <= 1
