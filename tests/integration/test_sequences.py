"""`TritonSequenceInference` on the real sequence batcher: running sums, which are wrong if anything is."""

from __future__ import annotations

import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms import trigger, window
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.windowed_value import PaneInfo, PaneInfoTiming

from beam_triton import (
    InvalidRequestError,
    LateElementError,
    LocalProtocolError,
    ModelExecutionError,
    SequenceEndedError,
    TritonSequenceInference,
)
from beam_triton.testing import LocalTriton
from beam_triton.transforms import sequences
from beam_triton.transforms.sequence_scorer import SequenceMemory
from tests.support import pipelines
from tests.support.executions import inferred
from tests.support.models import CATALOGUE, throwaway_triton, write_models

MODELS = ["running_sum", "running_sum_oldest", "running_sum_forgetful"]
ONE_WINDOW = window.FixedWindows(1_000_000)

both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "growing"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    with throwaway_triton(write_models(tmp_path_factory.mktemp("models"), MODELS)) as server:
        yield server


def element(key: Any, number: int, seconds: float | None = None) -> Any:
    """One that the model adds to the sum of its key."""
    value = np.array([number], np.int32)
    return TimestampedValue((key, value), number if seconds is None else seconds)


def numbered(keys: int, length: int) -> list[Any]:
    """Elements of ``keys`` sequences, one a second each from 1 on, all mixed up."""
    elements = [element(f"key-{key}", number) for key in range(keys) for number in range(1, length + 1)]
    random.Random(1).shuffle(elements)
    return elements


def each_value(values: list[Any]) -> Iterator[Any]:
    yield from values


def score(
    server: LocalTriton | list[LocalTriton],
    values: list[Any],
    *,
    model: str = "running_sum_oldest",
    windows: Any = ONE_WINDOW,
    stream: bool = False,
    runner_options: tuple[str, ...] = (),
    **options: Any,
) -> pipelines.Run:
    """Results and failures of a pipeline in one bundle; ``stream`` makes it one of an unbounded input."""
    servers = server if isinstance(server, list) else [server]
    transform = TritonSequenceInference([each.endpoint for each in servers], model, **options)

    def build(pipeline: beam.Pipeline) -> Any:
        elements = pipeline | beam.Create([values], reshuffle=False) | beam.FlatMap(each_value)
        elements |= windows if isinstance(windows, beam.WindowInto) else beam.WindowInto(windows)
        elements.is_bounded = not stream
        return elements | transform.with_exception_handling()

    return pipelines.run(build, *runner_options)


def sums_of(run: pipelines.Run) -> dict[Any, list[int]]:
    """The sums of each key's elements, in the order of their times."""
    found = defaultdict(list)
    for output in sorted(run.outputs["results"], key=lambda output: output.timestamp):
        key, result = output.value
        found[key].append(int(result.inference["y"][0]))
    return dict(found)


def failures_of(run: pipelines.Run) -> list[tuple[Any, int, str]]:
    """Key, number and error of each failed element, in the order of their times."""
    outputs = sorted(run.outputs["failures"], key=lambda output: output.timestamp)
    values = [output.value for output in outputs]
    return [(key, int(value[0]), kind.__name__) for (key, value), (kind, *_) in values]


@pytest.mark.parametrize(
    ("model", "stream", "keys"),
    [
        ("running_sum", False, 50),
        ("running_sum_oldest", False, 50),
        # The direct strategy has eight places, and the sequences of a stream are all open at once.
        ("running_sum", True, 8),
        ("running_sum_oldest", True, 50),
    ],
)
def test_interleaved_keys_out_of_order_give_each_key_its_own_sums(
    server: LocalTriton, model: str, stream: bool, keys: int
) -> None:
    run = score(server, numbered(keys, 8), model=model, stream=stream)
    assert run.failures == []
    assert sums_of(run) == {f"key-{key}": list(accumulate(range(1, 9))) for key in range(keys)}
    assert run.counters["sequences"] == keys
    assert run.counters["elements"] == run.counters["requests"] == 8 * keys


