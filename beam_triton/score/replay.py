"""Rows that failed, read back from the failures of an earlier run: ``python -m beam_triton replay``.

A failure holds its row's own data, so most rows are read from there, whatever has become of their file. A
file that is a row (an image), and the rest of a text file that was damaged, are read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

from beam_triton.errors import ConfigurationError
from beam_triton.score.file_reading import IMAGE, AnyFileSource
from beam_triton.score.result_writing import restored
from beam_triton.score.row_reading import (
    NOT_UTF8,
    OPEN_QUOTE,
    Failure,
    FileSource,
    Piece,
    RowBlock,
    Wanted,
)

_FAILURES = FileSource(format="jsonl")


@dataclass(frozen=True, kw_only=True)
class FailedRows(AnyFileSource):
    """Reads rows out of failures files; the options are those that the rows' own files were read with.

    Rows keep the file and the number that they had. What cannot be scored again (a line that was no row, a
    damaged Parquet file) comes out as the failure that it was.
    """

    def all_pieces(self, files: Sequence[tuple[str, int]]) -> Iterator[Piece]:
        return (Piece(path) for path, _ in files)

    def read(self, piece: Piece, wanted: Wanted) -> Iterator[RowBlock | Failure]:
        """Rows of the failures file ``piece``, in blocks of one file and one set of columns each.

        Raises ConfigurationError where the file does not hold failures.
        """
        kept: list[Failure] = []
        whole: list[tuple[str, int]] = []
        for item in _FAILURES.read(piece, lambda names: names):
            if isinstance(item, Failure):
                # The file will be replaced: what cannot be read would be lost.
                raise ConfigurationError(
                    f"{piece.file} does not hold failures of score alone: {item.describe()}"
                )
            alike: dict[tuple[str, ...], list[Failure]] = {}
            for failed in (_failed_row(piece.file, row) for row in item.objects):
                if isinstance(failed.data, dict) and failed.message not in (NOT_UTF8, OPEN_QUOTE):
                    alike.setdefault((failed.file, *failed.data), []).append(failed)
                elif failed.data is None and self.format_of(failed.file) in (IMAGE, "bytes"):
                    if FileSystems.exists(failed.file):
                        system = FileSystems.get_filesystem(failed.file)
                        whole.append((failed.file, system.metadata(failed.file).size_in_bytes))
                    else:
                        kept.append(failed)
                elif failed.data is None and self.format_of(failed.file) != "parquet":
                    yield from self._rest(failed, wanted)
                else:
                    kept.append(failed)
            yield from map(self._block, alike.values())
        for files in super().all_pieces(whole):
            yield from super().read(files, wanted)
        yield from kept

    def _block(self, failed: Sequence[Failure]) -> RowBlock:
        file, numbers = failed[0].file, np.array([each.row for each in failed])
        objects = [each.data for each in failed]
        if self.format_of(file) == "csv":
            return RowBlock(file, numbers, pa.RecordBatch.from_pylist(objects), is_text=True)
        return RowBlock(file, numbers, None, objects)

    def _rest(self, damaged: Failure, wanted: Wanted) -> Iterator[RowBlock | Failure]:
        """The rows of a file from the one on that could not be read."""
        first = damaged.row or 1
        try:
            for item in super().read(Piece(damaged.file), wanted):
                if isinstance(item, RowBlock):
                    if len(rows := item.take(np.flatnonzero(item.numbers >= first))):
                        yield rows
                elif item.row is None or item.row >= first:
                    yield item
        except (BeamIOError, FileNotFoundError):
            yield damaged


def _failed_row(path: str, row: dict[str, Any]) -> Failure:
    if not row.keys() >= {*Failure._fields}:
        raise ConfigurationError(
            f"{path} does not hold failures of score: a line has {', '.join(row) or 'nothing'} "
            f"where {', '.join(Failure._fields)} were expected"
        )
    failed = Failure(**{name: row[name] for name in Failure._fields})
    return failed._replace(data=restored(failed.data))
