"""Arrow tables and record batches in and out: each is an element, and its rows are scored."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.arrow_type_compatibility import arrow_schema_from_beam_schema
from apache_beam.typehints.schemas import typing_to_runner_api
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import DATATYPES, InferRequestEncoder
from beam_triton.protocol.text import shorten
from beam_triton.transforms.arrow_columns import input_rows, output_column, output_type, tensor_groups
from beam_triton.transforms.bundle import with_own_windows
from beam_triton.transforms.exception_handling import DeadLetters
from beam_triton.transforms.row_results import OutputColumn
from beam_triton.transforms.row_schema import RowSchema
from beam_triton.transforms.row_scorer import RowBatchDoFn, ScoredBatch

ArrowBatch: TypeAlias = pa.Table | pa.RecordBatch


@dataclass(frozen=True)
class TableResults:
    """Makes the tables of results: kept columns and outputs.

    Attributes:
        schema: the user's choice of columns.
        outputs: the outputs' columns.
        fields: their Arrow fields; an output that ``classification`` names has three. The last one is the
            schema's ``version_column``, where there is one.
    """

    schema: RowSchema
    outputs: tuple[OutputColumn, ...]
    fields: tuple[pa.Field, ...]

    def kept(self, names: Sequence[str], encoder: InferRequestEncoder) -> list[str]:
        """Which columns of a table with these ``names`` are kept.

        Raises:
            LocalProtocolError: one that is to be kept is not there, or there are two.
            ConfigurationError: an output's column has the name of a kept one.
        """
        try:
            kept = [name for name, _ in self.schema.kept([(name, None) for name in names], encoder, None)]
        except ConfigurationError as error:
            raise LocalProtocolError(error.message) from None
        for name in kept:
            if names.count(name) != 1:
                raise LocalProtocolError(f"keep: {names.count(name)} columns are named {name!r}")
        for field in self.fields:
            if field.name in kept:
                if field.name == self.schema.version_column:
                    raise ConfigurationError(
                        f"version_column and a column that is kept have the name {field.name!r}"
                    )
                raise ConfigurationError(
                    f"an output's column and a column that is kept have the name {field.name!r}: name the "
                    f"outputs' columns by prefix=, or by outputs={{output: column}}"
                )
        return kept

    def columns(self, batches: Sequence[ScoredBatch]) -> list[Any]:
        """The outputs of the batches' rows, one after the other, as Arrow arrays.

        Raises:
            ConfigurationError: Arrow's type cannot hold a value: a UINT64 beyond INT64, in rows of Beam.
        """
        fields = iter(self.fields)
        columns = []
        for output in self.outputs:
            spec = output.output
            arrays = [array for batch in batches for array in batch.outputs(spec.name)]
            if output.classes:
                values = [output.values(array) for array in arrays]
                for place in range(len(output.fields())):
                    taken = itertools.chain.from_iterable(each[place] for each in values)
                    columns.append(pa.array(taken, next(fields).type))
                continue
            if not arrays:
                # No rows: a dimension that is not known is 1 here.
                arrays = [np.empty((0, *map(abs, spec.shape)), DATATYPES[spec.datatype].array_dtype)]
            kind = next(fields).type
            try:
                columns.append(output_column(arrays, kind))
            except pa.ArrowInvalid as error:
                raise ConfigurationError(
                    f"output {spec.describe()} does not fit Arrow's {kind}: {error}"
                ) from None
        if self.schema.version_column is not None:
            versions = [
                [part.model_version or None] * len(part.indices) for batch in batches for part in batch.parts
            ]
            columns.append(pa.array(itertools.chain.from_iterable(versions), next(fields).type))
        return columns


def table_fields(output: OutputColumn) -> list[pa.Field]:
    """The Arrow fields of an output's column; three where it is classes."""
    if not output.classes:
        return [pa.field(output.name, output_type(output.output, is_text=output.text))]
    names = [name for name, _ in output.fields()]
    kinds = [pa.string(), pa.float64(), pa.int64()]
    if output.output.shape != (1,):
        kinds = [pa.list_(kind) for kind in kinds]
    return [pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)]


def arrow_schema_of(row_type: Any) -> pa.Schema:
    """The schema of the tables that Beam makes of rows.

    Raises:
        ConfigurationError: Beam has no Arrow type for a field.
    """
    try:
        return arrow_schema_from_beam_schema(typing_to_runner_api(row_type).row_type.schema)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"Beam makes no Arrow batches of {row_type!r}: {error}. Leave such a field out, or use "
            f'TritonInference(output="row"), which takes rows one by one'
        ) from error


class _ScoredTable:
    """A table whose rows are under way: ``batches_left`` of its batches have not come back, ``ended`` have.

    ``kept`` is None where the table's columns are not those that it should have.
    """

    __slots__ = ("batches_left", "ended", "kept", "windowed_value")

    def __init__(self, windowed_value: WindowedValue, kept: Sequence[str] | None, batches: int) -> None:
        self.windowed_value = windowed_value
        self.kept = kept
        self.batches_left = batches
        self.ended: list[ScoredBatch] = []


