"""Rows that travel as columns: `RowScorer`, and NumPy batches in and out of Beam's batched DoFns.

Where elements come as arrays of many rows there is nothing to pay for a single one: a batch is sent in
slices, without a copy, and its results leave in one array.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.options.pipeline_options import TypeOptions
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.typehints.batch import N, NumpyArray
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.client import TritonClient
from beam_triton.errors import (
    ConfigurationError,
    RemoteProtocolError,
    TritonError,
    UnexpectedOutputError,
    with_message,
)
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.protocol import (
    DATATYPES,
    EncodedRequest,
    InferRequestEncoder,
    InferResponse,
    ModelSpec,
    TensorSpec,
)
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bisection import BisectingSender
from beam_triton.transforms.inference import TritonInference
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import (
    ModelDoFn,
    annotations_of,
    check_can_be_scored,
    default_of,
    display_data_of,
)
from beam_triton.transforms.results import DEFAULT_MODEL_ID, DefaultValue, Outputs

Array = npt.NDArray[Any]
Inputs = Array | dict[str, Array]

# Making one takes a microsecond.
_GLOBAL = (GlobalWindow(),)


class ScoredPart(NamedTuple):
    """The results of some rows of a batch: output name to array, rows along the first dimension."""

    indices: range
    outputs: Mapping[str, Array]
    model_id: str


class ScoredBatch:
    """Rows that travel as columns, and their outcomes; ``context`` belongs to the owner.

    Attributes:
        inputs: the model's one input, or input name to array; rows lie along the first dimension.
        parts: the results, in the rows' order once all are there.
        failures: rows that failed for good, and why.
    """

    __slots__ = ("context", "failures", "inputs", "parts", "rows_left")

    def __init__(self, inputs: Inputs, count: int, context: Any) -> None:
        self.inputs = inputs
        self.parts: list[ScoredPart] = []
        self.failures: list[tuple[range, TritonError]] = []
        self.rows_left = count
        self.context = context


class RowSlice:
    """Some rows of a batch, by their indices."""

    __slots__ = ("batch", "indices")

    def __init__(self, batch: ScoredBatch, indices: range) -> None:
        self.batch = batch
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> "RowSlice":
        return RowSlice(self.batch, self.indices[part])


class RowScorer:
    """Scores the rows of batches, sent in slices; many requests, and batches, in flight.

    Args:
        output: the one output whose datatype and shape must be exactly the described ones, as the pipeline's
            types are made of them; None only counts rows.
        make_default: makes the result of a row that failed for good, if it has one.
        keeps_failures: failed rows are listed in their batch; otherwise, without a default, the first raises.
    """

    def __init__(
        self,
        model: RemoteModel,
        batching: BatchingPolicy,
        metrics: InferenceMetrics,
        *,
        output: TensorSpec | None = None,
        make_default: Callable[[InferRequestEncoder], DefaultValue | None] = lambda encoder: None,
        keeps_failures: bool = False,
    ) -> None:
        self._model = model
        self._batching = batching
        self._output = output
        self._make_default = make_default
        self._keeps_failures = keeps_failures
        self._sender: BisectingSender[RowSlice] = BisectingSender(
            model,
            metrics,
            encode=self._encode,
            on_answer=self._on_answer,
            on_failure=self._on_failure,
            renew=self._renew,
            has_default=make_default(model.encoder) is not None,
        )
        self._use(self._sender.encoder)
        self._taken = 0
        self._ready: list[ScoredBatch] = []

    def add(self, inputs: Inputs, context: Any = None) -> list[ScoredBatch]:
        """Send the rows of a batch; returns the batches that are ready, this one or earlier ones.

        Raises:
            TritonError: a row failed for good, and failures are neither kept nor have a default.
        """
        arrays = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
        count = len(arrays[0])
        batch = ScoredBatch(inputs, count, context)
        self._taken += count
        row_bytes = sum(map(_size_bytes, arrays)) / max(count, 1)
        start = 0
        while start < count:
            stop = min(start + self._request_rows(row_bytes), count)
            self._sender.send(RowSlice(batch, range(start, stop)))
            self._sender.take_ended()
            start = stop
        if not count:
            self._ready.append(batch)
        return self._take_ready()

    def finish(self) -> list[ScoredBatch]:
        """Wait for everything; returns the batches that were not returned before.

        Raises:
            TritonError: as `add`.
            AssertionError: a row was lost or came out twice.
        """
        self._sender.finish(self._taken)
        return self._take_ready()

    def cancel(self) -> None:
        """Abandon everything in flight. A second call does nothing."""
        self._sender.cancel()

    def _take_ready(self) -> list[ScoredBatch]:
        ready, self._ready = self._ready, []
        return ready

    def _use(self, encoder: InferRequestEncoder) -> None:
        """Send rows as ``encoder`` takes them.

        Raises:
            ConfigurationError: the pipeline's types are made of another output than the model's.
        """
        model, output = encoder.model, self._output
        for spec in model.outputs:
            if output is not None and spec.name == output.name and spec != output:
                raise ConfigurationError(
                    f"model {model.name!r} gives output {spec.describe()} now. The pipeline was built for "
                    f"{output.describe()}, and its types cannot change: build and start it anew"
                )
        self._encoder = encoder
        self._is_batched = model.has_batch_dimension
        self._limits = self._batching.limits(model.max_batch_size, self._model.channel.endpoints.learned)
        self._default = self._make_default(encoder)

    def _renew(self, rows: RowSlice) -> list[RowSlice]:
        """The same rows in slices for the model as it is now."""
        if self._encoder is not self._sender.encoder:
            self._use(self._sender.encoder)
        size = min(len(rows), max(1, self._limits.next_batch()[0]))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _encode(self, rows: RowSlice) -> EncodedRequest:
        inputs, indices = rows.batch.inputs, rows.indices
        # Without a batch dimension a request is one row.
        part: Any = slice(indices.start, indices.stop) if self._is_batched else indices.start
        if isinstance(inputs, dict):
            return self._encoder.encode({name: array[part] for name, array in inputs.items()})
        return self._encoder.encode(inputs[part])

    def _on_answer(self, rows: RowSlice, response: InferResponse, is_batched: bool) -> None:
        outputs = response.outputs
        if not is_batched:
            outputs = {name: array[np.newaxis] for name, array in outputs.items()}
        for name, array in outputs.items():
            shape = array.shape[1:] if self._output is None else self._output.shape
            if array.shape != (len(rows), *shape):
                raise UnexpectedOutputError(
                    f"output {name!r} of model {self._model.spec.name!r} has shape {list(array.shape)}, not "
                    f"{[len(rows), *shape]} for the {len(rows)} rows of the request"
                )
        if not outputs:
            raise RemoteProtocolError(f"model {self._model.spec.name!r} answered without outputs")
        rows.batch.parts.append(ScoredPart(rows.indices, outputs, response.model_id))
        self._end(rows)

    def _on_failure(self, rows: RowSlice, error: TritonError) -> None:
        if self._default is not None and self._output is not None:
            defaults = {self._output.name: self._default.rows(self._output.name, len(rows))}
            rows.batch.parts.append(ScoredPart(rows.indices, defaults, DEFAULT_MODEL_ID))
        elif self._keeps_failures:
            rows.batch.failures.append((rows.indices, error))
        else:
            message = f"row {rows.indices.start} of its batch: {error.message}"
            raise with_message(error, message) from error
        self._end(rows)

    def _end(self, rows: RowSlice) -> None:
        batch = rows.batch
        batch.rows_left -= len(rows)
        if not batch.rows_left:
            batch.parts.sort(key=lambda part: part.indices.start)
            self._ready.append(batch)

    def _request_rows(self, row_bytes: float) -> int:
        """As many rows of this size as a request may hold, and at least one."""
        rows, nbytes = self._limits.next_batch()
        return max(1, min(rows, int(nbytes / row_bytes)) if row_bytes else rows)


def _size_bytes(array: Array) -> int:
    return sum(map(len, array.ravel())) if array.dtype.kind == "O" else array.nbytes


class TritonBatchInferenceDoFn(ModelDoFn):
    """Scores NumPy batches on a model with one input; gives arrays of results, an element each.

    Use it through `TritonBatchInference`, which finds the types and makes the arrays batches again.
    They are elements in between because Beam (2.77, ``Operation.finish``) flushes batches downstream
    before it calls ``finish_bundle``, and loses what comes out of there for a batched consumer.

    Args:
        output: the output to give.
        overlaps_batches: requests of one batch stay in flight while the next is taken, which needs
            globally windowed input; otherwise all of a batch's requests are waited for, and only
            these overlap.
    """

    def __init__(
        self, options: InferenceOptions, model_name: str, output: TensorSpec, *, overlaps_batches: bool
    ) -> None:
        super().__init__(options, model_name)
        self._output = output
        self._overlaps_batches = overlaps_batches
        self._scorer: RowScorer | None = None

    def display_data(self) -> dict[str, Any]:
        return display_data_of(self._options, self._model_name, output=self._output.name)

    def get_input_batch_type(self, input_element_type: Any) -> Any:
        """Batches of the element type, along a new first dimension."""
        return _batch_type(input_element_type)

    def infer_output_type(self, input_element_type: Any) -> Any:
        return np.ndarray

    def start_bundle(self) -> None:
        """Begin with nothing in flight."""
        assert self._model is not None, "setup has not been called"
        self._cancel()
        self._scorer = RowScorer(
            self._model,
            self._options.batching,
            InferenceMetrics(self._model.channel.pool),
            output=self._output,
            make_default=partial(default_of, self._options),
        )

    @beam.DoFn.yields_elements  # type: ignore[untyped-decorator]  # Beam's own is
    def process_batch(
        self,
        batch: np.ndarray,
        timestamp: Any = beam.DoFn.TimestampParam,
        pane_info: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterable[Any]:
        """Score a batch of rows; gives one array of results for each batch that has become ready, in its
        rows' order.

        Raises:
            TritonError: rows failed and there is no ``default_value``; the message names the row.
        """
        assert self._scorer is not None
        try:
            ready = self._scorer.add(batch, (timestamp, pane_info))
            if self._overlaps_batches:
                return Outputs(map, self._with_own_time, ready)
            return Outputs(map, self._results, ready + self._scorer.finish())
        except BaseException:
            self._cancel()
            raise

    def finish_bundle(self) -> Iterable[WindowedValue]:
        """Wait until nothing is in flight any more, and give the remaining results."""
        assert self._scorer is not None
        try:
            return Outputs(map, self._with_own_time, self._scorer.finish())
        finally:
            self._cancel()

    def _results(self, scored: ScoredBatch) -> Array:
        # One array a batch, not one a request: a batch of Beam's costs twenty times the copy.
        found = [part.outputs[self._output.name] for part in scored.parts]
        if found:
            return np.concatenate(found)
        return np.empty((0, *self._output.shape), DATATYPES[self._output.datatype].array_dtype)

    def _with_own_time(self, scored: ScoredBatch) -> WindowedValue:
        timestamp, pane_info = scored.context
        return WindowedValue(self._results(scored), timestamp, _GLOBAL, pane_info)


class _ArraysAsBatches(beam.DoFn):
    """Takes arrays of rows, an element each, for batches of rows."""

    def __init__(self, output: TensorSpec) -> None:
        self._output = output

    @beam.DoFn.yields_batches  # type: ignore[untyped-decorator]  # as above
    def process(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        yield rows

    def get_output_batch_type(self, input_element_type: Any) -> Any:
        """Batches of the output, along a new first dimension."""
        return _batch_type(element_type_of(self._output))

    def infer_output_type(self, input_element_type: Any) -> Any:
        return element_type_of(self._output)


class TritonBatchInference(beam.PTransform[Any, Any]):
    """Scores a PCollection of arrays that Beam carries in NumPy batches; gives one output the same way.

    ::

        embeddings = (
            rows.with_output_types(NumpyArray[np.float32, (128,)])
            | TritonBatchInference("http://triton:8000", "embed")
        )

    The element type of the input has to be a ``NumpyArray`` of numbers (or a NumPy scalar type); batches come
    from a producer whose ``process_batch`` yields arrays, or are made by Beam out of elements. A
    batch larger than the model's limit is sent in parts, a smaller one as it is. A batch of results has
    the rows' order and timestamp, windows and pane of its batch; results carry no example or key: use
    `TritonInference` where they are needed.

    Args:
        output: the model's output to give; may be left out where it has one.
        options: the keyword arguments that `InferenceOptions` describes. ``default_value``, one
            value of the output's shape, stands in for rows that fail; otherwise a failed row fails
            its bundle. Without ``model_spec`` the server is asked for the model here, as Beam needs
            the output's type while the pipeline is built.

    Raises:
        ConfigurationError: an option cannot work, or the model has another number of inputs than
            one, no batch dimension, or an output without a fixed shape or NumPy dtype.
    """

    def __init__(
        self, endpoint: str | Sequence[str], model_name: str, *, output: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        given = InferenceOptions.from_options({"endpoint": endpoint, **options})
        for name in ("outputs", "classification"):
            if getattr(given, name) is not None:
                raise ConfigurationError(
                    f"{name}: TritonBatchInference gives one output as the model computes it; "
                    f"name it by output="
                )
        self._model_name = model_name
        with TritonClient.from_inference_options(given) as client:
            spec = client.wait_for_model_spec(model_name)
        self._output = _chosen_output(spec, output)
        self._options = dataclasses.replace(given, outputs=(self._output.name,))
        if self._options.default_value is not None:
            DefaultValue(self._options.default_value, spec, (self._output,))
        self._one_by_one = TritonInference(endpoint, model_name, outputs=(self._output.name,), **options)

    def default_label(self) -> str:
        """The step's name where the user gives none."""
        return f"TritonBatchInference({self._model_name})"

    def display_data(self) -> dict[str, Any]:
        return display_data_of(self._options, self._model_name, output=self._output.name)

    def annotations(self) -> dict[str, Any]:
        """The model, as ``RunInference`` annotates its own."""
        return {**annotations_of(self, self._options, self._model_name), **super().annotations()}

    def expand(self, pcoll: Any) -> Any:
        """The output's batches."""
        if not _passes_batches(pcoll.pipeline):
            take_output = beam.Map(_output_of, self._output.name)
            return pcoll | self._one_by_one | take_output.with_output_types(element_type_of(self._output))
        dofn = TritonBatchInferenceDoFn(
            self._options,
            self._model_name,
            self._output,
            overlaps_batches=isinstance(pcoll.windowing.windowfn, GlobalWindows),
        )
        return (
            pcoll
            | "Score" >> beam.ParDo(dofn).with_output_types(np.ndarray)
            | "Batches"
            >> beam.ParDo(_ArraysAsBatches(self._output)).with_output_types(element_type_of(self._output))
        )


