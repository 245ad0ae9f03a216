"""NumPy batches in and out of Beam's batched DoFns."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.typehints.batch import N, NumpyArray
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec
from beam_triton.protocol.datatypes import Array
from beam_triton.transforms.exception_handling import DeadLetters
from beam_triton.transforms.model_dofn import display_data_of
from beam_triton.transforms.results import Outputs
from beam_triton.transforms.row_results import OutputColumn
from beam_triton.transforms.row_scorer import RowBatchDoFn, ScoredBatch

# Making one takes a microsecond.
_GLOBAL = (GlobalWindow(),)


class TritonBatchInferenceDoFn(RowBatchDoFn):
    """Scores NumPy batches on a model with one input; gives arrays of results, an element each.

    Use it through `TritonBatchInference`, which finds the types and makes the arrays batches again. They are
    elements in between because a batched consumer would lose those that come from ``finish_bundle``, as
    `beam_triton.transforms.inference.pass_on` explains.

    Args:
        output: the output to give.
        dead_letters: what becomes of failed rows, which are left out of the results; None: the first fails
            the bundle.
        overlaps_batches: requests of one batch stay in flight while the next is taken, which needs
            globally windowed input; otherwise all of a batch's requests are waited for, and only
            these overlap.
    """

    def __init__(
        self,
        options: InferenceOptions,
        model_name: str,
        output: TensorSpec,
        *,
        overlaps_batches: bool,
        dead_letters: DeadLetters | None = None,
    ) -> None:
        super().__init__(options, model_name, (OutputColumn(output, output.name),), dead_letters)
        self._output = output
        self._overlaps_batches = overlaps_batches

    def display_data(self) -> dict[str, Any]:
        return display_data_of(self._options, self._model_name, output=self._output.name)

    def get_input_batch_type(self, input_element_type: Any) -> Any:
        """Batches of the element type, along a new first dimension."""
        return _batch_type(input_element_type)

    def infer_output_type(self, input_element_type: Any) -> Any:
        return np.ndarray

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
            TritonError: a row failed for good, has no ``default_value``, and does not become a dead letter;
                the message names the row.
        """
        assert self._scorer is not None
        assert self._model is not None
        if batch.ndim == 1:
            shape = self._model.spec.inputs[0].shape
            # A single value is taken for a tensor of one value, whatever its rank.
            if all(size in (1, -1) for size in shape):
                batch = batch.reshape(len(batch), *(1 for _ in shape))
        try:
            ready = self._scorer.add(batch, (timestamp, pane_info))
            if self._overlaps_batches:
                return Outputs(self._with_own_time, ready)
            return Outputs(self._outputs, ready + self._scorer.finish())
        except BaseException:
            self._cancel()
            raise

    def finish_bundle(self) -> Iterable[WindowedValue]:
        """Wait until nothing is in flight any more, and give the remaining results."""
        assert self._scorer is not None
        try:
            return Outputs(self._with_own_time, self._scorer.finish())
        finally:
            self._cancel()

    def _results(self, scored: ScoredBatch) -> Array:
        # One array a batch, not one a request: a batch of Beam's costs twenty times the copy.
        found = scored.outputs(self._output.name)
        if len(found) == 1:
            return found[0]
        if found:
            return np.concatenate(found)
        return np.empty((0, *self._output.shape), DATATYPES[self._output.datatype].array_dtype)

    def _outputs(self, ready: Iterable[ScoredBatch]) -> Iterator[Any]:
        """The results of each batch, and its dead letters, for the batch's own time."""
        for scored in ready:
            yield self._results(scored)
            for failed, error in scored.failures:
                assert self._dead_letters is not None
                assert isinstance(scored.inputs, np.ndarray)
                for row in failed:
                    letter = self._dead_letters.of(scored.inputs[row], error)
                    yield TaggedOutput(self._dead_letters.tag, letter)

    def _with_own_time(self, ready: Iterable[ScoredBatch]) -> Iterator[Any]:
        for scored in ready:
            timestamp, pane_info = scored.context
            for output in self._outputs((scored,)):
                is_letter = isinstance(output, TaggedOutput)
                value = WindowedValue(output.value if is_letter else output, timestamp, _GLOBAL, pane_info)
                yield TaggedOutput(output.tag, value) if is_letter else value


class ArraysAsBatches(beam.DoFn):
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


def element_type_of(spec: TensorSpec) -> Any:
    """Beam's type of one element of a tensor: ``NumpyArray[dtype, shape]``."""
    return NumpyArray[DATATYPES[spec.datatype].array_dtype, spec.shape]


def is_numpy_type(element_type: Any) -> bool:
    """Whether Beam carries elements of this type in NumPy batches of numbers."""
    if element_type is None:
        return False
    try:
        return _dtype_and_shape(element_type)[0].kind not in "OSUV"
    except TypeError:
        return False


def _batch_type(element_type: Any) -> Any:
    dtype, shape = _dtype_and_shape(element_type)
    return NumpyArray[dtype, (N, *shape)]


def _dtype_and_shape(element_type: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    # Of a scalar type, `dtype` and `shape` are descriptors, which belong to its instances.
    if isinstance(element_type, type):
        return np.dtype(element_type), ()
    return np.dtype(getattr(element_type, "dtype", element_type)), getattr(element_type, "shape", ())


def numpy_output(model: ModelSpec, outputs: Sequence[TensorSpec]) -> TensorSpec:
    """The output of which NumPy batches are made, the only one of ``outputs``.

    Raises:
        ConfigurationError: there are several, or the model does not fit NumPy batches.
    """
    if len(model.inputs) != 1 or not model.has_batch_dimension:
        raise ConfigurationError(
            f"NumPy batches need a model with one input and a batch dimension; {model.name!r}: "
            f"{model.describe()}"
        )
    if len(outputs) != 1:
        raise ConfigurationError(
            f"NumPy batches are of one output: choose by output= one of model {model.name!r}: "
            f"{', '.join(output.name for output in outputs)}"
        )
    (output,) = outputs
    if -1 in output.shape or DATATYPES[output.datatype].is_bytes:
        raise ConfigurationError(f"output {output.describe()} has no fixed NumPy shape and dtype")
    return output
