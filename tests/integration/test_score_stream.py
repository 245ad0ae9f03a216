"""``pipelines/score_stream.py`` on a real Triton: windows, lateness, panes and dead letters by TestStream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.test_stream import TestStream as Stream
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.windowed_value import PaneInfoTiming

from beam_triton.testing import LocalTriton
from pipelines import score_stream
from pipelines.train_digits import DATA, read_digits

_REPOSITORY = Path(__file__).parents[2] / "pipelines" / "model_repository"

EARLY, ON_TIME, LATE = PaneInfoTiming.EARLY, PaneInfoTiming.ON_TIME, PaneInfoTiming.LATE


@pytest.fixture(scope="module")
def triton() -> Iterator[LocalTriton]:
    with LocalTriton(_REPOSITORY, stop_timeout_seconds=0.1) as triton:
        yield triton


class Written(NamedTuple):
    """A file as it was when a pane had just been written."""

    window: tuple[float, float]
    timing: int
    pane: int
    ids: list[str]


_written: list[Written] = []


def _note(name: str, whole: Any = beam.DoFn.WindowedValueParam) -> None:
    (window,) = whole.windows
    ids = sorted(line["id"] for line in lines_of(Path(name)) if "id" in line)
    pane = whole.pane_info
    _written.append(Written((float(window.start), float(window.end)), pane.timing, pane.index, ids))


def lines_of(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def message(name: Any, **fields: Any) -> bytes:
    image = read_digits(DATA, "test").images[1].tolist()
    return json.dumps({"id": name, "image": image, **fields}).encode()


def run(triton: LocalTriton, folder: Path, stream: Stream, *options: str) -> list[Written]:
    """Run the pipeline on a TestStream; the panes of results and dead letters, in the order of writing."""
    given = score_stream.parser().parse_args(
        [f"--endpoint={triton.endpoint}", f"--output={folder}/out", "--window_seconds=10", *options]
    )
    _written.clear()
    with TestPipeline(runner="BundleBasedDirectRunner", options=PipelineOptions(streaming=True)) as pipeline:
        _ = score_stream.build(pipeline | stream, given) | beam.Map(_note)
    assert not list(folder.glob("*.unfinished"))
    return list(_written)


def test_a_file_grows_with_early_panes(triton: LocalTriton, tmp_path: Path) -> None:
    """Each pane has all rows of its window so far; the one at the window's end has all that are in time."""
    stream = (
        Stream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(message("a"), 1)])
        .advance_processing_time(5)
        .add_elements([TimestampedValue(message("b"), 9)])
        .advance_watermark_to_infinity()
    )
    panes = run(triton, tmp_path, stream, "--early_seconds=3")
    assert [(timing, pane, ids) for _, timing, pane, ids in panes] == [
        (EARLY, 0, ["a"]),
        (ON_TIME, 1, ["a", "b"]),
    ]


def test_a_late_row_joins_the_file_of_its_window(triton: LocalTriton, tmp_path: Path) -> None:
    """A row within the allowed lateness gives one more pane, with the rows that were in time as well."""
    stream = (
        Stream()
        # This runner calls panes late by the processing time, which has to be after the window therefore.
        .advance_processing_time(100)
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(message("a"), 1)])
        .advance_watermark_to(11)
        .add_elements([TimestampedValue(message("late"), 2), TimestampedValue(message("b"), 12)])
        .advance_processing_time(10)
        .advance_watermark_to_infinity()
    )
    panes = run(triton, tmp_path, stream, "--allowed_lateness_seconds=30")
    assert [(timing, ids) for window, timing, _, ids in panes if window == (0, 10)] == [
        (ON_TIME, ["a"]),
        (LATE, ["a", "late"]),
    ]
    (file,) = tmp_path.glob("out-scored-19700101T000000-19700101T000010-000-of-001.jsonl")
    assert sorted(row["id"] for row in lines_of(file)) == ["a", "late"]
    assert {row["label"] for row in lines_of(file)} == {int(read_digits(DATA, "test").digits[1])}
    assert panes[-1].ids == ["b"]


def test_a_row_beyond_the_allowed_lateness_is_left_out(triton: LocalTriton, tmp_path: Path) -> None:
    """It is in no file, and the file of its window stays as it is."""
    stream = (
        Stream()
        .advance_watermark_to(0)
        .add_elements([TimestampedValue(message("a"), 1)])
        .advance_watermark_to(41)
        .add_elements([TimestampedValue(message("too late"), 2), TimestampedValue(message("b"), 42)])
        .advance_processing_time(60)
        .advance_watermark_to_infinity()
    )
    panes = run(triton, tmp_path, stream, "--allowed_lateness_seconds=30")
    assert [(window, ids) for window, _, _, ids in panes] == [((0, 10), ["a"]), ((40, 50), ["b"])]
    assert {row["id"] for row in lines_of(*tmp_path.glob("out-*"))} == {"a", "b"}


