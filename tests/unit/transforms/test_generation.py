"""`TritonGenerate` against servers that script every byte of their streams."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.transforms.window import SlidingWindows, TimestampedValue

from beam_triton import (
    ConfigurationError,
    ConnectionLostError,
    DeadlineExceededError,
    InvalidRequestError,
    LocalProtocolError,
    ModelExecutionError,
    ModelSpec,
    RemoteProtocolError,
    TensorSpec,
    TritonGenerate,
    TritonGenerateDoFn,
)
from tests.support import pipelines
from tests.support.answers import Answer
from tests.support.fault_server import Exchange, Fault, FaultServer
from tests.support.faults import answered
from tests.support.scripted_servers import ScriptedServer, tensor

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)


SPEC = ModelSpec(
    "m", "", (TensorSpec("text_input", "BYTES", (1,)),), (TensorSpec("text_output", "BYTES", (1,)),), 0
)


def event(text: str, **fields: Any) -> bytes:
    """An event as Triton sends it."""
    document = {"model_name": "m", "model_version": "1", "text_output": text, **fields}
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def error_event(message: str) -> bytes:
    return f"data: {json.dumps({'error': message})}\n\n".encode()


WORDS = (event("Once"), event(" upon"), event(" a time"))


def streaming(*pieces: bytes, pause_seconds: float = 0.0, ends: str = "well") -> Fault:
    """A chunk for each piece, and an end: ``well``, ``cut`` (the connection closes) or ``never``."""

    def play(exchange: Exchange) -> None:
        exchange.request()
        exchange.send(HEAD)
        for piece in pieces:
            if exchange.hold(pause_seconds):
                exchange.close()
                return
            exchange.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        if ends == "well":
            exchange.send(b"0\r\n\r\n")
            return
        if ends == "never":
            exchange.hold()
        exchange.close()

    return play


def of_generate(request_line: bytes) -> bool:
    return b"/generate" in request_line


@contextmanager
def serving(script: Fault | Sequence[Fault]) -> Iterator[FaultServer]:
    model = ScriptedServer(
        inputs=(tensor("text_input", "BYTES", [1]),), outputs=(tensor("text_output", "BYTES", [1]),)
    )
    with FaultServer(model, script, when=of_generate) as server:
        yield server


def generate(
    script: Fault | Sequence[Fault], *elements: Any, **options: Any
) -> tuple[pipelines.Run, list[Any]]:
    """The pipeline's run, and the bodies of the requests that the server got."""
    options = {"retry": {"initial_backoff_seconds": 0.01}, **options}
    with serving(script) as server:
        transform = TritonGenerate(server.endpoint, "m", **options).with_exception_handling()
        run = pipelines.score(elements or ["Tell me"], transform)
    bodies = [json.loads(each.body) for each in server.requests if "/generate" in each.target]
    return run, bodies


def text_of(run: pipelines.Run) -> str:
    assert not run.failures
    (result,) = run.results
    return str(result.inference["text_output"])


def failure_of(run: pipelines.Run) -> tuple[type, str]:
    assert not run.results
    ((element, (kind, message, _)),) = run.failures
    assert element == "Tell me"
    return kind, message


def test_a_text_is_the_events_joined() -> None:
    """With default options: a PredictionResult that names model and version."""
    run, ((body),) = generate(streaming(*WORDS))
    assert run.results == [PredictionResult("Tell me", {"text_output": "Once upon a time"}, "m:1")]
    assert body["text_input"] == "Tell me" and body["id"] and "parameters" not in body


@pytest.mark.parametrize(
    "pieces",
    [
        [b"".join(WORDS)],
        [bytes([byte]) for byte in b"".join(WORDS)],
        [each.replace(b"\n", b"\r\n") for each in WORDS],
        [b": hello\n\n", *WORDS, b": bye\n\n"],
        [WORDS[0][:20], WORDS[0][20:] + WORDS[1] + WORDS[2][:-1], WORDS[2][-1:]],
    ],
    ids=["one packet", "single bytes", "CRLF", "comments", "across events"],
)
def test_pieces_of_a_stream_do_not_matter(pieces: list[bytes]) -> None:
    """Packets and events have nothing to do with each other."""
    run, _ = generate(streaming(*pieces))
    assert text_of(run) == "Once upon a time"


