"""`TritonGenerate` on a real Triton: a decoupled model that tells its prompt word by word."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import pytest

from beam_triton import (
    InferenceError,
    InvalidRequestError,
    ModelExecutionError,
    ModelNotFoundError,
    TransportError,
    TritonGenerate,
    TritonGenerateDoFn,
)
from beam_triton.testing import LocalTriton
from tests.support import pipelines
from tests.support.models import throwaway_triton, write_models

TALE = "once upon a time"
CHUNKS = ["once", " upon", " a", " time"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """Four instances of the model, and one that is not decoupled."""
    repository = write_models(tmp_path_factory.mktemp("models"), ["storyteller"], instances=4)
    with throwaway_triton(write_models(repository, ["shout"])) as server:
        yield server


def generate(
    server: LocalTriton, *elements: Any, model: str = "storyteller", **options: Any
) -> pipelines.Run:
    """A pipeline in one bundle."""
    transform = TritonGenerate(server.endpoint, model, **options).with_exception_handling()
    return pipelines.score(elements, transform)


class Prompt(NamedTuple):
    id: int
    text_input: str
    repeat: int | None


def texts_of(pipeline: beam.Pipeline, endpoint: str, prompts: list[Prompt]) -> Any:
    """The example of docs/llm.md."""
    texts, failures = (
        pipeline
        | beam.Create(prompts)
        | TritonGenerate(
            endpoint,
            "storyteller",
            parameters={"stream": True, "repeat": {"column": "repeat"}},
            output="row",
            keep=["id"],
            first_token_seconds=30,
            between_tokens_seconds=10,
            timeout_seconds=300,
        ).with_exception_handling()
    )
    return texts, failures


def test_the_example_of_the_documentation(server: LocalTriton) -> None:
    """Rows in and out, a parameter of a column."""
    prompts = [Prompt(1, "tick", 3), Prompt(2, "tock", None)]
    run = pipelines.run(lambda pipeline: texts_of(pipeline, server.endpoint, prompts))
    assert not run.failures
    assert sorted((row.id, row.text_output) for row in run.results) == [(1, "tick tick tick"), (2, "tock")]


def test_many_texts_with_default_options(server: LocalTriton) -> None:
    """Each element has its own text, whatever its length, beside its key."""
    elements = [(number, " ".join(["word"] * number)) for number in range(40)]
    run = generate(server, *elements)
    assert not run.failures
    assert {key: result.inference["text_output"] for key, result in run.results} == dict(elements)
    assert run.counters["tokens"] == sum(range(40))


def test_a_result_for_each_chunk(server: LocalTriton) -> None:
    """With index, version and the model's other outputs."""
    run = generate(server, TALE, stream=True)
    assert [result.inference["text_output"] for result in run.results] == CHUNKS
    assert [result.inference["index"] for result in run.results] == [0, 1, 2, 3]
    assert [result.inference["length"] for result in run.results] == [4, 4, 1, 4]
    assert {result.model_id for result in run.results} == {"storyteller:1"}


def test_generate_takes_exactly_one_answer(server: LocalTriton) -> None:
    """Which the server says with the status 200."""
    run = generate(server, TALE, api="generate", parameters={"stream": False})
    assert run.results[0].inference["text_output"] == TALE
    ((_, (kind, message, _)),) = generate(server, TALE, api="generate").failures
    assert kind is InferenceError and 'Leave api="generate" out' in message


def test_a_model_that_is_not_decoupled(server: LocalTriton) -> None:
    """Its one answer is a stream of one event; its names are other ones."""
    run = generate(server, "hi", model="shout", prompt_field="text", output_field="loud")
    assert run.results[0].inference == {"loud": "HI", "length_bytes": 2}


def test_an_error_in_mid_stream_carries_what_came_before(server: LocalTriton) -> None:
    """An error before the first answer has its status instead."""
    run = generate(server, {"text_input": TALE, "n": 2}, TALE, parameters={"fail_after": lambda _: 2})
    for _, (kind, message, _) in run.failures:
        assert kind is ModelExecutionError
        assert "the story ended at word 2; the text before it: 'once upon'" in message
    assert len(run.failures) == 2
    ((_, (kind, message, _)),) = generate(server, TALE, parameters={"fail_after": 0}).failures
    assert kind is InvalidRequestError and "the story ended at word 0" in message


def test_deadlines_cancel_the_generation(server: LocalTriton) -> None:
    """The failed element says which one; the server ends its work and takes the next request."""
    run = generate(server, TALE, parameters={"pause_ms": 300}, between_tokens_seconds=0.1)
    ((_, (_, message, _)),) = run.failures
    assert "between_tokens_seconds=0.1 after 1 of them; the text before it: 'once'" in message
    assert len(generate(server, TALE).results) == 1


def test_streams_share_the_instances(server: LocalTriton) -> None:
    """Sixteen texts of 0.4 s on four instances, from one thread."""
    started = time.monotonic()
    run = generate(server, *[TALE] * 16, parameters={"pause_ms": 100})
    assert len(run.results) == 16
    assert time.monotonic() - started < 16 * 0.4 / 2
    assert run.distributions["tokens_per_second"].mean <= 11


def test_an_unknown_model_is_said_at_setup(server: LocalTriton) -> None:
    """With the models that there are."""
    with pytest.raises(ModelNotFoundError, match="storyteller"):
        TritonGenerateDoFn(server.endpoint, "story").setup()


def test_a_server_that_dies_and_comes_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Texts that had begun fail with what came; the others wait for it. Nothing is generated twice."""
    repository = write_models(tmp_path_factory.mktemp("models"), ["storyteller"])
    with throwaway_triton(repository) as server:

        def kill_and_restart() -> None:
            server.kill()
            server.restart()

        killer = threading.Timer(1.0, kill_and_restart)
        dofn = TritonGenerateDoFn(
            server.endpoint, "storyteller", parameters={"pause_ms": 100}, with_exception_handling=True
        )
        with pipelines.bundle_of(dofn):
            killer.start()
            elements = [beam.transforms.window.GlobalWindows.windowed_value((n, TALE)) for n in range(8)]
            outputs = [output for each in elements for output in dofn.process(each.value, each)]
            outputs += dofn.finish_bundle()
            killer.join()
    failures = [each.value.value for each in outputs if isinstance(each, beam.pvalue.TaggedOutput)]
    results = [each.value for each in outputs if not isinstance(each, beam.pvalue.TaggedOutput)]
    assert len(failures) + len(results) == 8 and 1 <= len(failures) <= 4
    for _, (kind, message, _) in failures:
        assert issubclass(kind, TransportError) and "the text before it: 'once" in message
    assert {result.inference["text_output"] for _, result in results} == {TALE}