@both_ways
def test_results_keep_the_time_and_window_of_their_elements(server: LocalTriton, stream: bool) -> None:
    run = score(server, numbered(3, 9), windows=window.FixedWindows(5), stream=stream)
    assert sums_of(run) == {f"key-{key}": [1, 3, 6, 10, 5, 11, 18, 26, 35] for key in range(3)}
    for output in run.outputs["results"]:
        start = output.timestamp // 5 * 5
        assert output.windows == (window.IntervalWindow(start, start + 5),)


@both_ways
def test_elements_between_two_milliseconds_go_in_order(server: LocalTriton, stream: bool) -> None:
    """Timers are set in whole milliseconds; behind the last one only the window's end is left."""
    times = [1.0004, 1.0006, 5.00001, 9.99951, 9.99999]
    values = [element("a", number, seconds) for number, seconds in enumerate(times, 1)]
    run = score(server, values[::-1], windows=window.FixedWindows(10), stream=stream)
    assert sums_of(run) == {"a": [1, 3, 6, 10, 15]}


def test_elements_of_sliding_windows_with_a_trigger_are_sent_once_in_each(server: LocalTriton) -> None:
    into = beam.WindowInto(
        window.SlidingWindows(10, 5),
        trigger=trigger.Repeatedly(trigger.AfterCount(1)),
        accumulation_mode=trigger.AccumulationMode.ACCUMULATING,
    )
    run = score(server, [element("a", 1), element("a", 2), element("a", 6)], windows=into)
    found = defaultdict(list)
    for output in run.outputs["results"]:
        (in_window,) = output.windows
        found[float(in_window.start)].append(int(output.value[1].inference["y"][0]))
    assert found == {-5.0: [1, 3], 0.0: [1, 3, 9], 5.0: [6]}


def test_sessions_are_sequences(server: LocalTriton) -> None:
    times = [1, 2, 3, 60, 61, 200]
    values = [element("a", number, seconds) for number, seconds in enumerate(times, 1)]
    run = score(server, values[::-1], windows=window.Sessions(10), stream=True)
    assert sums_of(run) == {"a": [1, 3, 6, 4, 9, 6]}
    assert run.counters["sequences"] == 3
    assert {int(output.windows[0].end) for output in run.outputs["results"]} == {13, 71, 210}


@both_ways
@pytest.mark.parametrize(
    "ends", [lambda keyed: keyed[1]["x"][0] == 3, {"column": "is_last"}], ids=["callable", "column"]
)
def test_element_that_ends_a_sequence_lets_the_next_one_begin_another(
    server: LocalTriton, stream: bool, ends: Any
) -> None:
    values = [
        TimestampedValue(("a", {"x": np.array([x], np.int32), "is_last": x == 3}), seconds)
        for seconds, x in enumerate([1, 2, 3, 1, 2, 3, 4], 1)
    ]
    run = score(server, values, ends=ends, inputs={"x": "x"}, stream=stream)
    assert sums_of(run) == {"a": [1, 3, 6, 1, 3, 6, 4]}
    assert run.counters["sequences"] == 3


@both_ways
def test_sequences_without_an_end_are_left_to_the_server(server: LocalTriton, stream: bool) -> None:
    run = score(server, numbered(3, 3), ends=None, stream=stream)
    assert sums_of(run) == {f"key-{key}": [1, 3, 6] for key in range(3)}


@both_ways
def test_elements_of_one_time_go_by_order_by(server: LocalTriton, stream: bool) -> None:
    values = [element("a", number, 5) for number in (3, 1, 2)]
    run = score(server, values, order_by=lambda keyed: keyed[1][0], stream=stream)
    assert sorted(sums_of(run)["a"]) == [1, 3, 6]
    assert {int(result.example[0]): int(result.inference["y"][0]) for _, result in run.results} == {
        1: 1,
        2: 3,
        3: 6,
    }


@both_ways
def test_text_ends_no_sequence(server: LocalTriton, stream: bool) -> None:
    """As of a file: "no" would be true."""
    run = score(server, numbered(1, 2), ends=lambda keyed: "no", stream=stream)
    assert len(run.failures) == 2
    assert "ends gives 'no', which is neither True nor False" in run.failures[0][1][1]


