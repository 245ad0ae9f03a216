"""A model rolls over to another version while a stream is scored, on a real Triton.

Version n of the models adds n to x: each result shows which version has computed it.
"""

# Beam's schemas do not read the spelling `str | None`.
# ruff: noqa: UP045

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.pvalue import AsDict, AsIter, AsSingleton
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.transforms.window import FixedWindows, GlobalWindows, SlidingWindows, TimestampedValue
from apache_beam.typehints.schemas import named_fields_from_element_type
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import (
    ModelNotFoundError,
    TritonBatchInference,
    TritonClient,
    TritonInference,
    TritonInferenceDoFn,
)
from beam_triton.testing import LocalTriton
from tests.support.models import CATALOGUE, ReplaceableModel, replaceable, throwaway_triton
from tests.support.pipelines import Run, bundle_of, run, score

ROLLING = dataclasses.replace(
    CATALOGUE["versioned"],
    name="rolling",
    versions=(1,),
    settings="",
    instances=2,
    parameters={"sleep_seconds": "0.005"},
)
ALL = "version_policy { all {} }"
THREADS = 4

# How long an unloaded version is waited for.
IMPATIENT: dict[str, Any] = {"timeout_seconds": 3, "circuit_breaker": {"max_wait_seconds": 4}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplaceableModel]:
    with replaceable(tmp_path_factory.mktemp("roll_over") / "models", ROLLING) as model:
        yield model


@pytest.fixture
def server(running: ReplaceableModel) -> ReplaceableModel:
    """The model, in version 1; Triton's default policy serves the newest of the versions that it is given."""
    running.replace(versions=(1,))
    return running


def fp32(value: float) -> Any:
    return np.array([value], np.float32)


def version_of(result: Any) -> str:
    """The version that computed the result; the one that it names is the same."""
    version = str(int(result.inference["y"][0] - result.example[0]))
    assert result.model_id.rpartition(":")[2] == version
    return version


class Stream:
    """Bundles of one to nine elements, on threads of one process, until it is told to end.

    Attributes:
        results: each thread's, in order.
        given: how many elements have been.
    """

    def __init__(self, dofn: TritonInferenceDoFn) -> None:
        self.results: list[list[Any]] = [[] for _ in range(THREADS)]
        self.given = 0
        self.errors: list[BaseException] = []
        self._ended = threading.Event()
        self._counting = threading.Lock()
        self._threads = [
            threading.Thread(target=self._score, args=(copy.deepcopy(dofn), results), daemon=True)
            for results in self.results
        ]

    def _score(self, dofn: TritonInferenceDoFn, results: list[Any]) -> None:
        try:
            dofn.setup()
            while not self._ended.is_set():
                size = len(results) % 9 + 1
                elements = [(len(results) + n, fp32(len(results) + n)) for n in range(size)]
                dofn.start_bundle()
                outputs = [
                    output
                    for element in elements
                    for output in dofn.process(element, GlobalWindows.windowed_value(element))
                ]
                outputs += dofn.finish_bundle()
                with self._counting:
                    self.given += size
                assert sorted(key for key, _ in (output.value for output in outputs)) == [
                    key for key, _ in elements
                ]
                results += [output.value[1] for output in outputs]
        except BaseException as error:
            self.errors.append(error)
        finally:
            dofn.teardown()

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in self._threads)

    def wait_for(self, more: int) -> None:
        """Wait until every thread has so many results more."""
        goals = [len(results) + more for results in self.results]
        give_up = time.monotonic() + 60
        while any(len(results) < goal for results, goal in zip(self.results, goals, strict=True)):
            assert not self.errors and time.monotonic() < give_up, self.errors
            time.sleep(0.02)

    def versions(self) -> Counter[str]:
        """The results by version, once all is over; every element has one."""
        assert not self.errors, self.errors
        found = Counter(version_of(result) for results in self.results for result in results)
        assert found.total() == self.given
        return found


