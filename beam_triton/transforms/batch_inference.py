"""`TritonBatchInference`: NumPy and Arrow batches in and out."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.options.pipeline_options import TypeOptions
from apache_beam.pvalue import PCollection
from apache_beam.transforms.window import GlobalWindows
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_triton.client import TritonClient
from beam_triton.errors import ConfigurationError, LocalProtocolError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import InferRequestEncoder
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.arrow_batches import (
    ArrowInferenceDoFn,
    RowsAsTables,
    TableResults,
    TablesAsRows,
    arrow_schema_of,
    table_fields,
)
from beam_triton.transforms.exception_handling import DeadLetters, Scored, dead_letter_type
from beam_triton.transforms.inference import TritonInference, pass_on
from beam_triton.transforms.model_dofn import before_workers, check_can_be_scored
from beam_triton.transforms.numpy_batches import (
    ArraysAsBatches,
    TritonBatchInferenceDoFn,
    element_type_of,
    is_numpy_type,
    numpy_output,
)
from beam_triton.transforms.results import DefaultValue, failure_of
from beam_triton.transforms.row_inputs import Columns, InputReader
from beam_triton.transforms.row_results import RowFailures, row_type
from beam_triton.transforms.row_schema import Keep, RowSchema, columns_of_type


class TritonBatchInference(TritonInference):
    """Scores a PCollection whose rows travel in NumPy or Arrow batches; gives batches of the same kind.

    ::

        embeddings = (
            rows.with_output_types(NumpyArray[np.float32, (128,)])
            | TritonBatchInference("http://triton:8000", "embed")
        )
        scored = (
            p
            | ReadFromParquetBatched("gs://bucket/images-*.parquet")
            | TritonBatchInference("http://triton:8000", "digits", inputs={"image": "pixels"}, keep=["id"])
        )

    The input's element type says what it is:

    - a ``NumpyArray`` of numbers, or a NumPy scalar type: the model has one input, and gives one output.
      Batches come from a producer whose ``process_batch`` yields arrays, or are made by Beam out of elements.
    - rows with a schema, which Beam carries in Arrow batches: the results are rows as those of
      ``TritonInference(output="row")``, in Arrow batches.
    - ``pyarrow.Table`` or ``pyarrow.RecordBatch``, or nothing that Beam knows, as what
      ``ReadFromParquetBatched`` gives: each element is a batch, and becomes one of the same kind.

    A batch larger than the model's limit is sent in parts, a smaller one as it is. A batch of results has the
    rows' order, and the timestamp, windows and pane of its batch.

    Arrow's numbers feed tensors without a copy, from plain columns (for inputs of one value), lists and
    fixed-shape tensors; a flat list fits an input of any rank. A row fails by a null, unless the input is
    optional. The results have the kept columns and then the outputs: a plain column for an output of shape
    [1], a fixed-size list for another known dimension, a fixed-shape tensor for several of numbers, otherwise
    lists; `output_schema` tells their schema. A character that a column's name cannot have becomes ``_``, as
    with rows.

    `with_exception_handling` leaves failed rows out of the results. A failure of NumPy batches is ``(array,
    (exception type, message, traceback lines))``; of Arrow batches it is a ``beam.Row`` with the row's own
    columns, or with all of them as a dict in ``element`` where they are not known to Beam, and then
    ``error_type``, ``error_message``, ``error_endpoint``, ``error_status`` and ``error_attempts``.

    Args:
        output: the one output to give, instead of ``outputs``; may be left out where the model has one.
        inputs, keep, prefix, text_outputs, version_column: as for `TritonInference` with ``output="row"``;
            for Arrow only. The types of kept columns are those of the batches.
        options: the keyword arguments that `InferenceOptions` describes. ``outputs`` may map names of outputs
            to those of their columns. ``default_value``, a value of the output's shape (of several, a dict),
            stands in for rows that fail; otherwise a failed row fails its bundle. Without ``model_spec`` the
            server is asked for the model here, as Beam needs the output's type while the pipeline is built.

    Raises:
        ConfigurationError: an option cannot work. When the transform is applied: the input's type is none of
            these, or does not fit the model.
    """

    _chooses_by_element = False

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        *,
        output: str | None = None,
        inputs: Mapping[str, Columns] | None = None,
        keep: Keep = None,
        prefix: str = "",
        text_outputs: bool | Sequence[str] = False,
        version_column: str | None = None,
        **options: Any,
    ) -> None:
        if output is not None:
            if options.get("outputs") is not None:
                raise ConfigurationError("output and outputs say the same: give one of them")
            options["outputs"] = [output]
        super().__init__(
            endpoint,
            model_name,
            inputs=inputs,
            output="row",
            keep=keep,
            prefix=prefix,
            text_outputs=text_outputs,
            version_column=version_column,
            **options,
        )
        given = self._options
        if given.batching.bucket_boundaries:
            raise ConfigurationError(
                "bucket_boundaries: TritonBatchInference pads nothing, as rows of one length share requests; "
                "TritonInference takes elements one by one, and pads them"
            )
        with TritonClient.from_inference_options(before_workers(given, model_name)) as client:
            model = client.wait_for_model_spec(model_name)
        self._encoder = InferRequestEncoder(model, outputs=given.outputs, classification=given.classification)
        outputs = self._encoder.expected_outputs
        check_can_be_scored(model, outputs)
        if given.default_value is not None:
            DefaultValue(given.default_value, model, outputs)
        assert self._row_schema is not None
        InputReader(model, self._row_schema.inputs)  # Refuses inputs that the model does not have.
        columns = self._row_schema.output_columns(self._encoder, given.classification or {})
        fields = tuple(field for column in columns for field in table_fields(column))
        if version_column is not None:
            fields += (pa.field(version_column, pa.string()),)
        self._table_results = TableResults(self._row_schema, columns, fields)
        # Named, so that the answers must hold them.
        self._options = dataclasses.replace(given, outputs=tuple(spec.name for spec in outputs))

    def default_label(self) -> str:
        """The step's name where the user does not give one."""
        return f"TritonBatchInference({self._model_name})"

    def output_schema(self, schema: pa.Schema) -> pa.Schema:
        """The schema of the results for Arrow tables and record batches with this one.

        Raises:
            ConfigurationError: a column that is kept, or that feeds an input, is not there; or an output's
                column has the name of a kept one.
        """
        assert self._row_schema is not None
        try:
            InputReader(self._encoder.model, self._row_schema.inputs)(dict.fromkeys(schema.names))
            kept = self._table_results.kept(schema.names, self._encoder)
        except LocalProtocolError as error:
            raise ConfigurationError(error.message) from None
        return pa.schema([*(schema.field(name) for name in kept), *self._table_results.fields])

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results' batches, or with exception handling ``(results, failures)``."""
        self._check_threshold("batches")
        element_type: Any = pcoll.element_type
        producer = None if pcoll.producer is None else pcoll.producer.transform
        if element_type is None and producer is not None:
            # Beam passes no types on (--no_pipeline_type_check): what the producer declares is all there is.
            element_type = producer.get_type_hints().simple_output_type(None)
        if is_numpy_type(element_type):
            return self._of_arrays(pcoll)
        rows = element_type
        if not isinstance(rows, RowTypeConstraint):
            rows = RowTypeConstraint.from_user_type(element_type)
        if rows is not None:
            return self._of_rows(pcoll, rows)
        if element_type in (None, AnyType, pa.Table, pa.RecordBatch):
            return self._of_tables(pcoll)
        raise ConfigurationError(
            f"TritonBatchInference takes NumPy arrays of numbers, declared by "
            f".with_output_types(NumpyArray[np.float32, (128,)]), rows with a schema, and Arrow tables and "
            f"record batches, not elements of type {element_type!r}; TritonInference takes them one by one"
        )

    def _of_arrays(self, pcoll: PCollection[Any]) -> Any:
        if self._row_schema != RowSchema():
            raise ConfigurationError(
                "inputs, keep, prefix, text_outputs, version_column and names for outputs' columns are for "
                "rows and Arrow tables; NumPy batches have no columns"
            )
        output = numpy_output(self._encoder.model, self._encoder.expected_outputs)
        element_type = element_type_of(output)
        if not _passes_batches(pcoll.pipeline):
            single = copy.copy(self)
            single._row_schema = None
            scored = TritonInference.expand(single, pcoll)
            results = scored[0] if isinstance(scored, Scored) else scored
            results |= "Output" >> beam.Map(_output_of, output.name).with_output_types(element_type)
            if not isinstance(scored, Scored) or self._handling is None:
                return results
            return Scored(results, scored[1], self._handling)
        dofn = TritonBatchInferenceDoFn(
            self._worker_options,
            self._encoder.model.name,
            output,
            dead_letters=self._dead_letters(failure_of),
            overlaps_batches=isinstance(pcoll.windowing.windowfn, GlobalWindows),
        )
        arrays, failures = self._score(pcoll, dofn, np.ndarray, dead_letter_type(pcoll.element_type))
        batches = beam.ParDo(ArraysAsBatches(output)).with_output_types(element_type)
        return self._with_failures(pcoll, arrays | "Batches" >> batches, failures)

    def _of_rows(self, pcoll: PCollection[Any], element_type: RowTypeConstraint) -> Any:
        if pcoll.element_type is None or not _passes_batches(pcoll.pipeline):
            return super().expand(pcoll)
        made, failure = self._table_results.schema.of_elements(
            pcoll.element_type, self._encoder, self._options.classification
        )
        columns = columns_of_type(pcoll.element_type)
        assert columns is not None
        evaluated = row_type(columns)
        if evaluated != element_type:
            # Its annotations are strings, which Beam does not evaluate.
            pcoll |= "Typed" >> beam.Map(lambda row: row).with_output_types(evaluated)
        arrow_schema_of(evaluated)
        output_type, failure_type = row_type(made.fields), row_type(failure.fields)
        fields = [*arrow_schema_of(output_type)][len(made.kept) :]
        tables = pcoll | "Tables" >> beam.ParDo(RowsAsTables()).with_output_types(pa.Table)  # type: ignore[no-untyped-call]
        dofn = self._new_arrow_dofn(dataclasses.replace(self._table_results, fields=tuple(fields)), failure)
        results, failures = self._score(tables, dofn, pa.Table, failure_type)
        results |= "Rows" >> beam.ParDo(TablesAsRows(output_type)).with_output_types(output_type)
        if failures is not None:
            failures |= "FailedRows" >> pass_on(failure_type)
        return self._with_failures(pcoll, results, failures)

    def _of_tables(self, pcoll: PCollection[Any]) -> Any:
        failure = RowFailures(None)
        failure_type = row_type(failure.fields)
        dofn = self._new_arrow_dofn(self._table_results, failure)
        results, failures = self._score(pcoll, dofn, pcoll.element_type, failure_type)
        counted = pcoll
        if failures is not None and self._handling is not None:
            failures |= "FailedRows" >> pass_on(failure_type)
            if self._handling.threshold < 1:
                counted |= "RowNumbers" >> beam.FlatMap(_row_numbers).with_output_types(int)
        return self._with_failures(counted, results, failures)

    @property
    def _worker_options(self) -> InferenceOptions:
        return dataclasses.replace(self._options, **self._timeout)

    def _dead_letters(self, make: Callable[[Any, TritonError], Any]) -> DeadLetters | None:
        handling = self._handling
        return None if handling is None else dataclasses.replace(handling.dead_letters, make=make)

    def _new_arrow_dofn(self, results: TableResults, failure: RowFailures) -> ArrowInferenceDoFn:
        return ArrowInferenceDoFn(
            self._worker_options, self._encoder.model.name, results, dead_letters=self._dead_letters(failure)
        )


def _passes_batches(pipeline: beam.Pipeline) -> bool:
    """Whether Beam hands batches to a DoFn: its runtime type checker and its oldest runner do not."""
    is_checked = pipeline.options.view_as(TypeOptions).runtime_type_check
    return not is_checked and type(pipeline.runner).__name__ != "BundleBasedDirectRunner"


def _output_of(result: PredictionResult, name: str) -> Any:
    outputs: Any = result.inference
    return outputs[name]


def _row_numbers(batch: pa.Table | pa.RecordBatch) -> Iterator[int]:
    yield from range(batch.num_rows)