@both_ways
@pytest.mark.parametrize("order", [float("nan"), None, {}, [1, {}]], ids=["NaN", "None", "dict", "in a list"])
def test_element_without_an_order_fails_alone(server: LocalTriton, stream: bool, order: Any) -> None:
    orders = {1: 2, 2: "b", 3: np.float32(1), 4: order, 5: ("c", 1)}
    values = [element("a", number, 5) for number in orders]
    run = score(server, values, order_by=lambda keyed: orders[int(keyed[1][0])], stream=stream)
    assert {int(result.example[0]): int(result.inference["y"][0]) for _, result in run.results} == {
        3: 3,
        1: 4,
        2: 6,
        5: 11,
    }
    assert failures_of(run) == [("a", 4, "LocalProtocolError")]


@both_ways
@pytest.mark.parametrize(
    ("bad", "error"),
    [(-3, "InvalidRequestError"), (1_000_003, "ModelExecutionError")],
    ids=["refused", "raises"],
)
def test_failed_element_ends_its_sequence_and_no_other(
    server: LocalTriton, stream: bool, bad: int, error: str
) -> None:
    numbers = [1, 2, bad, 4, 5]
    values = [element("bad", number, seconds) for seconds, number in enumerate(numbers)]
    values += [element("good", number) for number in range(1, 6)]
    # One at a time: a model that raises fails all requests of its batch.
    run = score(server, values, max_concurrent_requests=1, stream=stream)
    assert sums_of(run) == {"bad": [1, 3], "good": [1, 3, 6, 10, 15]}
    assert failures_of(run) == [
        ("bad", bad, error),
        ("bad", 4, "SequenceEndedError"),
        ("bad", 5, "SequenceEndedError"),
    ]
    assert str(bad) in run.failures[1][1][1]


@both_ways
@pytest.mark.parametrize("bad", [-3, 1_000_003, "x"], ids=["refused", "raises", "no tensor"])
def test_sequence_goes_on_without_an_element_that_failed(server: LocalTriton, stream: bool, bad: Any) -> None:
    numbers = [1, 2, bad, 4, 5]
    values = [TimestampedValue(("a", [number]), seconds) for seconds, number in enumerate(numbers)]
    run = score(server, values, after_error="replay", stream=stream)
    assert sums_of(run) == {"a": [1, 3, 7, 12]}
    assert len(run.failures) == 1


@both_ways
def test_first_element_may_fail(server: LocalTriton, stream: bool) -> None:
    values = [element("a", number, seconds) for seconds, number in enumerate([-1, 2, 3])]
    assert sums_of(score(server, values, after_error="replay", stream=stream)) == {"a": [2, 5]}
    run = score(server, values, stream=stream)
    assert [kind for *_, kind in failures_of(run)] == ["InvalidRequestError", *["SequenceEndedError"] * 2]


@both_ways
def test_default_value_stands_in_for_failed_elements(server: LocalTriton, stream: bool) -> None:
    values = [element("a", number, seconds) for seconds, number in enumerate([1, -2, 3])]
    run = score(server, values, default_value=[-1], stream=stream)
    assert sums_of(run) == {"a": [1, -1, -1]}
    assert run.failures == []


@both_ways
def test_element_that_fails_fails_the_bundle_without_exception_handling(
    server: LocalTriton, stream: bool
) -> None:
    transform = TritonSequenceInference(server.endpoint, "running_sum")

    def build(pipeline: beam.Pipeline) -> Any:
        elements = pipeline | beam.Create([("a", [-1])]) | beam.WindowInto(ONE_WINDOW)
        elements.is_bounded = not stream
        return elements | transform

    with pytest.raises(Exception, match=r"key 'a': .*-1 is negative"):
        pipelines.run(build)


@both_ways
@pytest.mark.parametrize("option", ["order_by", "ends"])
def test_question_that_fails_for_an_element_fails_that_element(
    server: LocalTriton, stream: bool, option: str
) -> None:
    question: Callable[[Any], Any] = lambda keyed: 1 / (keyed[1][0] - 2)  # noqa: E731
    if option == "ends":
        question = lambda keyed: 1 / (keyed[1][0] - 2) > 5  # noqa: E731
    values = [TimestampedValue(("a", [number]), number) for number in (1, 2, 3)]
    options: dict[str, Any] = {option: question}
    run = score(server, values, stream=stream, **options)
    assert sums_of(run) == {"a": [1, 4]}
    ((_, (kind, message, _)),) = run.failures
    assert kind is LocalProtocolError and f"callable of {option} failed: ZeroDivisionError" in message


