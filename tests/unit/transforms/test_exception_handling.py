"""``with_exception_handling`` and its arguments, against a test double of the server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.pvalue import PCollection
from apache_beam.transforms.error_handling import CollectingErrorHandler
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.typehints import List, Tuple

from beam_triton import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    LocalProtocolError,
    ServerUnavailableError,
    TooManyFailuresError,
    TritonInference,
    TritonInferenceDoFn,
)
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.pipelines import run, score

ENDPOINT = "http://triton:8000"


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    if (inputs["x"] < -1).any():
        release.wait(20)
    if (inputs["x"] < 0).any():
        raise InvalidRequestError("x is negative", status=400)
    return {"y": 2 * inputs["x"]}


# Ends the model's waiting for elements below -1.
release = threading.Event()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    model = FakeModel(double, inputs={"x": ("FP32", [1])}, outputs={"y": ("FP32", [1])}, max_batch_size=4)
    with FakeTriton({"double": model}) as triton:
        yield triton.endpoint


def numbers(*values: float) -> list[Any]:
    return [np.array([value], np.float32) for value in values]


BAD_SHAPE = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_subprocess": True}, "the model runs on the server"),
        ({"threshold": 1.5}, "share of elements.*from 0 to 1, not 1.5"),
        ({"threshold": "0.1"}, "threshold"),
        ({"threshold_windowing": 60}, r"FixedWindows\(60\), not 60"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"exc_class": "ValueError"}, "exc_class"),
        ({"exc_class": ()}, "exc_class"),
        ({"on_failure_callback": "print"}, "on_failure_callback"),
        ({"main_tag": "bad"}, "both 'bad'"),
        ({"dead_letter_tag": ""}, "dead_letter_tag must be a name"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments: dict[str, Any], message: str) -> None:
    """At construction, with what to do."""
    with pytest.raises(ConfigurationError, match=message):
        TritonInference(ENDPOINT, "m").with_exception_handling(**arguments)


def test_timeout_that_contradicts_the_pool_is_refused() -> None:
    """A given pool may not take longer to connect than a request may take; the default one is fitted."""
    TritonInference(ENDPOINT, "m").with_exception_handling(timeout=1)
    transform = TritonInference(ENDPOINT, "m", pool={"connect_timeout_seconds": 5})
    with pytest.raises(ConfigurationError, match="connect_timeout_seconds=5"):
        transform.with_exception_handling(timeout=1)


def test_every_argument_of_beam_is_taken() -> None:
    """The arguments and their defaults are those of Beam's ParDo."""
    ours = TritonInference.with_exception_handling
    beams = beam.ParDo.with_exception_handling
    assert ours.__code__.co_varnames[: _count(ours)] == beams.__code__.co_varnames[: _count(beams)]
    assert ours.__defaults__ == beams.__defaults__
    assert ours.__kwdefaults__ == beams.__kwdefaults__


def _count(function: Any) -> int:
    return int(function.__code__.co_argcount + function.__code__.co_kwonlyargcount)


def test_outputs_are_a_pair_and_have_tags() -> None:
    """They unpack, and are found by Beam's tags or the user's."""
    elements = beam.Pipeline("FnApiRunner") | beam.Create([1])
    outputs = elements | "a" >> TritonInference(ENDPOINT, "m").with_exception_handling()
    results, failures = outputs
    assert isinstance(results, PCollection)
    assert outputs.good is outputs["good"] is outputs[0] is results
    assert outputs.bad is outputs["bad"] is outputs[1] is failures
    named = elements | "b" >> TritonInference(ENDPOINT, "m").with_exception_handling("scored", "lost")
    assert (named.scored, named["lost"]) == tuple(named)
    with pytest.raises(AttributeError, match="good"):
        _ = named.good


def test_dead_letters_have_the_type_of_beams_own() -> None:
    """``(element, (class, text, lines))``, with the element's own type."""
    elements = beam.Pipeline("FnApiRunner") | beam.Create(["text"])
    _, failures = elements | TritonInference(ENDPOINT, "m").with_exception_handling()
    assert failures.element_type == Tuple[str, Tuple[type, str, List[str]]]


