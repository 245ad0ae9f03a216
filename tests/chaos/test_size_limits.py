"""Batches too large for the model's memory or for a proxy: the limit is learned, and nothing is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import GlobalWindows
from apache_beam.typehints.batch import N, NumpyArray
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import TritonBatchInference, TritonInference, TritonInferenceDoFn, TritonModelHandler
from beam_triton.testing import LocalTriton
from tests.support import faults
from tests.support.answers import Answer, forward_to
from tests.support.fault_server import Exchange, FaultServer, infer_requests, serve
from tests.support.models import throwaway_triton, write_models
from tests.support.nginx import Nginx, nginx_binary
from tests.support.numbered_run import counters_of

# 64 rows by its configuration, 32 by its memory; 20 ms a request.
MODEL = "short_of_memory"
ELEMENTS = 3_200
BODY_LIMIT = 64 * 1024


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    models = write_models(tmp_path_factory.mktemp("size_limits") / "models", [MODEL, "raising", "echo"])
    with throwaway_triton(models) as server:
        yield server


def numbers(count: int) -> Iterator[npt.NDArray[np.float32]]:
    """Elements: FP32 arrays of shape [1]."""
    return (np.array([number], np.float32) for number in range(count))


def score(
    endpoint: str, model: str, elements: Iterator[npt.NDArray[np.float32]], **options: Any
) -> tuple[list[Any], list[Any], float]:
    """The results of one bundle, its dead letters, and the seconds that it took.

    Tensors go by HTTP, as to the proxies on other machines that the tests' proxies stand for.
    """
    options = {"shared_memory": "never", **options}
    dofn = TritonInferenceDoFn(endpoint, model, with_exception_handling=True, **options)
    dofn.setup()
    try:
        dofn.start_bundle()
        started = time.monotonic()
        outputs: list[Any] = []
        for element in elements:
            outputs += dofn.process(element, GlobalWindows.windowed_value(element)) or ()
        outputs += dofn.finish_bundle()
        seconds = time.monotonic() - started
    finally:
        dofn.teardown()
    results = [output.value for output in outputs if isinstance(output, WindowedValue)]
    return (
        results,
        [output.value.value for output in outputs if not isinstance(output, WindowedValue)],
        seconds,
    )


class Rows(beam.DoFn):
    """Batches of 50 rows with numbers."""

    @beam.DoFn.yields_batches  # type: ignore[untyped-decorator]
    def process(self, block: int) -> Iterator[Any]:
        yield np.arange(block * 50, block * 50 + 50, dtype=np.float32)[:, np.newaxis]

    def get_output_batch_type(self, input_element_type: Any) -> Any:
        return NumpyArray[np.float32, (N, 1)]

    def infer_output_type(self, input_element_type: Any) -> Any:
        return NumpyArray[np.float32, (1,)]


def elements_way(elements: beam.PCollection[Any], endpoint: str, **options: Any) -> Any:
    scored = elements | TritonInference(endpoint, MODEL, **options)
    return scored | beam.Map(lambda result: float(result.inference["y"][0]))


def run_inference_way(elements: beam.PCollection[Any], endpoint: str, **options: Any) -> Any:
    options.setdefault("batching", {"max_batch_size": 64})
    # Beam keeps the model for the next pipeline, and with it the connections of all who share its pool.
    options["pool"] = {"max_idle": 19}
    scored = elements | RunInference(TritonModelHandler(endpoint, MODEL, **options))
    return scored | beam.Map(lambda result: float(result.inference["y"][0]))


def numpy_way(elements: beam.PCollection[Any], endpoint: str, **options: Any) -> Any:
    blocks = elements.pipeline | "Blocks" >> beam.Create(range(ELEMENTS // 50), reshuffle=False)
    rows = blocks | beam.ParDo(Rows())  # type: ignore[no-untyped-call]
    return rows | TritonBatchInference(endpoint, MODEL, **options) | beam.Map(lambda row: float(row[0]))


# Other time-outs, because transforms with equal ones share what has been learned.
@pytest.mark.parametrize(
    ("way", "timeout_seconds"), [(elements_way, 31), (run_inference_way, 32), (numpy_way, 33)]
)
def test_a_model_short_of_memory_takes_at_most_twice_the_time(
    triton: LocalTriton, way: Callable[..., Any], timeout_seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Of batches that fit from the start; nothing is lost, and one line is logged."""

    def run(**options: Any) -> tuple[dict[str, int], float]:
        pipeline = beam.Pipeline("FnApiRunner", options=PipelineOptions([]))
        elements = pipeline | beam.Create(list(numbers(ELEMENTS)), reshuffle=False)
        total = way(
            elements, triton.endpoint, timeout_seconds=timeout_seconds, **options
        ) | beam.CombineGlobally(sum)
        assert_that(total, equal_to([float(sum(range(ELEMENTS)))]))
        started = time.monotonic()
        result = pipeline.run()
        result.wait_until_finish()
        return counters_of(result), time.monotonic() - started

    _, fitting_seconds = run(batching={"max_batch_size": 32})
    with caplog.at_level(logging.WARNING, "beam_triton"):
        counters, seconds = run()
    assert counters["elements"] == ELEMENTS
    assert counters["split_batches"] <= 40
    assert seconds < 2 * fitting_seconds
    lines = [record.getMessage() for record in caplog.records if "elements fail" in record.getMessage()]
    assert len(lines) == 1, lines