def test_the_servers_choice_rolls_over_and_back_under_load(server: ReplaceableModel) -> None:
    """Nothing is lost or answered by a mixture: each result was computed by the version that it names."""
    with Stream(TritonInferenceDoFn(server.endpoint, ROLLING.name)) as stream:
        stream.wait_for(50)
        for versions in ((1, 2), (1,), (1, 2, 3)):
            server.replace(versions=versions)
            stream.wait_for(50)
    found = stream.versions()
    assert set(found) == {"1", "2", "3"}
    assert [version_of(results[-1]) for results in stream.results] == ["3"] * THREADS
    # No thread falls back to an earlier version, but for the roll-back.
    for results in stream.results:
        ids = [version_of(result) for result in results]
        assert sum(first != then for first, then in itertools.pairwise(ids)) == 3


def test_polled_repository_rolls_over(tmp_path: Path) -> None:
    """A folder that appears in the repository is all it takes."""
    repository = tmp_path / "models"
    ROLLING.write(repository)
    with (
        throwaway_triton(repository, models_control="poll") as triton,
        Stream(TritonInferenceDoFn(triton.endpoint, ROLLING.name)) as stream,
    ):
        stream.wait_for(20)
        shutil.copytree(repository / ROLLING.name / "1", tmp_path / "2")
        (tmp_path / "2").rename(repository / ROLLING.name / "2")
        give_up = time.monotonic() + 60
        while any(version_of(results[-1]) != "2" for results in stream.results):
            stream.wait_for(1)
            assert time.monotonic() < give_up
    assert set(stream.versions()) == {"1", "2"}


def test_a_pinned_version_waits_while_it_is_unloaded(server: ReplaceableModel) -> None:
    """Requests in flight are answered; later ones are held until the version comes back, and none is lost."""
    server.replace(versions=(1, 2), settings=ALL)
    breaker = {"open_seconds": 0.2, "health_check_interval_seconds": 0.1}
    pinned = TritonInferenceDoFn(server.endpoint, ROLLING.name, model_version=1, circuit_breaker=breaker)
    with Stream(pinned) as stream:
        stream.wait_for(50)
        server.replace(versions=(2,), settings=ALL)
        given = stream.given
        time.sleep(2)
        assert stream.given - given < 100
        server.replace(versions=(1, 2), settings=ALL)
        stream.wait_for(50)
    assert set(stream.versions()) == {"1"}


def test_an_unloaded_version_holds_up_no_other(server: ReplaceableModel) -> None:
    """Its elements become dead letters; those of the version that is there are scored meanwhile."""
    server.replace(versions=(1, 2), settings=ALL)
    dofn = TritonInferenceDoFn(
        server.endpoint,
        ROLLING.name,
        model_version=lambda element: int(element[0]) % 2 + 1,
        with_exception_handling=True,
        batching={"max_batch_size": 2},
        **IMPATIENT,
    )
    seconds: dict[str, float] = {}

    def bundle(count: int, pick: Callable[[int], bool] = lambda n: True) -> list[Any]:
        outputs: list[Any] = []
        dofn.start_bundle()
        for number in filter(pick, range(count)):
            element = fp32(number)
            outputs += dofn.process(element, GlobalWindows.windowed_value(element))
        return outputs + list(dofn.finish_bundle())

    def versions(outputs: list[Any]) -> Counter[str]:
        return Counter(version_of(each.value) for each in outputs if isinstance(each, WindowedValue))

    with bundle_of(dofn):
        assert versions(bundle(200)) == {"1": 100, "2": 100}
        server.replace(versions=(2,), settings=ALL)
        started = time.monotonic()
        late = threading.Thread(target=lambda: seconds.update(other=_seconds_of_version_2(server)))
        late.start()
        outputs = bundle(200)
        late.join()
        seconds["held"] = time.monotonic() - started
    assert versions(outputs) == {"2": 100}
    letters = [each.value.value for each in outputs if not isinstance(each, WindowedValue)]
    assert sorted(int(element[0]) for element, _ in letters) == list(range(0, 200, 2))
    messages = [message for _, (_, message, _) in letters]
    # Those that were never sent tell of the circuit breaker of version 1.
    assert all("version 1 is not at ready state" in each or "circuit breaker" in each for each in messages)
    assert seconds["other"] < seconds["held"] / 2