def test_each_chunk_is_a_result_with_its_index() -> None:
    """With stream=True, keyed as the element is; the model is asked to stream."""
    run, (body,) = generate(streaming(*WORDS), ("k", "Tell me"), stream=True)
    assert [key for key, _ in run.results] == ["k"] * 3
    assert [result.inference["index"] for _, result in run.results] == [0, 1, 2]
    assert [result.inference["text_output"] for _, result in run.results] == ["Once", " upon", " a time"]
    assert body["parameters"] == {"stream": True}


def test_other_fields_of_the_last_answer_come_with_the_text() -> None:
    """Such as the reason why a language model ended."""
    run, _ = generate(streaming(event("a", tokens=1), event("b", tokens=2, finish_reason="stop")))
    assert run.results[0].inference == {"text_output": "ab", "tokens": 2, "finish_reason": "stop"}


def test_a_stream_without_events_is_an_empty_text() -> None:
    """The model had nothing to say, which is no error."""
    run, _ = generate(streaming())
    assert text_of(run) == ""


class Question(NamedTuple):
    id: int
    question: str
    limit: int | None


def test_rows_feed_inputs_and_parameters_and_come_back_with_the_text() -> None:
    """A column by `inputs`, parameters for all, of a column and of a callable; None leaves one out."""
    rows = [Question(1, "Who?", 5), Question(2, "Where?", None)]
    run, bodies = generate(
        streaming(*WORDS),
        *rows,
        inputs={"text_input": "question"},
        parameters={
            "temperature": np.float32(0.5),
            "max_tokens": {"column": "limit"},
            "seed": lambda row: row.id * 10,
        },
        output="row",
        keep=["id"],
    )
    assert sorted(row.id for row in run.results) == [1, 2]
    assert {row.text_output for row in run.results} == {"Once upon a time"}
    assert sorted((body["text_input"], tuple(body["parameters"].items())) for body in bodies) == [
        ("Where?", (("temperature", 0.5), ("seed", 20))),
        ("Who?", (("temperature", 0.5), ("max_tokens", 5), ("seed", 10))),
    ]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"id": str}, "column 'id' is int, and not str"),
        ({"nope": int}, "there is no column 'nope'"),
        ("id", r"a list of columns such as \['id'\]"),
        (5, "keep must be a list of columns"),
    ],
)
def test_kept_columns_are_compared_with_the_rows(keep: Any, message: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigurationError, match=message):
        generate(streaming(*WORDS), Question(1, "Who?", 5), output="row", keep=keep)


def test_an_error_event_fails_the_element_and_carries_what_came_before() -> None:
    """It is not repeated: the text had begun. The metrics count the tokens that came."""
    run, bodies = generate(streaming(*WORDS, error_event("out of memory")))
    kind, message = failure_of(run)
    assert kind is ModelExecutionError
    assert "out of memory; the text before it: 'Once upon a time'" in message
    assert len(bodies) == 1 and run.counters["tokens"] == 3 and run.counters["failures"] == 1


def test_a_failed_row_has_a_column_for_what_came_before() -> None:
    """Beside the columns that every failed row has."""
    run, _ = generate(streaming(*WORDS, error_event("no")), {"text_input": "Tell me"}, output="row")
    (failure,) = run.failures
    assert failure.generated == "Once upon a time" and failure.error_type == "ModelExecutionError"