class ArrowInferenceDoFn(RowBatchDoFn):
    """Scores the rows of Arrow tables and record batches; gives one of the same kind for each.

    Use it through `TritonBatchInference`.

    Args:
        results: makes the results.
        dead_letters: what becomes of failed rows, dicts of column name to value; None: the first fails the
            bundle.
    """

    def __init__(
        self,
        options: InferenceOptions,
        model_name: str,
        results: TableResults,
        *,
        dead_letters: DeadLetters | None = None,
    ) -> None:
        super().__init__(options, model_name, results.outputs, dead_letters)
        self._results = results

    def process(
        self, element: ArrowBatch, windowed_value: Any = beam.DoFn.WindowedValueParam
    ) -> Iterable[Any]:
        """Send a batch's rows; gives the results that are ready, of this and earlier batches.

        Raises:
            TritonError: a row failed for good, and does not become a dead letter; the message names the row.
            ConfigurationError: the element is no Arrow batch.
        """
        if not isinstance(element, ArrowBatch):
            raise ConfigurationError(
                f"TritonBatchInference takes elements that are Arrow tables or record batches, not "
                f"{type(element).__name__} {shorten(element)}. Declare NumPy arrays by "
                f".with_output_types(NumpyArray[np.float32, (128,)]) and rows by their schema, or use "
                f"TritonInference"
            )
        try:
            ready = [*itertools.chain.from_iterable(map(self._ended, self._add(windowed_value)))]
        except BaseException:
            self._cancel()
            raise
        return ready if len(windowed_value.windows) == 1 else with_own_windows(ready)

    def finish_bundle(self) -> Iterable[Any]:
        """Wait until nothing is in flight any more, and give the remaining results."""
        assert self._scorer is not None
        try:
            return [*itertools.chain.from_iterable(map(self._ended, self._scorer.finish()))]
        finally:
            self._cancel()

    def _add(self, windowed_value: WindowedValue) -> list[ScoredBatch]:
        """Send a table's rows; gives the batches that have ended, of this and earlier tables."""
        scorer, model, table = self._scorer, self._model, windowed_value.value
        assert scorer is not None and model is not None
        names, count = table.schema.names, table.num_rows
        inputs = self._results.schema.inputs or {}
        columns = {}
        try:
            kept = self._results.kept(names, model.encoder)
            for spec in model.spec.inputs:
                given = inputs.get(spec.name, spec.name)
                feeding = [given] if isinstance(given, str) else [*given]
                missing = [name for name in feeding if names.count(name) != 1]
                if not missing:
                    columns[spec.name] = input_rows([table.column(name) for name in feeding], spec)
                elif not spec.optional:
                    raise LocalProtocolError(
                        f"input {spec.name!r} of model {model.spec.name!r}: the table has no column "
                        f"{missing[0]!r}, or several; its columns: {', '.join(names)}. If another column "
                        f"feeds it, name that by inputs={{{spec.name!r}: …}}"
                    )
        except LocalProtocolError as error:
            return scorer.refuse(np.arange(count), error, _ScoredTable(windowed_value, None, 1))
        groups, errors = tensor_groups(columns, count)
        if not count:
            return scorer.add({}, _ScoredTable(windowed_value, kept, 1), np.arange(0))
        scored = _ScoredTable(windowed_value, kept, len(groups) + len(errors))
        ended = []
        for row, unfit in errors.items():
            ended += scorer.refuse(np.array([row]), unfit, scored)
        for indices, arrays in groups:
            ended += scorer.add(arrays, scored, indices)
        return ended

    def _ended(self, batch: ScoredBatch) -> list[Any]:
        """The results and dead letters of the batch's table, if this was its last batch."""
        scored: _ScoredTable = batch.context
        scored.batches_left -= 1
        scored.ended.append(batch)
        if scored.batches_left:
            return []
        whole, table = scored.windowed_value, scored.windowed_value.value
        outputs: list[Any] = []
        if scored.kept is not None:
            outputs.append(whole.with_value(self._result(table, scored.kept, scored.ended)))
        for each in scored.ended:
            for failed, error in each.failures:
                for row in each.numbers[failed.start : failed.stop]:
                    assert self._dead_letters is not None
                    element = {
                        name: table.column(place)[row].as_py()
                        for place, name in enumerate(table.schema.names)
                    }
                    letter = whole.with_value(self._dead_letters.of(element, error))
                    outputs.append(TaggedOutput(self._dead_letters.tag, letter))
        return outputs

    def _result(self, table: ArrowBatch, kept: Sequence[str], ended: Sequence[ScoredBatch]) -> ArrowBatch:
        rows = np.concatenate([batch.scored_numbers() for batch in ended])
        columns = self._results.columns(ended)
        rest = table.select(kept)
        if len(rows) < table.num_rows or (np.diff(rows) < 0).any():
            order = pa.array(np.argsort(rows))
            columns = [column.take(order) for column in columns]
            rest = rest.take(pa.array(np.sort(rows)))
        schema = pa.schema([*rest.schema, *self._results.fields])
        return type(table).from_arrays([*rest.columns, *columns], schema=schema)


class RowsAsTables(beam.DoFn):
    """Batches of rows as elements: what Beam gives its batched DoFns, for a DoFn that takes a table each."""

    @beam.DoFn.yields_elements  # type: ignore[untyped-decorator]  # Beam's own is
    def process_batch(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield batch

    def get_input_batch_type(self, input_element_type: Any) -> Any:
        """The batches that Beam makes of rows."""
        return pa.Table

    def infer_output_type(self, input_element_type: Any) -> Any:
        return pa.Table


class TablesAsRows(beam.DoFn):
    """Tables, an element each, for batches of rows."""

    def __init__(self, row_type: Any) -> None:
        self._row_type = row_type

    @beam.DoFn.yields_batches  # type: ignore[untyped-decorator]  # as above
    def process(self, table: pa.Table) -> Iterator[pa.Table]:
        if table.num_rows:
            yield table

    def get_output_batch_type(self, input_element_type: Any) -> Any:
        """The batches that Beam makes of rows."""
        return pa.Table

    def infer_output_type(self, input_element_type: Any) -> Any:
        return self._row_type