def test_the_time_of_a_message_decides_on_its_windows(triton: LocalTriton, tmp_path: Path) -> None:
    """With sliding windows a row is in every window that has its own time, not that of its arrival."""
    stream = (
        Stream()
        .advance_watermark_to(0)
        .add_elements(
            [TimestampedValue(message("own", time=7.5), 30), TimestampedValue(message("given"), 30)]
        )
        .advance_watermark_to_infinity()
    )
    panes = run(triton, tmp_path, stream, "--slide_seconds=5")
    windows = {
        name: sorted(window for window, _, _, ids in panes if name in ids) for name in ("own", "given")
    }
    assert windows == {"own": [(0, 10), (5, 15)], "given": [(25, 35), (30, 40)]}


def test_dead_letters_are_files_of_the_same_windows(triton: LocalTriton, tmp_path: Path) -> None:
    """What cannot be read and what the model refuses is there with its reason; the rest is scored."""
    messages = [
        *(b"not JSON", b'{"id": "no image"}', json.dumps({"id": "short", "image": [1, 2]}).encode()),
        *(message("odd time", time="yesterday"), message("milliseconds", time=1764278640500)),
        *(b"\xff", message("good")),
    ]
    stream = Stream().advance_watermark_to(0)
    stream = stream.add_elements(
        [TimestampedValue(each, 3) for each in messages]
    ).advance_watermark_to_infinity()
    run(triton, tmp_path, stream)
    (failed,) = tmp_path.glob("out-failed-19700101T000000-19700101T000010-*.jsonl")
    reasons = {line.get("id") or line["message"]: line["error_type"] for line in lines_of(failed)}
    assert {name[:14]: reason for name, reason in reasons.items()} == {
        "not JSON": "JSONDecodeError",
        '{"id": "no ima': "KeyError",
        "short": "LocalProtocolError",
        '{"id": "odd ti': "ValueError",
        '{"id": "millis': "OverflowError",
        "\ufffd": "UnicodeDecodeError",
    }
    (scored,) = tmp_path.glob("out-scored-*")
    assert [row["id"] for row in lines_of(scored)] == ["good"]


def test_messages_that_come_again_in_other_bundles_write_the_same_files(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """A runner that repeats a part of a stream replaces files; it adds none and doubles no row."""

    def streamed(bundles: Sequence[Sequence[int]]) -> Any:
        stream = Stream().advance_watermark_to(0)
        for bundle in bundles:
            stream = stream.add_elements([TimestampedValue(message(n), n / 2) for n in bundle])
        return stream.advance_watermark_to_infinity()

    def files() -> dict[str, list[str]]:
        found = tmp_path.glob("out-*")
        return {file.name: sorted(str(row["id"]) for row in lines_of(file)) for file in found}

    run(triton, tmp_path, streamed([range(0, 40)]), "--shards=3")
    once = files()
    assert len(once) == 6
    assert sorted(name for names in once.values() for name in names) == sorted(map(str, range(40)))
    run(triton, tmp_path, streamed([range(20, 40), range(10), [19], range(10, 19)]), "--shards=3")
    assert files() == once


def test_the_periodic_source_needs_nothing_but_a_server(triton: LocalTriton, tmp_path: Path) -> None:
    """The command as it is in the docs, for two seconds: each digit once, in the window of its time."""
    score_stream.main(
        [
            *(f"--endpoint={triton.endpoint}", f"--output={tmp_path}/out", "--runner=FnApiRunner"),
            *("--run_seconds=2", "--every_seconds=0.05", "--window_seconds=1"),
        ]
    )
    files = sorted(tmp_path.glob("out-scored-*"))
    assert 2 <= len(files) <= 3
    assert [row["id"] for row in lines_of(*files)] == [f"{number:08}" for number in range(40)]


def test_files_that_appear_are_read_once(triton: LocalTriton, tmp_path: Path) -> None:
    """Several looks at a folder read each file once, at the time of the file."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(
            message(f"{name}1") + b"\n" + message(f"{name}2") + b"\n"
        )
    score_stream.main(
        [
            *(f"--endpoint={triton.endpoint}", f"--output={tmp_path}/out", "--runner=FnApiRunner"),
            *(f"--files={tmp_path}/in/*.jsonl", "--run_seconds=1", "--poll_seconds=0.25"),
        ]
    )
    rows = lines_of(*tmp_path.glob("out-scored-*"))
    assert sorted(row["id"] for row in rows) == ["a1", "a2", "b1", "b2"]


def test_pubsub_is_read_by_the_runner(tmp_path: Path) -> None:
    """The pipeline of a subscription has Beam's Pub/Sub source, which Dataflow replaces by its own."""
    subscription = "projects/my-project/subscriptions/digits"
    options = score_stream.parser().parse_args([f"--subscription={subscription}"])
    pipeline = TestPipeline(runner="FnApiRunner", options=PipelineOptions(streaming=True))
    _ = score_stream.messages(pipeline, options)
    transforms = pipeline.to_runner_api().components.transforms.values()
    (read,) = [each for each in transforms if each.spec.urn == "beam:transform:pubsub_read:v1"]
    assert subscription.encode() in read.spec.payload