def test_a_failure_can_be_looked_at_whole() -> None:
    """`on_failure_callback` gets the error, whose ``generated`` is the text."""
    seen: list[str] = []
    with serving(streaming(*WORDS, ends="cut")) as server:
        dofn = TritonGenerateDoFn(server.endpoint, "m")
        with pipelines.bundle_of(dofn), pytest.raises(ConnectionLostError) as caught:
            seen += dofn.process("Tell me")
    assert caught.value.generated == "Once upon a time" and not seen


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (streaming(*WORDS, ends="cut"), ConnectionLostError),
        (streaming(*WORDS, WORDS[0][:-1]), RemoteProtocolError),
        (streaming(*WORDS, b"data: {\n\n"), RemoteProtocolError),
        (streaming(*WORDS, b'data: {"other": 1}\n\n'), RemoteProtocolError),
    ],
    ids=["cut", "half an event", "broken JSON", "no text"],
)
def test_a_stream_that_breaks_is_not_repeated_once_it_has_begun(fault: Fault, kind: type) -> None:
    """No text is lost in silence, and none is generated twice."""
    run, bodies = generate(fault)
    found, message = failure_of(run)
    assert found is kind and "'Once upon a time'" in message and len(bodies) == 1


def test_a_stream_that_breaks_before_its_first_event_is_repeated() -> None:
    """As every other request is."""
    run, bodies = generate([streaming(ends="cut"), streaming(*WORDS)])
    assert text_of(run) == "Once upon a time"
    assert len(bodies) == 2 and bodies[0]["id"] == bodies[1]["id"] and run.counters["retries"] == 1


def test_a_text_that_had_begun_is_repeated_where_the_option_allows_it() -> None:
    """From its start: what came before is dropped."""
    run, bodies = generate([streaming(*WORDS[:2], ends="cut"), streaming(*WORDS)], repeat_started=True)
    assert text_of(run) == "Once upon a time" and len(bodies) == 2


def test_an_overloaded_server_is_waited_for() -> None:
    """A full queue holds the request."""
    full = answered(Answer(503, b'{"error": "Exceeds maximum queue size"}'))
    run, bodies = generate([full, streaming(*WORDS)])
    assert text_of(run) == "Once upon a time" and len(bodies) == 2


def test_an_error_before_the_first_event_is_an_answer_like_any_other() -> None:
    """Triton sends it as an event, with the status of the error."""
    refusal = Answer(400, error_event("prompt too long"), (("Content-Type", "text/event-stream"),))
    run, bodies = generate(answered(refusal))
    kind, message = failure_of(run)
    assert kind is InvalidRequestError and len(bodies) == 1
    assert "generate_stream of model 'm': the server answered 400: prompt too long" in message


def test_the_first_token_has_a_deadline() -> None:
    """It is met by the next attempt here."""
    late = streaming(*WORDS, pause_seconds=2.0)
    run, bodies = generate([late, streaming(*WORDS)], first_token_seconds=0.2)
    assert text_of(run) == "Once upon a time" and len(bodies) == 2
    run, bodies = generate(late, first_token_seconds=0.2, retry={"max_retries": 0})
    kind, message = failure_of(run)
    assert kind is DeadlineExceededError and "no event within first_token_seconds=0.2" in message


@pytest.mark.parametrize(
    "pieces", [WORDS[:2], (*WORDS[:2], *[b": alive\n\n"] * 40)], ids=["silence", "comments"]
)
def test_the_time_between_tokens_has_a_deadline(pieces: Sequence[bytes]) -> None:
    """Comments keep a connection alive, but say nothing of the text."""
    started = time.monotonic()
    fault = streaming(*pieces, pause_seconds=0.05, ends="never")
    run, bodies = generate(fault, between_tokens_seconds=0.3)
    kind, message = failure_of(run)
    assert kind is DeadlineExceededError and len(bodies) == 1
    assert (
        "no event for between_tokens_seconds=0.3 after 2 of them; the text before it: 'Once upon'" in message
    )
    assert time.monotonic() - started < 1.9


