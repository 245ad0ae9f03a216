"""The work that throughput is measured with: elements made in a pipeline, counted and checked at its end."""

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

from benchmarks.memory import peak_bytes

Array = npt.NDArray[np.float32]

_NAMESPACE = "benchmarks"
_MAX_BLOCK_ELEMENTS = 500
_MAX_BLOCK_BYTES = 1 << 20
_MAX_SHORT_ELEMENTS = 2_000
_SEED = 20240229


@dataclass(frozen=True)
class Target:
    """A model with one FP32 input ``x`` that it answers unchanged as ``y``, and where it is served."""

    endpoint: str
    grpc_endpoint: str
    model_name: str

    def named(self, model_name: str) -> Target:
        """Another model of the same server."""
        return Target(self.endpoint, self.grpc_endpoint, model_name)


@dataclass(frozen=True)
class Workload:
    """What a peer is to score.

    Attributes:
        elements: how many, each an FP32 array of ``width`` values.
        batch_size: elements a request; None leaves it to the peer's own default.
        options: keyword arguments for the library's transform.
        workers: threads, each with DoFn instances of its own, in one process.
        constant: the value of all elements; None makes random ones.
        in_batches: the generator makes arrays of ``batch_size`` elements instead of single ones.
        check_every: every so many results are compared with what was sent, and all are counted. None
            compares all of a short workload's, whose numbers are added up as well, and every 100th of a long
            one's, which is timed.
        load_connections, load_seconds: how a load generator, which knows no elements, is to work.
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
    def compared_every(self) -> int:
        """``check_every``, or what the number of elements makes of it."""
        return self.check_every or (1 if self.elements <= _MAX_SHORT_ELEMENTS else 100)

    @property
    def is_numbered(self) -> bool:
        """Elements hold their own numbers, in their first values."""
        return self.constant is None

    @property
    def element_bytes(self) -> int:
        return 4 * self.width

    @property
    def block_elements(self) -> int:
        """Elements that the generator makes at a time."""
        if self.in_batches and self.batch_size is not None:
            return self.batch_size
        if self.workers > 1:
            # As many blocks as there are workers, or some would have nothing to do; and no larger than a
            # batch, for an element keeps its whole block in memory, once for each worker.
            return max(1, min(self.batch_size or _MAX_BLOCK_ELEMENTS, self.elements // (4 * self.workers)))
        return max(1, min(_MAX_BLOCK_ELEMENTS, _MAX_BLOCK_BYTES // self.element_bytes))

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
    """What a peer reached. The processor time is the peer's own process's, and 0 where it is not known."""

    elements: int
    seconds: float
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def elements_per_second(self) -> float:
        return self.elements / self.seconds


class Generate(beam.DoFn):
    """Numbers of a block to its elements."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def setup(self) -> None:
        self._pattern = self._workload.pattern(self._workload.block_elements)

    def process(self, block: tuple[int, int]) -> list[Array]:
        first, size = block
        return list(numbered(self._pattern, first, size, self._workload.is_numbered))


def numbered(pattern: Array, first: int, size: int, is_numbered: bool) -> Array:
    """A block of fresh rows, which hold their own numbers where their values are free."""
    rows: Array = pattern[:size].copy()
    if is_numbered:
        rows[:, 0] = np.arange(first, first + size)
    return rows


@dataclass
class Count:
    """What came out of a bundle, added up over bundles by Beam's metrics.

    ``number_sum`` is the sum of the elements' numbers, where a sink adds them up.
    """

    elements: int = 0
    wrong: int = 0
    number_sum: int = 0

    last_report: ClassVar[float] = 0.0
    """When a sink of this process last reported, on the clock of ``time.perf_counter``."""

    def report(self) -> None:
        """Hand it over; at the end of a bundle."""
        Count.last_report = time.perf_counter()
        for name, value in asdict(self).items():
            Metrics.counter(_NAMESPACE, name).inc(value)


class Check(beam.DoFn):
    """Counts results, compares some with what was sent, and adds the numbers of all up if it compares all."""

    seen = 0
    """Results of this process so far, to within ``compared_every``; for who watches from another thread."""

    def __init__(self, workload: Workload) -> None:
        self._every = workload.compared_every
        self._adds_numbers = numbers_add_up(workload)

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
        if self._adds_numbers:
            self._count.number_sum += int(sent[0])


def numbers_add_up(workload: Workload) -> bool:
    """Whether every result is looked at, and has a number."""
    return workload.compared_every == 1 and workload.is_numbered


def _is_echo(result: PredictionResult) -> bool:
    inference: Any = result.inference
    answer = inference["y"] if isinstance(inference, Mapping) else inference
    return np.array_equal(answer, np.asarray(result.example))


def run_pipeline(transform: beam.PTransform[Any, Any], workload: Workload) -> Throughput:
    """Run elements through ``transform`` on the FnApiRunner, in this process.

    The time runs from the start of the run to the last result: the graph's translation, ``setup`` and
    connecting are in it. Not in it is that Beam's state sampler, a thread that looks up every 0.2 s, lets
    a bundle end only then, which would round short runs up by a fifth.

    Raises:
        AssertionError: a result was lost, or was wrong, or one too many came.
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
        adds_numbers=numbers_add_up(workload),
    )


def timed_run(
    build: Callable[[beam.Pipeline], object], workload: Workload, *, adds_numbers: bool
) -> Throughput:
    """Run the pipeline that ``build`` makes, whose sink reports a `Count`, and see that it lost nothing."""
    options = ["--direct_running_mode=in_memory"]
    if workload.workers > 1:
        options = ["--direct_running_mode=multi_threading", f"--direct_num_workers={workload.workers}"]
    pipeline = beam.Pipeline("FnApiRunner", options=PipelineOptions(options))
    build(pipeline)
    cpu_before, before = time.process_time(), time.perf_counter()
    outcome = pipeline.run()
    outcome.wait_until_finish()
    seconds, cpu_seconds = Count.last_report - before, time.process_time() - cpu_before
    found, expected = counted(outcome), expected_count(workload, adds_numbers=adds_numbers)
    if found != expected:
        raise AssertionError(f"what came out is {found} instead of {expected}")
    return Throughput(workload.elements, seconds, cpu_seconds, peak_bytes())


def expected_count(workload: Workload, *, adds_numbers: bool) -> Count:
    """What the sinks report when nothing was lost."""
    number_sum = workload.elements * (workload.elements - 1) // 2 if adds_numbers else 0
    return Count(workload.elements, number_sum=number_sum)


def counted(outcome: Any) -> Count:
    """What the sinks of a finished pipeline reported."""
    count = Count()
    for counter in outcome.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))["counters"]:
        name = counter.key.metric.name
        # Where a runner gives no attempted value, as Prism, Beam makes None of a committed 0.
        setattr(count, name, getattr(count, name) + (counter.result or 0))
    return count
