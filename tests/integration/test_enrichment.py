"""`TritonEnrichmentHandler` in Beam's Enrichment, on a real Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.io.requestresponse import UserCodeExecutionException, UserCodeTimeoutException
from apache_beam.transforms.enrichment import Enrichment
from apache_beam.transforms.window import TimestampedValue

from beam_triton import ConfigurationError, TritonEnrichmentHandler
from beam_triton.testing import LocalTriton
from beam_triton.transport.session import SESSIONS
from tests.support.pipelines import score


class Reading(NamedTuple):
    id: int
    factor: float
    x: list[float]


def test_outputs_become_columns(triton: LocalTriton) -> None:
    """Columns called as the inputs go to the model, optional ones too; the others come back unchanged."""
    rows = [beam.Row(id=n, x=[float(n)] * 4, factor=[2.0]) for n in range(100)]
    handler = TritonEnrichmentHandler(triton.endpoint, "optional_input")
    results = score(rows, Enrichment(handler, timeout=None)).results
    assert [row.id for row in results] == list(range(100))
    assert results[3] == beam.Row(id=3, x=[3.0] * 4, factor=[2.0], y=[6.0] * 4)
    assert len(SESSIONS) == 0


def test_inputs_and_outputs_are_renamed(triton: LocalTriton) -> None:
    """Columns have the names and values that they have with ``output="row"``."""
    handler = TritonEnrichmentHandler(
        triton.endpoint,
        "shout",
        inputs={"text": "word"},
        outputs={"loud": "shouted", "length_bytes": "n"},
        text_outputs=True,
    )
    results = score([beam.Row(word="hey", id=1)], Enrichment(handler, timeout=None)).results
    assert results == [beam.Row(word="hey", id=1, shouted="HEY", n=3)]
    assert type(results[0].n) is int


def test_some_outputs_and_named_tuples(triton: LocalTriton) -> None:
    rows = [Reading(1, 0.5, [1.0] * 4)]
    handler = TritonEnrichmentHandler(triton.endpoint, "double", outputs=["y"], prefix="new_")
    results = score(rows, Enrichment(handler)).results
    assert results == [beam.Row(id=1, factor=0.5, x=[1.0] * 4, new_y=[2.0] * 4)]


def test_a_size_of_one_keeps_timestamps(triton: LocalTriton) -> None:
    """Batches give rows the end of their window; rows that are sent alone keep their own timestamps."""
    handler = TritonEnrichmentHandler(triton.endpoint, "rejecting", max_batch_size=1)
    stamped = beam.Map(lambda row: TimestampedValue(row, row.x[0]))
    transform = stamped | Enrichment(handler, timeout=None)
    found = score([beam.Row(x=[7.0]), beam.Row(x=[9.0])], transform).outputs["results"]
    assert [(output.timestamp, output.value.y) for output in found] == [(7.0, 14.0), (9.0, 18.0)]


def test_failures_are_those_of_beam(triton: LocalTriton) -> None:
    """The exceptions that RequestResponseIO expects carry the library's message."""
    with TritonEnrichmentHandler(triton.endpoint, "rejecting") as handler:
        with pytest.raises(UserCodeExecutionException, match="InvalidRequestError: element 1 of its batch"):
            handler([beam.Row(x=[1.0]), beam.Row(x=[-1.0])])
        with pytest.raises(UserCodeExecutionException, match=r"the element has no column 'x'; .*inputs="):
            handler(beam.Row(z=1))
    slow = TritonEnrichmentHandler(
        triton.endpoint, "slow", timeout_seconds=0.3, pool={"connect_timeout_seconds": 0.1}
    )
    with slow, pytest.raises(UserCodeTimeoutException, match="DeadlineExceededError"):
        slow(beam.Row(x=[1.0]))


def test_default_value_stands_in_for_a_failed_row(triton: LocalTriton) -> None:
    rows = [beam.Row(x=[1.0]), beam.Row(x=[-1.0])]
    handler = TritonEnrichmentHandler(triton.endpoint, "rejecting", default_value=np.zeros(1, np.float32))
    assert [row.y for row in score(rows, Enrichment(handler, timeout=None)).results] == [2.0, 0.0]


def test_a_closed_handler_says_so(triton: LocalTriton) -> None:
    handler = TritonEnrichmentHandler(triton.endpoint, "double")
    with handler:
        assert handler(beam.Row(x=[1.0] * 4))[1] == beam.Row(y=[2.0] * 4)
    handler.__exit__(None, None, None)
    assert len(SESSIONS) == 0
    with pytest.raises(UserCodeExecutionException, match="is not open"):
        handler(beam.Row(x=[1.0] * 4))


def test_cache_keys_are_those_of_the_inputs(triton: LocalTriton) -> None:
    """Equal inputs of one model have one key, whatever else a row holds; nothing else has it."""

    def key_of(*, column: str = "x", model_name: str = "double", **given: Any) -> str:
        options = {name: given.pop(name) for name in ("outputs", "request_parameters") if name in given}
        inputs = None if column == "x" else {"x": column}
        handler = TritonEnrichmentHandler(triton.endpoint, model_name, inputs=inputs, **options)
        return handler.get_cache_key(beam.Row(**given))

    key = key_of(x=[1.0, 2.0, 3.0, 4.0], id=1)
    assert key.startswith("double:1:")
    assert key == key_of(x=[1.0, 2.0, 3.0, 4.0], id=2)
    others = [
        key_of(x=[1.0, 2.0, 3.0, 5.0]),
        key_of(x=[[1.0, 2.0, 3.0, 4.0]]),
        key_of(x="text"),
        key_of(x=b"text"),
        key_of(x=None),
        key_of(x=[1.0, 2.0, 3.0, 4.0], model_name="ensemble"),
        key_of(x=[1.0, 2.0, 3.0, 4.0], outputs=["y"]),
        key_of(x=[1.0, 2.0, 3.0, 4.0], request_parameters={"a": 1}),
        key_of(x=[1.0, 2.0, 3.0, 4.0], z=[0.0], column="z"),
        *(key_of(x=np.full(5000, value)) for value in (1.0, 2.0)),
    ]
    assert len({key, *others}) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "x"}, "inputs must map"),
        ({"prefix": 1}, "prefix must be"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"min_batch_size": 5, "max_batch_size": 4}, "is above"),
        ({"max_batch_duration_secs": 0}, "max_batch_duration_secs"),
        ({"timeouts": 1}, "did you mean 'timeout_seconds'"),
    ],
)
def test_options_are_checked_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TritonEnrichmentHandler("http://any", "double", **options)