def test_a_whole_generation_has_a_deadline() -> None:
    """However steadily its tokens come."""
    endless = streaming(*[event("x")] * 100, pause_seconds=0.05)
    run, _ = generate(endless, timeout_seconds=0.5, pool={"connect_timeout_seconds": 0.4})
    kind, message = failure_of(run)
    assert kind is DeadlineExceededError and "within 0.5 s" in message and "'xxxx" in message


def test_many_streams_are_in_flight_on_one_thread() -> None:
    """More and more of them, as first tokens come no later: far faster than one after another."""
    started, threads = time.monotonic(), threading.active_count()
    with serving(streaming(*[event("x")] * 5, pause_seconds=0.05)) as server:
        with pipelines.bundle_of(TritonGenerateDoFn(server.endpoint, "m")) as dofn:
            given = [beam.transforms.window.GlobalWindows.windowed_value(str(n)) for n in range(24)]
            results = [each for value in given for each in dofn.process(value.value, value)]
            assert threading.active_count() - threads < 24
            results += dofn.finish_bundle()
        assert len(results) == 24 and server.most_open >= 4
    assert time.monotonic() - started < 24 * 0.25 / 2


def test_metrics_tell_time_to_first_token_and_tokens_a_second() -> None:
    """A token every 50 ms, the first one after as much."""
    run, _ = generate(streaming(*[event("x")] * 5, pause_seconds=0.05))
    assert run.counters["tokens"] == 5 and run.counters["elements"] == 1
    assert 45 <= run.distributions["time_to_first_token_milliseconds"].mean <= 500
    assert 1 <= run.distributions["tokens_per_second"].mean <= 21


def test_one_answer_without_events_is_taken_as_it_is() -> None:
    """`/generate`, and fronts that answer `/generate_stream` without streaming."""
    whole = answered(Answer(200, b'{"text_output": "All."}', (("Content-Type", "application/json"),)))
    for api in ("generate", "generate_stream"):
        with serving(whole) as server:
            run = pipelines.score(["Tell me"], TritonGenerate(server.endpoint, "m", api=api))
            assert run.results[0].inference == {"text_output": "All."}
            assert server.requests[-1].target == f"/v2/models/m/{api}"


def test_the_version_is_in_the_path() -> None:
    """As for inference."""
    with serving(streaming(*WORDS)) as server:
        with pipelines.bundle_of(
            TritonGenerateDoFn(
                server.endpoint,
                "m",
                model_version=3,
                model_spec=SPEC,
            )
        ) as dofn:
            assert len(list(dofn.process("Tell me"))) == 1
        assert server.requests[-1].target == "/v2/models/m/versions/3/generate_stream"


@pytest.mark.parametrize(
    ("element", "options", "message"),
    [
        (3, {}, "an element is a prompt .str., a mapping or a row, not a int"),
        ({"q": "x"}, {}, "has no column 'text_input'"),
        ({"text_input": object()}, {}, "cannot be written as JSON"),
        ("\ud800", {}, "cannot be written as JSON"),
        ("x", {"parameters": {"n": {"column": "limit"}}}, "'n' comes from column 'limit'"),
        ("x", {"parameters": {"n": lambda element: 1 / 0}}, "callable of parameter 'n' failed: ZeroDivision"),
        ("x", {"prompt_field": "prompt"}, "no input 'prompt' for a prompt"),
    ],
)
def test_elements_that_make_no_request_are_failures_of_their_own(
    element: Any, options: dict[str, Any], message: str
) -> None:
    """Nothing is sent for them, and their neighbours are not hurt."""
    with serving(streaming(*WORDS)) as server:
        dofn = TritonGenerateDoFn(server.endpoint, "m", with_exception_handling=True, **options)
        with pipelines.bundle_of(dofn):
            (failure,) = dofn.process(element)
            sent = [each.target for each in server.requests if "/generate" in each.target]
    assert failure.tag == "failures" and failure.value[1][0] is LocalProtocolError and not sent
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(failure.value[1][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api": "infer"}, "api must be"),
        ({"api": "generate", "stream": True}, "stream=True needs api"),
        ({"output": "dict"}, "output must be"),
        ({"keep": ["id"]}, "keep needs output"),
        ({"batching": {"max_batch_size": 3}}, "takes no batching: the server batches"),
        ({"request_parameters": {}}, "use parameters"),
        ({"default_value": "x"}, "use with_exception_handling"),
        ({"first_token_seconds": 0}, "first_token_seconds must be"),
        ({"between_tokens_seconds": "1"}, "between_tokens_seconds must be"),
        ({"parameters": {"x": {"col": "y"}}}, "takes a value, a callable, or"),
        ({"parameters": {"x": object()}}, "cannot be written as JSON"),
        ({"parameters": [1]}, "parameters must map"),
        ({"prompt_field": ""}, "prompt_field must be the name"),
        ({"inputs": {"x": 3}}, "takes the name of a column"),
        ({"timeout": 3}, "no option 'timeout'"),
    ],
)
def test_options_that_cannot_work_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    """Nothing is sent."""
    with pytest.raises(ConfigurationError, match=message):
        TritonGenerate("http://nowhere.invalid:8000", "m", **options)