def _seconds_of_version_2(server: ReplaceableModel) -> float:
    """How long the same model's other version takes in this process, while requests for version 1 fail."""
    time.sleep(1)
    dofn = TritonInferenceDoFn(server.endpoint, ROLLING.name, model_version=2, **IMPATIENT)
    started = time.monotonic()
    with bundle_of(dofn):
        for number in range(50):
            element = fp32(number)
            dofn.process(element, GlobalWindows.windowed_value(element))
        assert {version_of(each.value) for each in dofn.finish_bundle()} == {"2"}
    return time.monotonic() - started


def stamped(pipeline: beam.Pipeline, label: str, values: list[Any], windows: Any, every: float = 1) -> Any:
    """The values, one every so many seconds, in one bundle."""
    return (
        pipeline
        | f"Create {label}" >> beam.Create(list(enumerate(values)), reshuffle=False)
        | f"Stamp {label}" >> beam.MapTuple(lambda n, value: TimestampedValue(value, n * every))
        | f"Window {label}" >> beam.WindowInto(windows)
    )


def switched(endpoint: str, versions: list[Any], **options: Any) -> Run:
    """Ten elements in each window of ten seconds, which has one of the versions."""

    def build(pipeline: beam.Pipeline) -> Any:
        side = stamped(pipeline, "versions", versions, FixedWindows(10), every=10)
        elements = stamped(
            pipeline, "elements", [fp32(n) for n in range(10 * len(versions))], FixedWindows(10)
        )
        transform = TritonInference(endpoint, "versioned", model_version=AsSingleton(side), **options)
        return elements | transform.with_exception_handling()

    return run(build)