@both_ways
def test_rows_have_the_kept_columns_and_the_outputs(server: LocalTriton, stream: bool) -> None:
    values = [TimestampedValue(("a", beam.Row(id=f"i{number}", x=number)), number) for number in (1, 2, 3)]
    run = score(server, values, output="row", keep={"id": str}, version_column="version", stream=stream)
    rows = sorted((row.id, row.y, row.version) for _, row in run.results)
    assert rows == [("i1", 1, "1"), ("i2", 3, "1"), ("i3", 6, "1")]


@pytest.fixture(scope="module")
def patient_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """With four and eight places, which an idle sequence keeps for longer than any test takes."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("running_sum", "running_sum_forgetful"):
        settings = re.sub(r"microseconds: \d+", "microseconds: 600000000", CATALOGUE[name].settings)
        write_models(folder, [name], settings=settings)
    with throwaway_triton(folder) as server:
        yield server


@both_ways
@pytest.mark.parametrize(("model", "places"), [("running_sum", 8), ("running_sum_forgetful", 4)])
@pytest.mark.parametrize("after_error", ["end", "replay"])
@pytest.mark.parametrize(
    ("bad", "position"),
    [([-1], 1), ([-1], 2), ([-1], 3), ([1, 2, 3], 2), ([1, 2, 3], 3)],
    ids=["refused first", "refused", "refused last", "misshapen", "misshapen last"],
)
def test_failed_sequences_leave_their_places_to_others(
    patient_server: LocalTriton,
    bad: list[int],
    position: int,
    after_error: str,
    model: str,
    places: int,
    stream: bool,
) -> None:
    """Were they kept, others would wait for them to be idle for ten minutes."""
    values = {1: [1], 2: [2], 3: [3], position: bad}
    failing = [
        TimestampedValue((key, np.array(value, np.int32)), seconds)
        for key in range(places)
        for seconds, value in values.items()
    ]
    run = score(patient_server, failing, model=model, after_error=after_error, stream=stream)
    assert len(run.failures) == places * (4 - position if after_error == "end" else 1)
    good = [element(key, number) for key in range(places) for number in (1, 2, 3)]
    run = score(patient_server, good, model=model, stream=stream)
    assert sums_of(run) == {key: [1, 3, 6] for key in range(places)}


def test_server_with_too_few_places_gives_them_to_others_and_gets_sequences_again(
    server: LocalTriton,
) -> None:
    """Eight sequences of a stream on four places, which the server takes from those that are idle."""
    before = inferred(server, "running_sum_forgetful")
    steps: list[Any] = []
    for number in range(1, 5):
        steps += [[element(key, number) for key in range(8)], number + 0.5]
    run = streamed(server, steps, model="running_sum_forgetful")
    assert run.failures == []
    assert sums_of(run) == {key: [1, 3, 6, 10] for key in range(8)}
    assert inferred(server, "running_sum_forgetful") - before > 4 * 8


def slowly(keyed: Any) -> Iterator[Any]:
    """Let more time pass between two elements than the server keeps an idle sequence."""
    time.sleep(0.7)
    yield keyed


def streamed(
    server: LocalTriton,
    steps: list[Any],
    *,
    model: str = "running_sum_oldest",
    windows: Any = ONE_WINDOW,
    before: Any = None,
    after: Any = None,
    **options: Any,
) -> pipelines.Run:
    """Results and failures of a TestStream: a number is a watermark, a list holds elements."""
    stream: Any = TestStream()
    for step in steps:
        add = stream.add_elements if isinstance(step, list) else stream.advance_watermark_to
        stream = add(step)
    transform = TritonSequenceInference(server.endpoint, model, **options)

    def build(pipeline: beam.Pipeline) -> Any:
        elements = pipeline | stream.advance_watermark_to_infinity()
        if before is not None:
            elements |= "Before" >> before
        elements |= windows if isinstance(windows, beam.WindowInto) else beam.WindowInto(windows)
        results, failures = elements | transform.with_exception_handling()
        return results if after is None else results | "After" >> after, failures

    return pipelines.run(build, runner="BundleBasedDirectRunner")


def sums(run: pipelines.Run) -> dict[int, int]:
    """The sum that came with each number."""
    return {int(result.example[0]): int(result.inference["y"][0]) for _, result in run.results}


def test_stream_scores_elements_once_the_watermark_has_passed_them(server: LocalTriton) -> None:
    run = streamed(
        server,
        [[element("a", 3), element("a", 1)], 4, [element("a", 5), element("a", 4)], 10, [element("a", 11)]],
    )
    assert sums(run) == {1: 1, 3: 4, 4: 8, 5: 13, 11: 24}
    assert run.failures == []


_seen: list[tuple[str, int]] = []


def note_element(keyed: Any) -> Any:
    _seen.append(("element", int(keyed[1][0])))
    return keyed


def note_result(keyed: Any) -> Any:
    _seen.append(("result", int(keyed[1].example[0])))
    return keyed


def test_element_of_the_far_future_keeps_no_other_waiting(server: LocalTriton) -> None:
    _seen.clear()
    steps: list[Any] = [[element("a", 5000)], 1, [element("a", 2), element("a", 4000), element("a", 5)], 10]
    steps += [[element("a", 11)], 20, [element("b", 30)], 40, [element("b", 50)], 60]
    streamed(server, steps, before=beam.Map(note_element), after=beam.Map(note_result))
    in_time = _seen[: _seen.index(("element", 50))]
    assert [number for what, number in in_time if what == "result"] == [2, 5, 11]


def test_late_element_fails_and_the_sequence_goes_on(server: LocalTriton) -> None:
    run = streamed(
        server,
        [[element("a", 1), element("a", 5), element("a", 6)], 8, [element("a", 2)], 9, [element("a", 10)]],
    )
    assert sums(run) == {1: 1, 5: 6, 6: 12, 10: 22}
    (((_, value), (kind, message, _)),) = run.failures
    assert (int(value[0]), kind) == (2, LateElementError)
    assert "the element of 1970-01-01T00:00:05Z had been scored" in message


def test_element_behind_its_window_fails(server: LocalTriton) -> None:
    into = beam.WindowInto(
        window.FixedWindows(10),
        trigger=trigger.AfterWatermark(late=trigger.AfterCount(1)),
        accumulation_mode=trigger.AccumulationMode.ACCUMULATING,
        allowed_lateness=1000,
    )
    run = streamed(server, [[element("a", 1), element("a", 2)], 30, [element("a", 3)]], windows=into)
    assert sums(run) == {1: 1, 2: 3}
    assert [kind for _, (kind, *_) in run.failures] == [LateElementError]


def test_sequence_that_the_server_forgot_is_sent_again(server: LocalTriton) -> None:
    steps: list[Any] = []
    for number in range(1, 6):
        steps += [[element("a", number)], number + 0.5]
    run = streamed(server, steps, model="running_sum_forgetful", before=beam.FlatMap(slowly), ends=None)
    assert sums(run) == {1: 1, 2: 3, 3: 6, 4: 10, 5: 15}


_attempts: list[int] = []


def failing_once(keyed: Any) -> Iterator[Any]:
    """Fail the bundle that has the sum of 6 in it, once: what was sent is sent again."""
    if int(keyed[1].inference["y"][0]) == 6:
        _attempts.append(1)
        if len(_attempts) == 1:
            raise RuntimeError("the first time")
    yield keyed


def test_repeated_bundle_does_not_add_its_elements_twice(server: LocalTriton) -> None:
    _attempts.clear()
    steps: list[Any] = []
    for number in range(1, 6):
        steps += [[element("a", number)], number + 0.5]
    run = streamed(server, steps, after=beam.FlatMap(failing_once))
    assert len(_attempts) == 2
    assert sums(run) == {1: 1, 2: 3, 3: 6, 4: 10, 5: 15}


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep nothing between two bundles, as when each is on another worker."""
    monkeypatch.setattr(sequences, "_MEMORY", SequenceMemory(max_bytes=0))


