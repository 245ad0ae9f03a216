"""The steps of the pipeline that see rows: files are read, blocks are scored, failures are limited."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.client import TritonClient
from beam_triton.dispatch.activity import ACTIVITY, FailedElements
from beam_triton.errors import ConfigurationError, TooManyFailuresError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import ModelSpec
from beam_triton.score.column_arrays import ColumnArrays
from beam_triton.score.input_columns import InputColumns, list_columns
from beam_triton.score.job_report import METRICS_NAMESPACE
from beam_triton.score.row_reading import Failure, FileSource, Piece, RowBlock, RowError, match_files
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import ModelDoFn, check_can_be_scored
from beam_triton.transforms.row_scorer import RowScorer, ScoredBatch

BLOCKS = "blocks"
RESULTS = "results"
FAILURES = "failures"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model, and how requests to it are made; without ``spec`` each worker asks the server for it."""

    name: str
    options: InferenceOptions
    spec: ModelSpec | None = None

    def describe(self, *, wait_seconds: float = 0.0) -> ModelSpec:
        """``spec``, or the server's answer, retried for ``wait_seconds`` while it cannot be reached.

        Raises TritonError when the server does not answer or has no such model, ConfigurationError when a
        batch of unrelated rows cannot be sent to the model.
        """
        if self.spec is not None:
            return self.spec
        with TritonClient.from_inference_options(self.options) as client:
            model = client.open_model(self.name, wait_seconds=wait_seconds)
        try:
            check_can_be_scored(model.spec, model.encoder.expected_outputs)
            return model.spec
        finally:
            model.close()