def test_a_door_without_generate_is_refused() -> None:
    """SageMaker passes one kind of request."""
    with pytest.raises(ConfigurationError, match="has no /generate"):
        TritonGenerate("https://host/endpoints/e/invocations", "m", model_spec=SPEC)


def test_an_output_field_that_the_model_does_not_have_ends_the_job() -> None:
    """At setup, with the outputs that there are."""
    with serving(streaming(*WORDS)) as server:
        dofn = TritonGenerateDoFn(server.endpoint, "m", output_field="text")
        with pytest.raises(ConfigurationError, match=r"no output 'text'.*outputs: text_output"):
            dofn.setup()


def test_columns_of_one_name_are_refused() -> None:
    """A kept column that is called as the text."""
    rows = beam.Create([beam.Row(text_input="a", text_output="b")])
    with pytest.raises(ConfigurationError, match="two columns have the name 'text_output'"):
        beam.Pipeline() | rows | TritonGenerate("http://nowhere.invalid:8000", "m", output="row")


def test_results_keep_their_windows() -> None:
    """Those that leave while another element is processed, too."""
    with serving(streaming(*WORDS)) as server:

        def build(pipeline: beam.Pipeline) -> Any:
            stamped = [TimestampedValue(str(second), second) for second in (0, 10, 20, 30)]
            return (
                pipeline
                | beam.Create(stamped, reshuffle=False)
                | beam.WindowInto(SlidingWindows(20, 10))
                | TritonGenerate(server.endpoint, "m", max_concurrent_requests=1)
            )

        run = pipelines.run(build)
    found = {
        (output.timestamp, float(window.start))
        for output in run.outputs["results"]
        for window in output.windows
    }
    assert found == {(at, start) for at in (0, 10, 20, 30) for start in (at, at - 10)}
    assert sum(len(output.windows) for output in run.outputs["results"]) == 8


def test_elements_can_be_generated_on_many_threads_without_a_bundle() -> None:
    """As Beam's AsyncWrapper calls it: start_bundle, process and finish_bundle on threads of its own."""
    results: list[Any] = []
    with (
        serving(streaming(*WORDS, pause_seconds=0.02)) as server,
        pipelines.bundle_of(TritonGenerateDoFn(server.endpoint, "m")) as dofn,
    ):

        def one(number: int) -> None:
            dofn.start_bundle()
            results.extend(dofn.process((number, "Tell me")))
            results.extend(dofn.finish_bundle())

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(key for key, _ in results) == list(range(8))
    assert {result.inference["text_output"] for _, result in results} == {"Once upon a time"}