def test_other_errors_than_exc_class_fail_the_bundle(endpoint: str) -> None:
    """Those of ``exc_class`` make dead letters; the first other one ends the job."""
    transform = TritonInference(endpoint, "double").with_exception_handling(exc_class=LocalProtocolError)
    outcome = score([BAD_SHAPE, *numbers(1)], transform)
    assert (len(outcome.results), len(outcome.failures)) == (1, 1)
    with pytest.raises(InvalidRequestError, match="x is negative"):
        score([BAD_SHAPE, *numbers(-1)], transform)
    both = (LocalProtocolError, InvalidRequestError)
    transform = TritonInference(endpoint, "double").with_exception_handling(exc_class=both)
    assert len(score([BAD_SHAPE, *numbers(-1)], transform).failures) == 2


_called: list[tuple[Exception, Any]] = []


def remember(error: Exception, element: Any) -> None:
    _called.append((error, element))
    if len(_called) == 1:
        raise RuntimeError("the callback is broken")


def test_callback_gets_each_failed_element_once(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    """It gets the exception itself and the whole element, key included; its own errors are logged."""
    _called.clear()
    elements = [("a", BAD_SHAPE), ("b", numbers(1)[0]), ("c", numbers(-1)[0])]
    transform = TritonInference(endpoint, "double").with_exception_handling(on_failure_callback=remember)
    outcome = score(elements, transform)
    assert len(outcome.failures) == 2
    assert {element[0]: type(error) for error, element in _called} == {
        "a": LocalProtocolError,
        "c": InvalidRequestError,
    }
    assert "on_failure_callback failed" in caplog.text and "the callback is broken" in caplog.text


@pytest.mark.parametrize("default", [{}, {"default_value": 0}])
def test_share_of_failures_above_the_threshold_fails_the_job(endpoint: str, default: dict[str, Any]) -> None:
    """2 of 8 elements are 25 %: a threshold of 0.25 allows them, one of 0.2 does not; defaults count."""
    elements = [BAD_SHAPE, *numbers(1, 2, 3, 4, 5, 6, -1)]
    allowed = TritonInference(endpoint, "double", **default).with_exception_handling(threshold=0.25)
    outcome = score(elements, allowed)
    assert len(outcome.results) + len(outcome.failures) == 8
    refused = TritonInference(endpoint, "double", **default).with_exception_handling(threshold=0.2)
    with pytest.raises(TooManyFailuresError, match=r"2 of 8 elements failed.*threshold=0\.2"):
        score(elements, refused)
    none = TritonInference(endpoint, "double", **default).with_exception_handling(threshold=0)
    assert len(score(numbers(1, 2), none).results) == 2
    assert issubclass(TooManyFailuresError, ValueError)


def test_keyed_defaults_count_towards_the_threshold(endpoint: str) -> None:
    """A key in front of a default value hides nothing."""
    transform = TritonInference(endpoint, "double", default_value=0).with_exception_handling(threshold=0.4)
    with pytest.raises(TooManyFailuresError, match="1 of 2 elements"):
        score([("a", BAD_SHAPE), ("b", numbers(1)[0])], transform)


def test_threshold_counts_by_window(endpoint: str) -> None:
    """Windows of the elements, or of ``threshold_windowing``."""
    # One failure among four elements, and half of the elements of its own window.
    given = [(0, BAD_SHAPE), (1, numbers(1)[0]), (10, numbers(2)[0]), (11, numbers(3)[0])]

    def build(pipeline: beam.Pipeline, **arguments: Any) -> Any:
        stamped = pipeline | beam.Create(given) | beam.Map(lambda each: TimestampedValue(each[1], each[0]))
        transform = TritonInference(endpoint, "double").with_exception_handling(threshold=0.3, **arguments)
        return stamped | transform

    assert len(run(build).results) == 3
    with pytest.raises(TooManyFailuresError, match="1 of 2 elements"):
        run(lambda pipeline: build(pipeline, threshold_windowing=FixedWindows(10)))


def test_element_that_takes_longer_than_timeout_is_a_dead_letter(endpoint: str) -> None:
    """``timeout`` is the request's deadline, and the error a TimeoutError, as for Beam."""
    transform = TritonInference(
        endpoint, "double", batching={"max_batch_size": 1}, circuit_breaker={"max_wait_seconds": 1}
    ).with_exception_handling(timeout=0.5)
    release.clear()
    try:
        outcome = score(numbers(1, -2), transform)
    finally:
        release.set()
    ((_, (kind, _, _)),) = outcome.failures
    assert issubclass(kind, DeadlineExceededError) and issubclass(kind, TimeoutError)
    assert len(outcome.results) == 1


@pytest.mark.parametrize("is_argument", [True, False])
def test_error_handler_takes_the_dead_letters(endpoint: str, is_argument: bool) -> None:
    """``error_handler=`` and ``with_error_handler`` are one, and take the other arguments."""

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = pipeline | beam.Create([BAD_SHAPE, *numbers(1, -1)], reshuffle=False)
        transform = TritonInference(endpoint, "double")
        with CollectingErrorHandler() as handler:
            if is_argument:
                transform.with_exception_handling(error_handler=handler, threshold=0.9)
            else:
                transform.with_error_handler(handler, threshold=0.9)
            results = elements | transform
        return {"results": results, "failures": handler.output()}

    outcome = run(build)
    assert (len(outcome.results), len(outcome.failures)) == (1, 2)


def test_partial_and_userstate_make_no_difference(endpoint: str) -> None:
    """An element has one result, and the transform no state."""
    transform = TritonInference(endpoint, "double").with_exception_handling(
        partial=True, allow_unsafe_userstate_in_process=True
    )
    outcome = score([BAD_SHAPE, *numbers(1)], transform)
    assert (len(outcome.results), len(outcome.failures)) == (1, 1)


def test_dead_letter_says_which_request_failed_where(endpoint: str) -> None:
    """The message ends with facts that can be parsed, and the exception has them; no password among them."""
    _called.clear()
    with_password = endpoint.replace("http://", "http://user:pa55word@")
    transform = TritonInference(with_password, "double").with_exception_handling(on_failure_callback=remember)
    outcome = score([BAD_SHAPE, *numbers(-1)], transform)
    errors = {type(error): error for error, _ in _called}
    messages = {kind: message for _, (kind, message, _) in outcome.failures}
    refused: Any = errors[InvalidRequestError]
    assert (refused.endpoint, refused.status, refused.attempt_count) == (endpoint, 400, 1)
    facts = f" [endpoint={endpoint} status=400 attempts=1 request_id={refused.request_id}]"
    assert messages[InvalidRequestError].endswith(facts)
    never_sent: Any = errors[LocalProtocolError]
    assert (never_sent.endpoint, never_sent.status, never_sent.attempt_count) == (None, None, 0)
    assert not messages[LocalProtocolError].endswith("]]") and "endpoint=" not in messages[LocalProtocolError]
    assert "pa55word" not in str(outcome.failures)


def test_dead_letter_counts_the_attempts() -> None:
    """A request that was tried again names the attempts, and the id under which all of them were made."""
    model = FakeModel(double, inputs={"x": ("FP32", [1])}, outputs={"y": ("FP32", [1])})
    with FakeTriton({"double": model}) as triton:
        triton.fail_next(3, status=503)
        transform = TritonInference(
            triton.endpoint, "double", retry={"max_retries": 2, "initial_backoff_seconds": 0.01}
        ).with_exception_handling()
        ((_, (kind, message, _)),) = score(numbers(1), transform).failures
        (request_id,) = {request.id for request in triton.requests}
        assert kind is ServerUnavailableError
        assert message.endswith(f"[endpoint={triton.endpoint} status=503 attempts=3 request_id={request_id}]")


def test_dofn_tags_its_own_failures(endpoint: str) -> None:
    """The bare DoFn has an output ``failures``."""

    def build(pipeline: beam.Pipeline) -> Any:
        dofn = TritonInferenceDoFn(endpoint, "double", with_exception_handling=True)
        elements = pipeline | beam.Create([BAD_SHAPE, *numbers(1)], reshuffle=False)
        outputs = elements | beam.ParDo(dofn).with_outputs("failures", main="results")
        return outputs.results, outputs.failures

    outcome = run(build)
    assert (len(outcome.results), len(outcome.failures)) == (1, 1)
