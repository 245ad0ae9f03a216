"""`TritonSequenceInference` on the real sequence batcher: running sums, which are wrong if anything is."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms import window

from beam_triton import (
    ConfigurationError,
    InvalidRequestError,
    LocalProtocolError,
    ModelExecutionError,
    SequenceEndedError,
    TritonSequenceInference,
)
from beam_triton.testing import LocalTriton
from tests.support import pipelines
from tests.support.models import throwaway_triton, write_models

STRATEGIES = ["running_sum", "running_sum_oldest"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    names = ["running_sum", "running_sum_oldest", "running_sum_two_places", "running_sum_forgetful"]
    with throwaway_triton(write_models(tmp_path_factory.mktemp("models"), names)) as server:
        yield server


def numbered(keys: int, length: int, *, seed: int = 1) -> list[Any]:
    """Elements of ``keys`` sequences, one a second each from 1 on, all mixed up."""
    elements = [
        window.TimestampedValue((f"key-{key}", np.array([number], np.int32)), number)
        for key in range(keys)
        for number in range(1, length + 1)
    ]
    random.Random(seed).shuffle(elements)
    return elements


def each_value(values: list[Any]) -> Iterator[Any]:
    yield from values


def unbounded(elements: Any) -> Any:
    """The same elements, as a stream has them: the sequences grow in Beam's state."""
    elements.is_bounded = False
    return elements


def score(
    server: LocalTriton | Iterable[LocalTriton],
    values: list[Any],
    *,
    model: str = "running_sum",
    windows: Any = None,
    stream: bool = False,
    **options: Any,
) -> pipelines.Run:
    servers = [server] if isinstance(server, LocalTriton) else list(server)
    transform = TritonSequenceInference([each.endpoint for each in servers], model, **options)

    def build(pipeline: beam.Pipeline) -> Any:
        elements = pipeline | beam.Create([values], reshuffle=False) | beam.FlatMap(each_value)
        elements = elements | beam.WindowInto(windows or window.FixedWindows(1_000_000))
        return (unbounded(elements) if stream else elements) | transform.with_exception_handling()

    return pipelines.run(build)


def sums_of(run: pipelines.Run) -> dict[str, list[int]]:
    """The sums of each key's elements, in the order of their times."""
    found = defaultdict(list)
    for output in sorted(run.outputs["results"], key=lambda output: output.timestamp):
        key, result = output.value
        found[key].append(int(result.inference["y"][0]))
    return dict(found)


@pytest.mark.parametrize(
    ("model", "stream", "keys"),
    [
        ("running_sum", False, 50),
        ("running_sum_oldest", False, 50),
        # The direct strategy has eight places, and the sequences of a stream are all open at once.
        ("running_sum", True, 8),
        ("running_sum_oldest", True, 50),
    ],
)
def test_interleaved_keys_out_of_order_give_each_key_its_own_sums(
    server: LocalTriton, model: str, stream: bool, keys: int
) -> None:
    run = score(server, numbered(keys, 8), model=model, stream=stream)
    assert run.failures == []
    assert sums_of(run) == {f"key-{key}": list(accumulate(range(1, 9))) for key in range(keys)}
    assert run.counters["sequences"] == keys
    assert "replayed_elements" not in run.counters
