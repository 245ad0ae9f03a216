"""The workload of throughput measurements: a pipeline makes elements, then counts and checks the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.metrics import Metrics
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.options.pipeline_options import PipelineOptions

from benchmarks.process import peak_bytes

Array = npt.NDArray[np.float32]

_NAMESPACE = "benchmarks"
_DEFAULT_BATCH_SIZE = 64
_MAX_BLOCK_ELEMENTS = 500
_MAX_BLOCK_BYTES = 1 << 20
_MAX_SHORT_ELEMENTS = 2_000
_SEED = 20240229


@dataclass(frozen=True)
class Target:
    """A model that returns its one FP32 input ``x`` unchanged as ``y``, and the addresses of its server."""

    endpoint: str
    grpc_endpoint: str
    model_name: str

    @property
    def infer_url(self) -> str:
        return f"{self.endpoint}/v2/models/{self.model_name}/infer"


@dataclass(frozen=True)
class Workload:
    """The elements that a peer scores.

    Attributes:
        elements: their number; each is an FP32 array of ``width`` values.
        batch_size: elements a request; None takes the library's default, 64 for other peers.
        options: keyword arguments for the library's transform.
        workers: threads of one process, each with its own DoFn instances.
        constant: the value of all elements; None makes random elements that start with their own number.
        in_batches: the generator makes arrays of ``batch_size`` elements instead of single ones.
        check_every: one in so many results is compared with what was sent; all are counted. None compares
            every result of a short workload, and sums the elements' numbers too, and every 100th of a long
            one, which is timed.
        load_connections, load_seconds: connections and duration for a load generator, which sends the same
            batch over and over.
    """

    target: Target
    elements: int
    width: int = 128
    batch_size: int | None = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    constant: float | None = None
    in_batches: bool = False
    check_every: int | None = None
    load_connections: int = 4
    load_seconds: float = 5.0

    @property
    def request_elements(self) -> int:
        """Elements a request for peers that have no default of their own."""
        return self.batch_size or _DEFAULT_BATCH_SIZE

    @property
    def compared_every(self) -> int:
        """``check_every``, or its default for the number of elements."""
        return self.check_every or (1 if self.elements <= _MAX_SHORT_ELEMENTS else 100)

    @property
    def is_numbered(self) -> bool:
        """The first value of each element is its number."""
        return self.constant is None

    @property
    def sums_numbers(self) -> bool:
        """Every result is looked at, and has a number."""
        return self.compared_every == 1 and self.is_numbered

    @property
    def block_elements(self) -> int:
        """Elements that the generator makes at a time."""
        if self.in_batches and self.batch_size is not None:
            return self.batch_size
        if self.workers > 1:
            # Enough blocks for every worker. No larger than a batch, because an element keeps its whole
            # block in memory, once for each worker.
            return max(1, min(self.batch_size or _MAX_BLOCK_ELEMENTS, self.elements // (4 * self.workers)))
        return max(1, min(_MAX_BLOCK_ELEMENTS, _MAX_BLOCK_BYTES // (4 * self.width)))

    def blocks(self) -> Sequence[tuple[int, int]]:
        """First number and size of each block."""
        size = self.block_elements
        return [(start, min(size, self.elements - start)) for start in range(0, self.elements, size)]

    def pattern(self, rows: int) -> Array:
        """Rows that look like data: random, or the constant."""
        if self.constant is not None:
            return np.full((rows, self.width), self.constant, np.float32)
        random: Array = np.random.default_rng(_SEED).random((rows, self.width), np.float32)
        return random


@dataclass(frozen=True)
class Throughput:
    """A peer's run. ``cpu_seconds`` are those of the peer's own process, 0 where they are unknown."""

    elements: int
    seconds: float
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def elements_per_second(self) -> float:
        return self.elements / self.seconds


class Generate(beam.DoFn):
    """From a block's first number and size to its elements."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def setup(self) -> None:
        self._pattern = self._workload.pattern(self._workload.block_elements)

    def process(self, block: tuple[int, int]) -> list[Array]:
        first, size = block
        return list(numbered(self._pattern, first, size, self._workload.is_numbered))


def numbered(pattern: Array, first: int, size: int, is_numbered: bool) -> Array:
    """Copies of the first ``size`` rows, which start with their numbers if they are numbered."""
    rows: Array = pattern[:size].copy()
    if is_numbered:
        rows[:, 0] = np.arange(first, first + size)
    return rows


