"""Values to files, atomically and each once.

A bundle writes its values to a file of its own in a temporary folder beside the target. The file's name
leaves the bundle only when the runner commits it, so that what a failed or repeated bundle wrote is in no
list. When all is done, one step renames the listed files into their places, or puts them together into one.
It may be repeated: what has been renamed is left as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, Protocol, cast

import apache_beam as beam
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics.metric import Metrics
from apache_beam.transforms.display import DisplayDataItem
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.score.encoders import join_json_lines, join_parquet
from beam_triton.score.reading import METRICS_NAMESPACE
from beam_triton.score.targets import Target


class Writer(Protocol):
    """Writes values to one stream, which it leaves open."""

    def write(self, value: Any) -> None: ...

    def finish(self) -> None: ...


class Sink(Protocol):
    """How values are written; pickled into the pipeline, set up once a DoFn."""

    def setup(self) -> None: ...

    def open(self, stream: IO[bytes]) -> Writer: ...


class WriteFiles(beam.PTransform[Any, Any]):
    """Writes a bounded PCollection; the result holds the paths of the files, which are all there then.

    Without a value there is one file that holds none. ``counter`` is the name of the Beam counter that
    counts the values written. Files are put in place when the PCollection ``after`` is complete, so that a
    job that fails in it leaves the target as it was; it should be small.
    """

    def __init__(self, target: Target, sink: Sink, *, counter: str, after: Any = None) -> None:
        super().__init__()
        self._target = target
        self._sink = sink
        self._counter = counter
        self._after = after

    def display_data(self) -> dict[str, Any]:
        """What a runner's job page shows of this step."""
        return {"path": DisplayDataItem(self._target.path, label="Path")}

    def expand(self, values: Any) -> Any:
        shards = values | "WriteShards" >> beam.ParDo(_WriteShards(self._target, self._sink, self._counter))
        after = None if self._after is None else beam.pvalue.AsIter(self._after)
        return (
            values.pipeline
            | "Once" >> beam.Create([self._target])
            | "PutInPlace" >> beam.FlatMap(_put_in_place, self._sink, beam.pvalue.AsList(shards), after)
        )


class _WriteShards(beam.DoFn):
    def __init__(self, target: Target, sink: Sink, counter: str) -> None:
        self._target = target
        self._sink = sink
        self._counter = Metrics.counter(METRICS_NAMESPACE, counter)

    def setup(self) -> None:
        self._sink.setup()
        self._writer: Writer | None = None
        self._stream: Any = None

    def start_bundle(self) -> None:
        self._abandon()
        self._count = 0

    def process(self, value: Any) -> None:
        if self._writer is None:
            self._path = self._target.temporary_path()
            self._stream = _create(self._path)
            self._writer = self._sink.open(self._stream)
        self._writer.write(value)
        self._count += 1

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._writer is not None:
            self._writer.finish()
            self._stream.close()
            self._writer = self._stream = None
            self._counter.inc(self._count)
            yield WindowedValue(self._path, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def teardown(self) -> None:
        self._abandon()

    def _abandon(self) -> None:
        # A bundle that failed leaves its file open; the file itself goes with the temporary folder.
        # The writer goes first: pyarrow's writes a footer when it is collected.
        self._writer = None
        if self._stream is not None:
            with contextlib.suppress(Exception):
                self._stream.close()
        self._stream = None


def _put_in_place(target: Target, sink: Sink, shards: Iterable[str], after: Any = None) -> Iterator[str]:
    found = sorted(shards)
    if not found:
        sink.setup()
        found = [target.temporary_path()]
        with contextlib.closing(_create(found[0])) as stream:
            sink.open(stream).finish()
    if target.is_sharded:
        places = [target.final_path(index, len(found)) for index in range(len(found))]
        for shard, place in zip(found, places, strict=True):
            _rename(shard, place)
        _delete_earlier_runs(target, keep=set(places))
    else:
        places = [target.final_path(0, 1)]
        if len(found) > 1 and all(map(FileSystems.exists, found)):
            found = [_join(target, found)]
        _rename(found[0], places[0])
    discard_temporary_files(target)
    yield from places


def discard_temporary_files(target: Target) -> None:
    """Delete what a run left in the temporary folder; a runner that fails cannot do it itself."""
    for path in (FileSystems.join(target.temporary_folder, "*"), target.temporary_folder):
        with contextlib.suppress(BeamIOError, OSError):
            found = [file.path for match in FileSystems.match([path]) for file in match.metadata_list]
            if found:
                FileSystems.delete(found)


def _create(path: str) -> IO[bytes]:
    # Object stores have no folders, and another worker may have made it already.
    with contextlib.suppress(BeamIOError, OSError):
        FileSystems.mkdirs(FileSystems.split(path)[0])
    return cast("IO[bytes]", FileSystems.create(path))


def _rename(source: str, destination: str) -> None:
    if not FileSystems.exists(source):
        if FileSystems.exists(destination):
            return
        raise BeamIOError(f"neither {source} nor {destination} is there: the shard was deleted by somebody")
    try:
        FileSystems.rename([source], [destination])
    except BeamIOError:
        # HDFS refuses to replace a file; elsewhere the second attempt fails as the first did.
        if not FileSystems.exists(destination):
            raise
        FileSystems.delete([destination])
        FileSystems.rename([source], [destination])


def _delete_earlier_runs(target: Target, keep: set[str]) -> None:
    # Shards of an earlier run with another number of workers would be read along with this run's.
    names = {FileSystems.split(path)[1] for path in keep}
    for match in FileSystems.match([target.path]):
        stale = [
            file.path
            for file in match.metadata_list
            if target.is_final_path(file.path) and FileSystems.split(file.path)[1] not in names
        ]
        if stale:
            FileSystems.delete(stale)


def _join(target: Target, shards: list[str]) -> str:
    joined = target.temporary_path()
    stored = CompressionTypes.UNCOMPRESSED
    with contextlib.closing(FileSystems.create(joined, compression_type=stored)) as stream:
        opened = _opened_in_turn(shards)
        if target.format == "parquet":
            join_parquet(opened, stream)
        else:
            join_json_lines(opened, stream)
    return joined


def _opened_in_turn(paths: list[str]) -> Iterator[IO[bytes]]:
    for path in paths:
        opened = FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)
        with contextlib.closing(opened) as stream:
            yield cast("IO[bytes]", stream)