def test_a_bundle_that_failed_takes_no_more_elements() -> None:
    """Beam's own exception handling around the DoFn would lose what was in flight without a word."""
    value = beam.transforms.window.GlobalWindows.windowed_value
    with (
        serving(streaming(*WORDS)) as server,
        pipelines.bundle_of(TritonGenerateDoFn(server.endpoint, "m")) as dofn,
    ):
        with pytest.raises(LocalProtocolError, match="element 0 of its bundle"):
            dofn.process(3, value(3))
        for use in (lambda: dofn.process("x", value("x")), dofn.finish_bundle):
            with pytest.raises(ConfigurationError, match="use TritonGenerate"):
                use()
        dofn.start_bundle()
        assert len([*dofn.process("x", value("x")), *dofn.finish_bundle()]) == 1


def test_arguments_of_exception_handling_mean_what_they_mean_elsewhere() -> None:
    """A shorter timeout, tags of one's own, and a callback with the whole error."""
    with serving(streaming(*WORDS, ends="never")) as server:
        transform = TritonGenerate(server.endpoint, "m", pool={"connect_timeout_seconds": 0.2})
        handled = transform.with_exception_handling(timeout=0.4, main_tag="texts", dead_letter_tag="rest")
        run = pipelines.score(["Tell me"], handled)
    assert "within 0.4 s" in failure_of(run)[1]


def test_the_job_page_shows_what_is_asked_for() -> None:
    """Without secrets, and without defaults."""
    shown = TritonGenerate(
        "http://user:secret@host:8000", "m", stream=True, parameters={"n": 1}, auth_token="secret"
    ).display_data()
    texts = {name: item.value for name, item in shown.items()}
    assert texts["stream"] == "True" and texts["parameters"] == "{'n': 1}" and "api" not in texts
    assert "secret" not in str(texts)


class BagState:
    """What AsyncWrapper needs of Beam's state; the runners of one process have no timers in real time."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def add(self, item: Any) -> None:
        self.items.append(item)

    def read(self) -> list[Any]:
        return list(self.items)

    def clear(self) -> None:
        self.items = []


class Timer:
    def set(self, at: Any) -> None:
        """Fires when the test says so."""


def test_beams_async_wrapper_generates_outside_of_bundles() -> None:
    """`process` returns at once; the timer collects texts and failures."""
    async_dofn = pytest.importorskip("apache_beam.transforms.async_dofn")
    AsyncWrapper = async_dofn.AsyncWrapper
    state, timer = BagState(), Timer()
    with serving([*[streaming(*WORDS, pause_seconds=0.1)] * 3, streaming(error_event("no"))]) as server:
        endpoint = server.endpoint
        dofn = AsyncWrapper(TritonGenerateDoFn(endpoint, "m", with_exception_handling=True), parallelism=8)
        dofn.setup()
        outputs: list[Any] = []
        for number in range(4):
            outputs += dofn.process(("k", f"Tell me {number}"), timer=timer, to_process=state)
        assert not outputs

        def collect() -> bool:
            outputs.extend(dofn.commit_finished_items(state, timer))
            return not state.items

        _eventually(collect)
        dofn.teardown()
        async_dofn.AsyncWrapper.reset_state()
    texts = [each[1].inference["text_output"] for each in outputs if type(each) is tuple]
    (failure,) = [each.value for each in outputs if type(each) is not tuple]
    assert texts == ["Once upon a time"] * 3 and failure[1][0] is ModelExecutionError


def test_a_failed_bundle_stops_what_is_in_flight() -> None:
    """The server sees the connections close, and stops generating."""
    with serving(streaming(*WORDS, ends="never")) as server:
        with pipelines.bundle_of(TritonGenerateDoFn(server.endpoint, "m")) as dofn:
            value = beam.transforms.window.GlobalWindows.windowed_value("Tell me")
            assert not list(dofn.process(value.value, value))
        _eventually(lambda: server.open_now <= 1)


def _eventually(condition: Callable[[], Any]) -> None:
    give_up_at = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
