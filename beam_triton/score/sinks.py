"""What is written for a scored row and for a failed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from beam_triton.score.encoders import JsonLinesWriter, ParquetWriter, result_types
from beam_triton.score.progress import PROGRESS
from beam_triton.score.result_files import ResultRecords, failure_record
from beam_triton.score.result_lines import ResultLines, json_line
from beam_triton.score.rows import Failure
from beam_triton.score.served_model import ServedModel


class ResultSink:
    """Writes ``(Row, PredictionResult)`` pairs as records of ``format`` ("jsonl" or "parquet").

    ``keep`` maps a field's name to the column that it comes from; ``outputs`` are the names that were asked
    for, None for all.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        format: str,
        keep: Mapping[str, str],
        with_origin: bool = False,
        outputs: Sequence[str] | None = None,
    ) -> None:
        self._model = model
        self._format = format
        self._keep = dict(keep)
        self._with_origin = with_origin
        self._outputs = outputs

    def setup(self) -> None:
        self._spec = self._model.describe(wait_seconds=self._model.timeout_seconds)
        self._records = ResultRecords(
            self._spec,
            self._keep,
            with_origin=self._with_origin,
            bytes_as_they_are=self._format == "parquet",
        )

    def open(self, stream: IO[bytes]) -> _ResultWriter:
        if self._format == "parquet":
            types = result_types(self._spec, self._outputs, with_origin=self._with_origin)
            return _ResultWriter(self._records.record, ParquetWriter(stream, types))
        return _ResultWriter(ResultLines(self._records).line, JsonLinesWriter(stream))


class _ResultWriter:
    def __init__(self, make: Callable[..., Any], writer: JsonLinesWriter | ParquetWriter) -> None:
        self._make = make
        self._write: Callable[[Any], None] = writer.write
        self.finish = writer.finish

    def write(self, value: tuple[Any, Any]) -> None:
        row, prediction = value
        self._write(self._make(row, prediction.inference, prediction.model_id))
        PROGRESS.results += 1


class FailureSink:
    """Writes each `Failure` as a line of JSON."""

    def setup(self) -> None:
        """There is nothing to prepare."""

    def open(self, stream: IO[bytes]) -> _FailureWriter:
        return _FailureWriter(JsonLinesWriter(stream))


class _FailureWriter:
    def __init__(self, writer: JsonLinesWriter) -> None:
        self._write = writer.write
        self.finish = writer.finish

    def write(self, failure: Failure) -> None:
        self._write(json_line(failure_record(failure)))
        PROGRESS.failures += 1