def test_a_side_input_switches_the_version_by_window(triton: LocalTriton) -> None:
    """Also where a bundle holds elements of many windows: a request is made for each version."""
    outcome = switched(triton.endpoint, [1, "2", 1, None, np.int64(2), ""])
    by_window: dict[int, set[str]] = {}
    for output in outcome.outputs["results"]:
        by_window.setdefault(int(output.timestamp) // 10, set()).add(version_of(output.value))
    assert by_window == {0: {"1"}, 1: {"2"}, 2: {"1"}, 3: {"3"}, 4: {"2"}, 5: {"3"}}
    assert len(outcome.results) == 60
    assert outcome.counters["requests"] == 3


def test_a_version_that_is_not_there_costs_no_element(triton: LocalTriton) -> None:
    """Its window's elements are dead letters that say which versions there are; the next window goes on."""
    outcome = switched(triton.endpoint, [1, 9, "a b", [2], 2])
    assert Counter(version_of(result) for result in outcome.results) == {"1": 10, "2": 10}
    letters = {int(element[0]): error for element, error in outcome.failures}
    assert sorted(letters) == list(range(10, 40))
    assert letters[10][0] is ModelNotFoundError
    assert "version 9 is not found" in letters[10][1]
    assert letters[10][1].endswith("versions of the model: 1, 2, 3")
    assert "model_version gives 'a b' for the element, which is no version" in letters[20][1]
    assert "model_version gives [2] for the element" in letters[30][1]


def test_without_dead_letters_a_version_that_is_not_there_fails_the_bundle(triton: LocalTriton) -> None:
    """The runner repeats it."""

    def build(pipeline: beam.Pipeline) -> Any:
        side = AsSingleton(pipeline | "versions" >> beam.Create([9]))
        transform = TritonInference(triton.endpoint, "versioned", model_version=side)
        return pipeline | beam.Create([fp32(0)]) | transform

    with pytest.raises(Exception, match=r"element 0 of its bundle.*version 9 is not found"):
        run(build)


def test_an_empty_side_input_leaves_the_choice_to_the_server(triton: LocalTriton) -> None:
    """Unless it has a default value."""

    def build(pipeline: beam.Pipeline) -> Any:
        nothing = pipeline | "nothing" >> beam.Create([])
        elements = pipeline | beam.Create([fp32(0)])
        sides = {"none": AsSingleton(nothing), "one": AsSingleton(nothing, default_value=1)}
        return {
            name: elements | name >> TritonInference(triton.endpoint, "versioned", model_version=side)
            for name, side in sides.items()
        }

    outputs = run(build).outputs
    assert {name: version_of(each.value) for name, (each,) in outputs.items()} == {"none": "3", "one": "1"}


def test_a_side_input_switches_the_model_with_its_version(triton: LocalTriton) -> None:
    """Both at once: a pair of name and version."""

    def build(pipeline: beam.Pipeline) -> Any:
        models = ["echoing", ("versioned", 2), ("identity_fp32", None), ("gone", 1)]
        side = stamped(pipeline, "models", ["versioned", *models[1:]], FixedWindows(10), every=10)
        elements = stamped(pipeline, "elements", [fp32(n) for n in range(40)], FixedWindows(10))
        transform = TritonInference(triton.endpoint, AsSingleton(side))
        return elements | transform.with_exception_handling()

    outcome = run(build)
    assert Counter(result.model_id for result in outcome.results) == {
        "versioned:3": 10,
        "versioned:2": 10,
        "identity_fp32:1": 10,
    }
    assert sorted(int(element[0]) for element, _ in outcome.failures) == list(range(30, 40))


def test_versions_by_model_name(triton: LocalTriton) -> None:
    """Elements name their model in a column, and a side input has the models' versions."""

    def build(pipeline: beam.Pipeline) -> Any:
        side = AsDict(pipeline | "versions" >> beam.Create([("versioned", 2), ("other", 7)]))
        rows = [beam.Row(x=float(n), model="versioned" if n % 2 else "request_facts") for n in range(10)]
        transform = TritonInference(triton.endpoint, {"column": "model"}, model_version=side)
        return pipeline | beam.Create(rows) | transform

    assert Counter(result.model_id for result in run(build).results) == {
        "versioned:2": 5,
        "request_facts:3": 5,
    }


def test_versions_by_column(triton: LocalTriton) -> None:
    """A canary: elements carry the version that they are to be scored by."""
    rows = [beam.Row(x=float(n), version=n % 3 + 1) for n in range(30)]
    results = score(rows, TritonInference(triton.endpoint, "versioned", model_version={"column": "version"}))
    found = [
        (result.example.version, int(result.inference["y"][0] - result.example.x))
        for result in results.results
    ]
    assert Counter(found) == {(1, 1): 10, (2, 2): 10, (3, 3): 10}


def test_an_element_of_several_windows_is_scored_in_each(triton: LocalTriton) -> None:
    """By the version that holds in the window."""

    def build(pipeline: beam.Pipeline) -> Any:
        side = stamped(pipeline, "versions", [2, 1], FixedWindows(10), every=10)
        elements = stamped(pipeline, "elements", [fp32(n) for n in range(10)], SlidingWindows(20, 10))
        transform = TritonInference(
            triton.endpoint, "versioned", model_version=AsSingleton(side, default_value=3)
        )
        return elements | transform

    # A window of the elements takes the side input's window that its last moment lies in.
    found = Counter(
        (float(output.windows[0].start), version_of(output.value)) for output in run(build).outputs["results"]
    )
    assert found == {(-10.0, "2"): 10, (0.0, "1"): 10}


def test_a_stream_switches_with_its_windows(triton: LocalTriton) -> None:
    """On a streaming runner: late data get the version of their own window, panes and all are counted."""

    def build(pipeline: beam.Pipeline) -> Any:
        stream: Any = TestStream(output_tags={"events", "versions"})
        for minute, version in enumerate([1, 2, 1]):
            at = 60 * minute
            stream.add_elements([TimestampedValue(version, at)], tag="versions")
            for n in range(5):
                stream.add_elements([TimestampedValue(fp32(at + n), at + n)], tag="events")
            for tag in ("versions", "events"):
                stream.advance_watermark_to(at + 60, tag=tag)
        # Late, for the second minute.
        stream.add_elements([TimestampedValue(fp32(90), 90)], tag="events")
        for tag in ("versions", "events"):
            stream.advance_watermark_to_infinity(tag=tag)
        streams = pipeline | stream
        versions = streams["versions"] | "Minutes" >> beam.WindowInto(FixedWindows(60))
        events = streams["events"] | beam.WindowInto(FixedWindows(60), allowed_lateness=3600)
        transform = TritonInference(triton.endpoint, "versioned", model_version=AsSingleton(versions))
        return events | transform.with_exception_handling()

    outcome = run(build, "--streaming", runner="DirectRunner")
    assert outcome.failures == []
    found = [(int(output.timestamp), version_of(output.value)) for output in outcome.outputs["results"]]
    assert sorted(found) == sorted(
        [(60 * minute + n, version) for minute, version in enumerate("121") for n in range(5)] + [(90, "2")]
    )


def test_rows_name_the_version_that_answered(triton: LocalTriton) -> None:
    """In a column of their own, which their schema has; failures of a version that is not there have none."""
    rows = [beam.Row(id=n, x=float(n), version=n % 4 + 1) for n in range(40)]
    options: dict[str, Any] = {"output": "row", "version_column": "answered_by", "keep": ["id"]}

    def build(pipeline: beam.Pipeline) -> Any:
        transform = TritonInference(
            triton.endpoint, "versioned", model_version={"column": "version"}, **options
        )
        results, failures = pipeline | beam.Create(rows) | transform.with_exception_handling()
        fields = named_fields_from_element_type(results.element_type)
        assert [name for name, _ in fields] == ["id", "y", "answered_by"]
        answered_by: Any = fields[-1][1]
        assert answered_by == Optional[str]
        return results, failures

    outcome = run(build)
    assert sorted(tuple(row) for row in outcome.results) == [
        (n, float(n + n % 4 + 1), str(n % 4 + 1)) for n in range(40) if n % 4 < 3
    ]
    assert [row.id % 4 for row in outcome.failures] == [3] * 10


def test_arrow_batches_name_the_version_that_answered(server: ReplaceableModel) -> None:
    """Row by row: the parts of one table may be answered by two versions."""
    transform = TritonBatchInference(
        server.endpoint, ROLLING.name, version_column="version", batching={"max_batch_size": 5}, keep=["x"]
    )
    source = threading.Timer(1, server.replace, kwargs={"versions": (1, 2)})
    table = pa.table({"x": pa.array(range(10_000), pa.float32())})
    source.start()
    (scored,) = score([table], transform).results
    source.join()
    assert scored.schema.names == ["x", "y", "version"]
    added = np.subtract(scored["y"], scored["x"]).astype(int).tolist()
    assert list(map(str, added)) == scored["version"].to_pylist()
    assert set(added) == {1, 2}


def test_a_clients_batch_is_answered_by_one_version(server: ReplaceableModel) -> None:
    """However many requests it is sent in."""
    rows = np.zeros((2_000, 1), np.float32)
    versions = []
    timer = threading.Timer(0.5, server.replace, kwargs={"versions": (1, 2)})
    timer.start()
    with TritonClient(server.endpoint) as client:
        while "2" not in versions:
            response = client.infer(ROLLING.name, {"x": rows})
            assert np.unique(response.outputs["y"]).astype(int).astype(str).tolist() == [
                response.model_version
            ]
            versions.append(response.model_version)
    timer.join()
    assert versions == ["1"] * (len(versions) - 1) + ["2"]
    assert len(versions) > 1


def test_a_version_that_is_read_now_and_then(triton: LocalTriton, tmp_path: Path) -> None:
    """The example of the page: Beam's pattern of a side input that changes slowly."""
    interval = 60
    # All at once, as what should have been read is read when the pipeline starts.
    start = Timestamp(interval * (int(time.time()) // interval - 3))
    stop = start + 3 * interval
    file, endpoint = tmp_path / "version", triton.endpoint
    file.write_text("1\n")

    def read_version() -> str:
        text = file.read_text()
        file.write_text("2\n")
        return text.strip()

    def build(p: beam.Pipeline) -> Any:
        elements = [TimestampedValue(fp32(n), start + n * interval / 10) for n in range(30)]
        events = p | beam.Create([0], reshuffle=False) | beam.FlatMap(lambda _: elements)
        versions = (
            p
            | PeriodicImpulse(start, stop, fire_interval=interval, apply_windowing=True)
            | "Read" >> beam.Map(lambda _: read_version())
        )
        scored = (
            events
            | beam.WindowInto(FixedWindows(interval))
            | TritonInference(endpoint, "versioned", model_version=AsIter(versions))
        )
        return {"results": scored}

    results = sorted(run(build).results, key=lambda result: float(result.example[0]))
    assert [version_of(result) for result in results] == ["1"] * 10 + ["2"] * 20
