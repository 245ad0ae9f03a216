"""The hierarchy of errors: attributes, messages and pickling."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from beam_triton import errors
from beam_triton.errors import (
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    InferenceError,
    LocalProtocolError,
    ModelExecutionError,
    ServerOverloadedError,
    TritonError,
)

HIERARCHY = sorted(
    (
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, TritonError) and member.__module__ == errors.__name__
    ),
    key=lambda error: error.__name__,
)

DECISIONS = ("retryable", "may_have_run", "splits_batch", "counts_as_failure", "is_overload")


def complete(error_class: type[TritonError]) -> TritonError:
    """An error with no attribute of its class at the default."""
    earlier = (
        ConnectError("connection refused"),
        ServerOverloadedError("queue full", status=503, retry_after_seconds=2, attempts=(TritonError("a"),)),
    )
    if issubclass(error_class, InferenceError):
        return error_class(
            "refused",
            status=418,
            server_message="short and stout",
            model_name="teapot",
            retry_after_seconds=1.5,
            attempts=earlier,
        )
    if issubclass(error_class, CircuitOpenError):
        return error_class("open", open_seconds_left=12.5, attempts=earlier)
    return error_class("went wrong", attempts=earlier)


def state(error: TritonError) -> tuple[object, ...]:
    """All attributes of an error and of its attempts."""
    own = {name: value for name, value in vars(error).items() if name != "attempts"}
    return type(error), error.args, own, tuple(state(attempt) for attempt in error.attempts)


@pytest.mark.parametrize("error_class", HIERARCHY)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_pickles_with_all_attributes(error_class: type[TritonError], protocol: int) -> None:
    """Attributes, message and earlier attempts cross a process boundary."""
    error = complete(error_class)
    arrived = pickle.loads(pickle.dumps(error, protocol))
    assert state(arrived) == state(error)
    assert str(arrived) == str(error)


@pytest.mark.parametrize("error_class", HIERARCHY)
def test_every_error_copies_with_all_attributes(error_class: type[TritonError]) -> None:
    """A copied error is the same error."""
    error = complete(error_class)
    assert state(copy.copy(error)) == state(error)
    assert state(copy.deepcopy(error)) == state(error)


@pytest.mark.parametrize("error_class", HIERARCHY)
def test_every_error_needs_nothing_but_a_message(error_class: type[TritonError]) -> None:
    """The message is the one positional argument, and without attempts it is the whole text."""
    error = error_class("it broke")
    assert str(error) == error.message == "it broke"
    assert error.attempts == ()
    assert error_class().message == ""


@pytest.mark.parametrize("error_class", HIERARCHY)
def test_every_error_has_a_docstring_and_all_decision_attributes(error_class: type[TritonError]) -> None:
    """Every class has its own docstring and a bool for each decision."""
    assert error_class.__doc__
    assert all(isinstance(getattr(error_class, name), bool) for name in DECISIONS)


@pytest.mark.parametrize("error_class", HIERARCHY)
def test_the_module_docstring_draws_every_error(error_class: type[TritonError]) -> None:
    """The hierarchy at the top of the module is complete."""
    assert f" {error_class.__name__} " in f"{errors.__doc__} ".replace("\n", " ")


def test_str_shows_the_last_three_attempts() -> None:
    """A long history is counted in full and shown in part."""
    earlier = tuple(ConnectError(f"attempt {n}") for n in range(1, 6))
    text = str(ConnectionLostError("reset", attempts=earlier))
    assert text == (
        "reset (after 5 earlier attempt(s): "
        "ConnectError: attempt 3; ConnectError: attempt 4; ConnectError: attempt 5)"
    )


def test_a_configuration_error_is_a_value_error() -> None:
    """Wrong options can be caught as Python's own error."""
    with pytest.raises(ValueError, match="wrong"):
        raise ConfigurationError("wrong")


@pytest.mark.parametrize("error_class", HIERARCHY)
def test_overload_and_local_errors_do_not_count_for_the_breaker(error_class: type[TritonError]) -> None:
    """An element's fault, an overload or a wrong option never counts against the server's health."""
    blameless = error_class.is_overload or issubclass(error_class, (ConfigurationError, LocalProtocolError))
    assert not (blameless and error_class.counts_as_failure)


def test_a_model_execution_error_is_retryable_and_splits_the_batch() -> None:
    """A plain 500 may be the server's fault or an element's, and counts for the breaker."""
    error = ModelExecutionError("the model raised", status=500)
    assert error.retryable and error.splits_batch and error.counts_as_failure and error.may_have_run


def test_text_ends_with_the_facts_of_the_request() -> None:
    """Endpoint, status, attempts and id, as far as they are known; nothing where no request was sent."""
    error: TritonError = ModelExecutionError("refused", status=500, attempts=(ConnectError("refused"),))
    assert str(error) == "refused (after 1 earlier attempt(s): ConnectError: refused)"
    error.endpoint, error.attempt_count, error.request_id = "http://triton:8000", 2, "abc-1"
    facts = "[endpoint=http://triton:8000 status=500 attempts=2 request_id=abc-1]"
    assert str(error) == f"refused (after 1 earlier attempt(s): ConnectError: refused) {facts}"
    assert error.message == "refused"
    assert str(errors.with_message(error, "element 7: refused")).endswith(facts)
    lost = ConnectionLostError("lost")
    lost.endpoint, lost.attempt_count = "http://triton:8000", 1
    assert str(lost) == "lost [endpoint=http://triton:8000 attempts=1]"