def _passes_batches(pipeline: beam.Pipeline) -> bool:
    """Whether Beam hands batches to a DoFn: its runtime type checker and its oldest runner do not."""
    is_checked = pipeline.options.view_as(TypeOptions).runtime_type_check
    return not is_checked and type(pipeline.runner).__name__ != "BundleBasedDirectRunner"


def _output_of(result: PredictionResult, name: str) -> Any:
    outputs: Any = result.inference
    return outputs[name]


def element_type_of(spec: TensorSpec) -> Any:
    """Beam's type of one element of a tensor: ``NumpyArray[dtype, shape]``."""
    return NumpyArray[DATATYPES[spec.datatype].array_dtype, spec.shape]


def _batch_type(element_type: Any) -> Any:
    shape = getattr(element_type, "shape", ())
    try:
        dtype = np.dtype(getattr(element_type, "dtype", element_type))
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind in "OSU":
        raise ConfigurationError(
            f"TritonBatchInference takes elements of a numeric NumPy type, not {element_type!r}: declare "
            f"them by .with_output_types(NumpyArray[np.float32, (128,)]), or use TritonInference"
        )
    return NumpyArray[dtype, (N, *shape)]


def _chosen_output(spec: ModelSpec, name: str | None) -> TensorSpec:
    check_can_be_scored(spec)
    if len(spec.inputs) != 1 or not spec.has_batch_dimension:
        raise ConfigurationError(
            f"TritonBatchInference needs a model with one input and a batch dimension; {spec.name!r}: "
            f"{spec.describe()}"
        )
    outputs = {output.name: output for output in spec.outputs}
    if name is None and len(outputs) == 1:
        (name,) = outputs
    if name not in outputs:
        raise ConfigurationError(f"output {name!r}: choose one of model {spec.name!r}: {', '.join(outputs)}")
    output = outputs[name]
    if -1 in output.shape or DATATYPES[output.datatype].is_bytes:
        raise ConfigurationError(f"output {output.describe()} has no fixed NumPy shape and dtype")
    return output