@pytest.mark.parametrize("after_error", ["end", "replay"])
def test_sequence_that_moves_to_another_worker_is_sent_again(
    server: LocalTriton, monkeypatch: pytest.MonkeyPatch, after_error: str
) -> None:
    forget(monkeypatch)
    steps: list[Any] = []
    for number in range(1, 6):
        steps += [[element("a", number)], number + 0.5]
    run = streamed(server, steps, after_error=after_error)
    assert sums(run) == {1: 1, 2: 3, 3: 6, 4: 10, 5: 15}


def test_moved_sequence_remembers_how_it_ended(server: LocalTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    numbers = [1, -2, 3, 4, 5]
    steps: list[Any] = []
    for seconds, number in enumerate(numbers, 1):
        steps += [[element("a", number, seconds)], seconds + 0.5]
    run = streamed(server, steps)
    assert sums(run) == {1: 1}
    kinds = [kind for _, (kind, *_) in run.failures]
    assert kinds == [InvalidRequestError, *[SequenceEndedError] * 3]


def test_moved_sequence_goes_on_without_an_element_that_was_refused(
    server: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    steps: list[Any] = []
    for seconds, number in enumerate([1, -2, 3, -2, -2, 4, 5], 1):
        steps += [[element("a", number, seconds)], seconds + 0.5]
    run = streamed(server, steps, after_error="replay")
    assert sums(run) == {1: 1, 3: 4, 4: 8, 5: 13}
    assert len(run.failures) == 3


def test_moved_sequence_ends_where_the_model_raises_again(
    server: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have answered the element before, and raise for want of memory now."""
    forget(monkeypatch)
    steps: list[Any] = []
    for seconds, number in enumerate([1, 2_000_000, 3, 4], 1):
        steps += [[element("a", number, seconds)], seconds + 0.5]
    run = streamed(server, steps, after_error="replay")
    assert sums(run) == {1: 1}
    kinds = [kind for _, (kind, *_) in run.failures]
    assert kinds == [ModelExecutionError, SequenceEndedError, SequenceEndedError]


def test_sequence_is_not_remembered_beyond_its_window(
    server: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SequenceMemory()
    monkeypatch.setattr(sequences, "_MEMORY", memory)
    streamed(server, [[element("a", 1)], 2], windows=window.FixedWindows(10), ends=None)
    assert not memory._sequences


def test_sequence_too_long_to_be_kept_ends_where_it_moves(
    server: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    steps: list[Any] = []
    for number in range(1, 7):
        steps += [[element("a", number)], number + 0.5]
    run = streamed(server, steps, max_replay_elements=3)
    assert sums(run) == {1: 1, 2: 3, 3: 6, 4: 10}
    errors = [error for _, error in run.failures]
    assert [kind for kind, *_ in errors] == [SequenceEndedError] * 2
    assert "more than max_replay_elements=3 elements" in errors[0][1]


def test_sequence_too_long_to_be_kept_goes_on_in_its_process(server: LocalTriton) -> None:
    steps: list[Any] = []
    for number in range(1, 7):
        steps += [[element("a", number)], number + 0.5]
    run = streamed(server, steps, max_replay_elements=3)
    assert sums(run) == {1: 1, 2: 3, 3: 6, 4: 10, 5: 15, 6: 21}


def test_late_pane_of_a_grouped_sequence_fails(server: LocalTriton) -> None:
    """As with sessions, whose elements are sent together. No local runner gives a TestStream such a pane."""
    transform = TritonSequenceInference(server.endpoint, "running_sum").with_exception_handling()
    late = PaneInfo(False, False, PaneInfoTiming.LATE, 1, 1)
    dofn: Any = transform._new_dofn(with_exception_handling=True)
    with pipelines.bundle_of(dofn):
        outputs = dofn.process(("a", [(0, ("a", [1]))]), window.IntervalWindow(0, 10), late)
        (failure,) = chain(outputs, dofn.finish_bundle())
    assert failure.value.value[1][0] is LateElementError


def test_model_without_a_sequence_batcher_is_refused(tmp_path: Any) -> None:
    refused = pytest.raises(Exception, match="has no sequence_batching in its configuration")
    with throwaway_triton(write_models(tmp_path, ["double"])) as plain, refused:
        score(plain, numbered(1, 1), model="double")
