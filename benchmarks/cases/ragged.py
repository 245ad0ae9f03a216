"""Token ids of log-normal lengths: a request for each length, or padded to the boundaries of buckets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from apache_beam.transforms.window import GlobalWindows

from beam_triton import TritonInferenceDoFn
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import ELEMENTS_PER_SECOND, Case, Scale, take_turns
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ATTEND, execution_count

_MEDIAN_LENGTH, _SPREAD, _MAX_LENGTH = 100, 0.8, 2048
_BUNDLE_ELEMENTS = 1_000
_EXACT: Mapping[str, Any] = {}
_BUCKETS: Mapping[str, Any] = {"bucket_boundaries": [32, 64, 128, 256, 512, 1024, 2048], "pad": 0}
_ELEMENTS_A_REQUEST = "elements a request"


class _Run(NamedTuple):
    elements_per_second: float
    requests: int


def _ragged(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The fixed costs of requests set the rate; padding is work for the client and the model."""
    count = scale.count(20_000, least=200)
    small = min(_BUNDLE_ELEMENTS, count)
    bundles = {f"bundles of {small:,}": small, f"one bundle of {count:,}": count}
    policies = {"equal lengths": _EXACT, "buckets": _BUCKETS}
    runs = take_turns(
        rounds,
        {
            f"{policy}, {bundle}": partial(
                run_in_fresh_process, _score, server.endpoint, policies[policy], count, bundles[bundle]
            )
            for bundle in bundles
            for policy in policies
        },
    )
    rows = [
        Row.of(
            name,
            {
                ELEMENTS_PER_SECOND: [run.elements_per_second for run in taken],
                _ELEMENTS_A_REQUEST: [count / run.requests for run in taken],
            },
        )
        for name, taken in runs.items()
    ]
    bundle = next(iter(bundles))
    padded, exact = (
        [run.elements_per_second for run in runs[f"{policy}, {bundle}"]]
        for policy in ("buckets", "equal lengths")
    )
    text = f"elements/s of buckets relative to equal lengths, {bundle}"
    figures = [Figure.of_rounds(text, "at least", 3, ratios(padded, exact))]
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


def _score(endpoint: str, batching: Mapping[str, Any], count: int, bundle_elements: int) -> _Run:
    """Score the elements as a runner would, in bundles.

    Raises:
        AssertionError: a result was lost, or is not that of the element alone.
    """
    elements = _elements(count)
    results: list[Any] = []
    dofn = TritonInferenceDoFn(endpoint, ATTEND, batching=batching)
    dofn.setup()
    try:
        # An instance's first request takes many times as long as its next.
        _score_bundle(dofn, elements[:_BUNDLE_ELEMENTS])
        before, started = execution_count(endpoint, ATTEND), time.perf_counter()
        for first in range(0, count, bundle_elements):
            results += _score_bundle(dofn, elements[first : first + bundle_elements])
        seconds = time.perf_counter() - started
        requests = execution_count(endpoint, ATTEND) - before
    finally:
        dofn.teardown()
    assert len(results) == count, f"{len(results)} results of {count} elements"
    for result in results:
        ids = result.value.example["input_ids"]
        alone = (ids - ids.mean()).astype(np.float32)
        answer = result.value.inference["centred"]
        assert np.allclose(answer, alone, atol=1e-2), f"{answer} instead of {alone}"
    return _Run(count / seconds, requests)


def _elements(count: int) -> list[dict[str, npt.NDArray[np.int64]]]:
    generator = np.random.default_rng(20240229)
    drawn = generator.lognormal(np.log(_MEDIAN_LENGTH), _SPREAD, count)
    lengths = np.clip(np.rint(drawn), 1, _MAX_LENGTH).astype(int)
    ids = [generator.integers(1, 30_000, length) for length in lengths]
    return [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in ids]


def _score_bundle(dofn: TritonInferenceDoFn, elements: list[Any]) -> list[Any]:
    dofn.start_bundle()
    results: list[Any] = []
    for element in elements:
        results += dofn.process(element, GlobalWindows.windowed_value(element))
    return [*results, *dofn.finish_bundle()]


CASE = Case(
    "ragged",
    f"Token ids of log-normal lengths around {_MEDIAN_LENGTH}, batches of at most 64",
    _ragged,
)
