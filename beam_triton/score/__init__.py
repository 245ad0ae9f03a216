"""Files to elements, and results to files: the layer above the transforms, for jobs that score files."""

from __future__ import annotations

from beam_triton.score.failures import LimitFailures, TooManyFailuresError, failure_of_element
from beam_triton.score.mapping import InputColumns, list_columns
from beam_triton.score.progress import PROGRESS
from beam_triton.score.reading import (
    ELEMENTS,
    FAILURES,
    METRICS_NAMESPACE,
    ReadElements,
    RowSelection,
    match_files,
)
from beam_triton.score.result_files import check_fields
from beam_triton.score.row_elements import ElementMaker
from beam_triton.score.rows import Columns, CorruptFileError, Failure, Row, RowError
from beam_triton.score.served_model import ServedModel
from beam_triton.score.sinks import FailureSink, ResultSink
from beam_triton.score.sources import FileSource
from beam_triton.score.targets import Target
from beam_triton.score.writing import WriteFiles, discard_temporary_files

__all__ = [
    "ELEMENTS",
    "FAILURES",
    "METRICS_NAMESPACE",
    "PROGRESS",
    "Columns",
    "CorruptFileError",
    "ElementMaker",
    "Failure",
    "FailureSink",
    "FileSource",
    "InputColumns",
    "LimitFailures",
    "ReadElements",
    "ResultSink",
    "Row",
    "RowError",
    "RowSelection",
    "ServedModel",
    "Target",
    "TooManyFailuresError",
    "WriteFiles",
    "check_fields",
    "discard_temporary_files",
    "failure_of_element",
    "list_columns",
    "match_files",
]