@dataclass
class Count:
    """The results of a bundle; Beam's metrics add the bundles up.

    ``number_sum`` is the sum of the elements' numbers, where a sink sums them.
    """

    elements: int = 0
    wrong: int = 0
    number_sum: int = 0

    last_report: ClassVar[float] = 0.0
    """When a sink of this process last reported, by ``time.perf_counter``."""

    def report(self) -> None:
        """Add it to Beam's metrics, at the end of a bundle."""
        Count.last_report = time.perf_counter()
        for name, value in asdict(self).items():
            Metrics.counter(_NAMESPACE, name).inc(value)


class Check(beam.DoFn):
    """Counts results, compares some with what was sent, and sums the numbers if it compares all."""

    seen = 0
    """Results of this process so far, to within ``compared_every``; may be read from another thread."""

    def __init__(self, workload: Workload) -> None:
        self._every = workload.compared_every
        self._sums_numbers = workload.sums_numbers

    def start_bundle(self) -> None:
        self._elements = 0
        self._count = Count()

    def process(self, result: Any) -> None:
        self._elements += 1
        if self._elements % self._every == 0:
            self._compare(result)

    def finish_bundle(self) -> None:
        self._count.elements = self._elements
        self._count.report()

    def _compare(self, result: Any) -> None:
        Check.seen += self._every
        sent = result
        if isinstance(result, PredictionResult):
            sent = result.example
            self._count.wrong += not _is_echo(result)
        if self._sums_numbers:
            self._count.number_sum += int(sent[0])


def _is_echo(result: PredictionResult) -> bool:
    inference: Any = result.inference
    answer = inference["y"] if isinstance(inference, Mapping) else inference
    return np.array_equal(answer, np.asarray(result.example))


def run_pipeline(transform: beam.PTransform[Any, Any], workload: Workload) -> Throughput:
    """Run elements through ``transform`` on the FnApiRunner, in this process.

    The time starts with the run and ends with the last result: it includes the graph's translation, ``setup``
    and connecting. It excludes the wait for Beam's state sampler, a thread that wakes up every 0.2 s and lets
    a bundle end only then, which would round short runs up by a fifth.

    Raises:
        AssertionError: a result was lost, duplicated or wrong.
    """
    return timed_run(
        lambda pipeline: (
            pipeline
            | beam.Create(workload.blocks(), reshuffle=workload.workers > 1)
            | beam.ParDo(Generate(workload))
            | transform
            | beam.ParDo(Check(workload))
        ),
        workload,
        sums_numbers=workload.sums_numbers,
    )


def timed_run(
    build: Callable[[beam.Pipeline], object], workload: Workload, *, sums_numbers: bool
) -> Throughput:
    """Run the pipeline that ``build`` makes, whose sink reports a `Count`, and check that count."""
    options = ["--direct_running_mode=in_memory"]
    if workload.workers > 1:
        options = ["--direct_running_mode=multi_threading", f"--direct_num_workers={workload.workers}"]
    pipeline = beam.Pipeline("FnApiRunner", options=PipelineOptions(options))
    build(pipeline)
    cpu_before, before = time.process_time(), time.perf_counter()
    outcome = pipeline.run()
    outcome.wait_until_finish()
    seconds, cpu_seconds = Count.last_report - before, time.process_time() - cpu_before
    found, expected = counted(outcome), expected_count(workload, sums_numbers=sums_numbers)
    if found != expected:
        raise AssertionError(f"the results are {found} instead of {expected}")
    return Throughput(workload.elements, seconds, cpu_seconds, peak_bytes())


def expected_count(workload: Workload, *, sums_numbers: bool) -> Count:
    """The report of the sinks when nothing is lost."""
    number_sum = workload.elements * (workload.elements - 1) // 2 if sums_numbers else 0
    return Count(workload.elements, number_sum=number_sum)


def counted(outcome: Any) -> Count:
    """The report of the sinks of a finished pipeline."""
    count = Count()
    for counter in outcome.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))["counters"]:
        name = counter.key.metric.name
        # Prism gives no attempted value, and then Beam turns a committed 0 into None.
        setattr(count, name, getattr(count, name) + (counter.result or 0))
    return count
