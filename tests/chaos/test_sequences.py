"""Sequences whose servers die: running sums, which are wrong if an element is lost, doubled or misplaced."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms import window

from beam_triton import TritonSequenceInference
from beam_triton.testing import LocalTriton
from tests.support import pipelines
from tests.support.executions import inferred
from tests.support.models import throwaway_triton, write_models

MODEL = "running_sum_oldest"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[list[LocalTriton]]:
    repository = write_models(tmp_path / "models", [MODEL])
    with throwaway_triton(repository) as first, throwaway_triton(repository) as second:
        yield [first, second]


def numbers_of(keys: int, length: int) -> Iterator[Any]:
    """Numbers 1 to ``length`` of each key, one a second, all mixed up."""
    pairs = [(key, number) for key in range(keys) for number in range(1, length + 1)]
    random.Random(3).shuffle(pairs)
    for key, number in pairs:
        yield window.TimestampedValue((key, np.array([number], np.int32)), number)


def run_sequences(fleet: list[LocalTriton], keys: int, length: int, *, stream: bool) -> pipelines.Run:
    """Score the sequences; the first server is killed while it has some of them, twice, and started again."""
    transform = TritonSequenceInference([server.endpoint for server in fleet], MODEL)
    victim, ended = fleet[0], threading.Event()

    def kill_twice() -> None:
        for _ in range(2):
            # Far from the end, however few the first server gets.
            while inferred(victim, MODEL) < 200:
                if ended.wait(0.02):
                    return
            victim.kill()
            time.sleep(1.0)
            victim.restart()

    def build(pipeline: beam.Pipeline) -> Any:
        elements = pipeline | beam.Create([keys], reshuffle=False) | beam.FlatMap(numbers_of, length)
        elements |= beam.WindowInto(window.FixedWindows(1_000_000))
        elements.is_bounded = not stream
        return elements | transform.with_exception_handling()

    killer = threading.Thread(target=kill_twice)
    killer.start()
    try:
        return pipelines.run(build)
    finally:
        ended.set()
        killer.join()


def check_sums(run: pipelines.Run, keys: int, length: int) -> None:
    assert run.failures == []
    expected = list(accumulate(range(1, length + 1)))
    found: dict[Any, list[int]] = {key: [] for key in range(keys)}
    for output in sorted(run.outputs["results"], key=lambda output: output.timestamp):
        key, result = output.value
        found[key].append(int(result.inference["y"][0]))
    wrong = {key: sums for key, sums in found.items() if sums != expected}
    assert not wrong, f"{len(wrong)} of {keys} sequences are wrong, such as {next(iter(wrong.items()))}"
    assert run.counters["replayed_elements"] > 0


both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "growing"])


@both_ways
@pytest.mark.parametrize("keys", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_sums_are_right_though_one_of_two_servers_is_killed(
    fleet: list[LocalTriton], keys: int, stream: bool
) -> None:
    check_sums(run_sequences(fleet, keys, 6, stream=stream), keys, 6)


@both_ways
def test_sums_are_right_though_the_only_server_is_killed(fleet: list[LocalTriton], stream: bool) -> None:
    fleet[1].kill()
    check_sums(run_sequences(fleet[:1], 300, 6, stream=stream), 300, 6)