@dataclass(frozen=True, kw_only=True)
class RowSelection:
    """The columns that are used: those of the inputs, those kept for the result, those tested.

    ``where`` are pairs of column and text; a row whose column has another text is skipped.
    """

    inputs: tuple[InputColumns, ...] = ()
    keep: tuple[str, ...] = ()
    where: tuple[tuple[str, str], ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that every row must have, beside those of the inputs."""
        return (*self.keep, *(column for column, _ in self.where))

    def check(self, names: Sequence[str] | None) -> None:
        """Raise ConfigurationError when a file with these columns lacks one that every row must have."""
        for name in self.named:
            if names is not None and name not in names:
                raise ConfigurationError(f"there is no column {name!r}; the file has {list_columns(names)}")

    def select(self, block: RowBlock) -> RowBlock:
        """The rows that are not skipped."""
        wanted = np.ones(len(block), bool)
        for name, text in self.where:
            if block.is_text:
                wanted &= pc.equal(block.column(name), text).to_numpy(zero_copy_only=False)
            else:
                wanted &= [str(value) == text for value in block.values(name)]
        return block if wanted.all() else block.take(np.flatnonzero(wanted))


class ReadRows(beam.PTransform[Any, Any]):
    """Files to blocks of rows, and to a `Failure` for each row that cannot be read.

    Applied to a pipeline, it gives a dict-like of two PCollections, `BLOCKS` and `FAILURES`. ``patterns``
    are paths and globs of any of Beam's FileSystems; they are looked up when the pipeline runs.
    """

    def __init__(
        self, patterns: Sequence[str], source: FileSource, selection: RowSelection, model: ServedModel
    ) -> None:
        super().__init__()
        self._patterns = tuple(patterns)
        self._source = source
        self._reading = _ReadPieces(source, selection, model)

    def expand(self, pipeline: Any) -> Any:
        return (
            pipeline
            | "Patterns" >> beam.Create([self._patterns])
            | "FindPieces" >> beam.FlatMap(_find_pieces, self._source)
            | "SharePieces" >> beam.Reshuffle()
            | "ReadBlocks" >> beam.ParDo(self._reading).with_outputs(FAILURES, main=BLOCKS)
        )


def _find_pieces(patterns: Sequence[str], source: FileSource) -> Iterator[Piece]:
    yield from source.all_pieces(match_files(patterns))


class _ReadPieces(beam.DoFn):
    def __init__(self, source: FileSource, selection: RowSelection, model: ServedModel) -> None:
        self._source = source
        self._selection = selection
        self._model = model
        self._rows = Metrics.counter(METRICS_NAMESPACE, "rows_read")
        self._failed = Metrics.counter(METRICS_NAMESPACE, "rows_failed")

    def setup(self) -> None:
        spec = self._model.describe(wait_seconds=self._model.options.timeout_seconds)
        self._arrays = ColumnArrays(spec, self._selection.inputs)

    def process(self, piece: Piece) -> Iterator[Any]:
        for item in self._source.read(piece, self._wanted):
            failures = [item] if isinstance(item, Failure) else []
            if isinstance(item, RowBlock):
                try:
                    self._selection.check(item.names)
                    block = self._selection.select(item)
                    self._rows.inc(len(block))
                    if len(block):
                        yield block
                except ConfigurationError as error:
                    failures = [item.failure(index, RowError(error.message)) for index in range(len(item))]
            self._rows.inc(len(failures))
            self._failed.inc(len(failures))
            if failures and ACTIVITY.watchers:
                first = failures[0]
                ACTIVITY.tell(FailedElements(len(failures), first.error, first.message))
            yield from (TaggedOutput(FAILURES, failure) for failure in failures)

    def _wanted(self, names: Sequence[str]) -> Collection[str]:
        try:
            return self._arrays.columns_used(names) | {*self._selection.named}
        except ConfigurationError:
            # The failure of each row says that the file does not fit, and lists its columns.
            return names


class ScoredRows(NamedTuple):
    """Rows with results; ``outputs`` are arrays whose first dimension is the rows'."""

    rows: RowBlock
    outputs: dict[str, npt.NDArray[Any]]
    model_id: str


class ScoreBlocks(ModelDoFn):
    """Scores blocks of rows; gives `ScoredRows`, and tagged `FAILURES` for the rows that cannot be scored."""

    def __init__(self, model: ServedModel, selection: RowSelection) -> None:
        super().__init__(model.options, model.name)
        self._selection = selection
        self._failed = Metrics.counter(METRICS_NAMESPACE, "rows_failed")
        self._scorer: RowScorer | None = None

    def setup(self) -> None:
        super().setup()
        assert self._model is not None
        self._arrays = ColumnArrays(self._model.spec, self._selection.inputs)
        # An output that always holds one value becomes a value, not a list of one.
        self._single = {spec.name for spec in self._model.spec.outputs if all(dim == 1 for dim in spec.shape)}

    def start_bundle(self) -> None:
        assert self._model is not None, "setup has not been called"
        self._cancel()
        metrics = InferenceMetrics(self._model.channel)
        self._scorer = RowScorer(self._model, self._options.batching, metrics, exc_class=Exception)

    def process(self, block: RowBlock) -> Iterator[Any]:
        assert self._scorer is not None
        groups, errors = self._arrays.arrays(block)
        self._failed.inc(len(errors))
        for index, row_error in errors.items():
            ACTIVITY.failed(row_error)
            yield TaggedOutput(FAILURES, block.failure(index, row_error))
        try:
            for indices, arrays in groups:
                yield from chain.from_iterable(map(self._ended, self._scorer.add(arrays, block, indices)))
        except BaseException:
            self._cancel()
            raise

    def finish_bundle(self) -> Iterator[Any]:
        assert self._scorer is not None
        try:
            for output in chain.from_iterable(map(self._ended, self._scorer.finish())):
                is_failure = isinstance(output, TaggedOutput)
                value = output.value if is_failure else output
                in_window = WindowedValue(value, MIN_TIMESTAMP, (GlobalWindow(),))
                yield TaggedOutput(FAILURES, in_window) if is_failure else in_window
        finally:
            self._cancel()

    def _ended(self, batch: ScoredBatch) -> Iterator[Any]:
        block, indices = batch.context, batch.numbers
        for failed, error in batch.failures:
            for index in indices[failed.start : failed.stop]:
                yield TaggedOutput(FAILURES, block.failure(index, error))
        alike: dict[Any, list[Any]] = {}
        for part in batch.parts:
            shapes = tuple(array.shape[1:] for array in part.outputs.values())
            alike.setdefault((part.model_id, shapes), []).append(part)
        for (model_id, _), parts in alike.items():
            rows = np.concatenate([indices[part.indices.start : part.indices.stop] for part in parts])
            outputs = {}
            for name in parts[0].outputs:
                arrays = batch.outputs(name) if len(alike) == 1 else [part.outputs[name] for part in parts]
                array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
                is_single = name in self._single and array.size == len(array)
                outputs[name] = array.reshape(len(array)) if is_single else array
            yield ScoredRows(block.take(rows, self._selection.keep), outputs, model_id)


class LimitFailures(beam.DoFn):
    """Passes failures on, and raises TooManyFailuresError when a worker has seen more than ``maximum``.

    Workers do not know of each other's failures, so a job of many stops at a multiple of the maximum; the
    exact count is to be compared when the job has ended.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._seen = 0

    def process(self, failure: Failure) -> Iterator[Failure]:
        self._seen += 1
        if self._seen > self._maximum:
            last = failure.describe()
            raise TooManyFailuresError(f"more than {self._maximum} row(s) failed; the last: {last}")
        yield failure