def test_poison_elements_lower_no_limit(triton: LocalTriton, caplog: pytest.LogCaptureFixture) -> None:
    """A batch with an element that makes the model raise is not too large."""
    elements = (np.array([-1 if n % 500 == 7 else n], np.float32) for n in range(5_000))
    with caplog.at_level(logging.WARNING, "beam_triton"):
        results, failures, _ = score(triton.endpoint, "raising", elements)
    assert (len(results), len(failures)) == (4_990, 10)
    assert not [record for record in caplog.records if "fail," in record.getMessage()]


def test_limit_is_learned_among_failing_elements(triton: LocalTriton) -> None:
    """Elements that no request can carry and batches that are too large come together."""
    elements = (np.zeros(2 if n % 100 == 7 else 1, np.float32) for n in range(3_200))
    results, failures, seconds = score(triton.endpoint, MODEL, elements)
    assert (len(results), len(failures)) == (3_168, 32)
    assert seconds < 5


@pytest.mark.skipif(nginx_binary() is None, reason="needs nginx")
def test_body_limit_of_nginx_is_learned(triton: LocalTriton) -> None:
    """nginx answers 413 to bodies above client_max_body_size."""
    port = int(triton.endpoint.rsplit(":", 1)[1])
    with Nginx([port], max_body=str(BODY_LIMIT), access_log=True) as nginx:
        elements = (np.full(128, n, np.float32) for n in range(20_000))
        results, failures, _ = score(nginx.endpoint, "echo", elements)
        assert (len(results), failures) == (20_000, [])
        statuses = nginx.statuses()
    # 40 bodies of 512 KiB, halved until they have 64 KiB or less if all of them are in flight at first.
    assert statuses[413] <= 40 * (1 + 2 + 4)


def refused_by(fault: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    """A proxy that meets bodies above its limit with a fault."""

    def proxy(exchange: Exchange) -> None:
        length = int(exchange.read_head().header("Content-Length", "0"))
        (fault if length > BODY_LIMIT else serve)(exchange)

    return proxy


@pytest.mark.parametrize(
    "fault",
    [
        faults.reset_before_reading,
        faults.reset_after_reading,
        faults.closed_without_answer,
        faults.answered(Answer(502, b"<html>")),
        faults.answered(Answer(503, b"<html>")),
        faults.answered(Answer(500, b"<html>")),
    ],
    ids=["reset at once", "reset", "closed", "502", "503", "500"],
)
def test_body_limit_of_other_proxies_is_learned(
    triton: LocalTriton, fault: Callable[[Exchange], None]
) -> None:
    """Whatever status they use for it, or none: nothing is lost, and large bodies are few."""
    origin = forward_to(int(triton.endpoint.rsplit(":", 1)[1]))
    with FaultServer(origin, refused_by(fault), when=infer_requests) as proxy:
        elements = (np.full(128, n, np.float32) for n in range(20_000))
        results, failures, seconds = score(proxy.endpoint, "echo", elements)
        assert (len(results), failures) == (20_000, [])
        large = [r for r in proxy.requests if int(r.header("Content-Length", "0")) > BODY_LIMIT]
    # The same, and some of them sent twice.
    assert len(large) < 400
    assert seconds < 15
