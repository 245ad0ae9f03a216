"""The transform that turns files into elements of a model.

Rows are read, checked and made into elements in one DoFn: a step of its own for each would cost more than the
work. What is shuffled, so that workers share it, are pieces of files, not rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystem import FileMetadata
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Metrics
from apache_beam.transforms.display import DisplayDataItem

from beam_triton.errors import ConfigurationError
from beam_triton.score.mapping import InputColumns, list_columns
from beam_triton.score.progress import PROGRESS
from beam_triton.score.row_elements import ElementMaker
from beam_triton.score.rows import Columns, CorruptFileError, Failure, Row, RowError
from beam_triton.score.served_model import ServedModel
from beam_triton.score.sources import FileSource, Piece

METRICS_NAMESPACE = "beam_triton_files"

ELEMENTS = "elements"
FAILURES = "failures"

_GLOB_CHARACTERS = frozenset("[*?")


@dataclass(frozen=True, kw_only=True)
class RowSelection:
    """What is taken of a row: the inputs' columns, those that ``keep`` wants in the result, those tested.

    ``where`` are pairs of column and text; a row whose column has another text is passed over.
    """

    inputs: tuple[InputColumns, ...] = ()
    keep: tuple[str, ...] = ()
    where: tuple[tuple[str, str], ...] = ()

    def check(self, columns: Columns) -> None:
        """Raise ConfigurationError when a file with these columns lacks one that every row must have."""
        for name in (*self.keep, *(column for column, _ in self.where)):
            if name not in columns.names:
                raise ConfigurationError(
                    f"there is no column {name!r}; the file has {list_columns(columns.names)}"
                )

    def predicate(self, columns: Columns | None) -> Callable[[Any], bool]:
        """Whether a row's values are wanted, for a file with these columns."""
        if not self.where:
            return lambda values: True
        if columns is None:
            return lambda values: all(_text(values.get(name)) == text for name, text in self.where)
        self.check(columns)
        tests = [(columns.names.index(name), text) for name, text in self.where]
        return lambda values: all(_text(values[index]) == text for index, text in tests)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def match_files(patterns: Sequence[str]) -> list[tuple[str, int]]:
    """Path and size in bytes of each file that a pattern matches, each once, in order of their paths.

    A pattern that matches nothing may be the path of a file whose name holds glob characters. Raises
    ConfigurationError when there is no such file either.
    """
    found: dict[str, int] = {}
    # One at a time: FileSystems asks the first pattern's FileSystem for all of them.
    for pattern in patterns:
        matched = [metadata for result in FileSystems.match([pattern]) for metadata in result.metadata_list]
        if not matched:
            matched = [_file_of_that_name(pattern)]
        found.update((metadata.path, metadata.size_in_bytes) for metadata in matched)
    return sorted(found.items())


def _file_of_that_name(path: str) -> FileMetadata:
    if not _GLOB_CHARACTERS.isdisjoint(path):
        if FileSystems.exists(path):
            found: FileMetadata = FileSystems.get_filesystem(path).metadata(path)
            return found
        raise ConfigurationError(f"there is no file {path} (the characters [ * ? make it a pattern)")
    raise ConfigurationError(f"there is no file {path}")


class ReadElements(beam.PTransform[Any, Any]):
    """Files to ``(Row, element)`` pairs, and to a `Failure` for each row that cannot be one.

    Applied to a pipeline, it gives a dict-like of two PCollections, `ELEMENTS` and `FAILURES`. ``patterns``
    are paths and globs of any of Beam's FileSystems; they are looked up when the pipeline runs.
    """

    def __init__(
        self, patterns: Sequence[str], source: FileSource, selection: RowSelection, model: ServedModel
    ) -> None:
        super().__init__()
        self._patterns = tuple(patterns)
        self._source = source
        self._selection = selection
        self._model = model

    def display_data(self) -> dict[str, Any]:
        """What a runner's job page shows of this step."""
        shown = {
            "files": ", ".join(self._patterns),
            "inputs": ", ".join(
                f"{entry.name}={','.join(entry.columns)}" for entry in self._selection.inputs
            ),
            "where": ", ".join(f"{column}={text}" for column, text in self._selection.where),
        }
        return {name: DisplayDataItem(text, label=name.capitalize()) for name, text in shown.items() if text}

    def expand(self, pipeline: Any) -> Any:
        return (
            pipeline
            | "Patterns" >> beam.Create([self._patterns])
            | "FindPieces" >> beam.FlatMap(_find_pieces, self._source)
            | "SharePieces" >> beam.Reshuffle()
            | "ReadRows"
            >> beam.ParDo(_ReadPieces(self._source, self._selection, self._model)).with_outputs(
                FAILURES, main=ELEMENTS
            )
        )


def _find_pieces(patterns: Sequence[str], source: FileSource) -> Iterator[Piece]:
    for path, size_bytes in match_files(patterns):
        yield from source.pieces(path, size_bytes)


class _ReadPieces(beam.DoFn):
    def __init__(self, source: FileSource, selection: RowSelection, model: ServedModel) -> None:
        self._source = source
        self._selection = selection
        self._model = model
        self._rows = Metrics.counter(METRICS_NAMESPACE, "rows_read")
        self._failed = Metrics.counter(METRICS_NAMESPACE, "rows_failed")

    def setup(self) -> None:
        model = self._model.describe(wait_seconds=self._model.timeout_seconds)
        self._maker = ElementMaker(model, self._selection.inputs)

    def process(self, piece: Piece) -> Iterator[Any]:
        columns: Columns | str | None = "none seen"
        counted = total = failed = 0
        for row in self._read(piece):
            counted += 1
            if counted == 256:
                PROGRESS.rows += counted
                total += counted
                counted = 0
            if type(row) is not Row:
                failed += 1
                yield beam.pvalue.TaggedOutput(FAILURES, row)
                continue
            if row.columns is not columns:
                columns = row.columns
                make, is_wanted = self._compile(row.columns)
            try:
                if not is_wanted(row.values):
                    total -= 1
                    continue
                element = make(row.values)
            except RowError as error:
                failed += 1
                yield beam.pvalue.TaggedOutput(FAILURES, Failure.of(row, error))
                continue
            yield row, element
        PROGRESS.rows += counted
        self._rows.inc(total + counted)
        self._failed.inc(failed)

    def _compile(self, columns: Columns | None) -> tuple[Callable[[Any], Any], Callable[[Any], bool]]:
        make = self._maker.compile(columns)
        try:
            if columns is not None:
                self._selection.check(columns)
            return make, self._selection.predicate(columns)
        except ConfigurationError as error:
            message = error.message

            def refuse(values: Any) -> bool:
                raise RowError(message)

            return make, refuse

    def _read(self, piece: Piece) -> Iterator[Row | Failure]:
        try:
            wanted = self._wanted(piece)
        except CorruptFileError as error:
            return iter([Failure(piece.file, None, type(error).__name__, error.message, None)])
        return self._source.read(piece, wanted)

    def _wanted(self, piece: Piece) -> set[str]:
        if self._source.format_of(piece.file) != "parquet":
            return set()
        columns = self._source.columns_of(piece.file)
        chosen = self._selection
        try:
            used = self._maker.columns_used(columns)
        except ConfigurationError:
            # Each row will say that its file does not fit; the message lists the columns.
            return set(columns.names)
        return used | {*chosen.keep, *(name for name, _ in chosen.where)}
