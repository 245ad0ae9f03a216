"""Error answers: the messages are those of a real Triton 2.51, taken from its answers."""

from __future__ import annotations

import json
import pickle
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import (
    InferenceError,
    InvalidRequestError,
    ModelExecutionError,
    ModelNotFoundError,
    ModelNotReadyError,
    ServerOverloadedError,
    ServerUnavailableError,
)
from beam_triton.protocol.status import error_from_response, parse_retry_after

NOON = datetime(2026, 1, 5, 12, 0, 0, tzinfo=timezone.utc)


def body(message: str) -> bytes:
    return json.dumps({"error": message}).encode()


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "inference input 'x' data-type is 'INT32', but model 'm' expects 'FP32'", InvalidRequestError),
        (400, "x is negative: -1.0", InvalidRequestError),
        (405, "Method Not Allowed", InvalidRequestError),
        (413, "", InvalidRequestError),
        (422, "", InvalidRequestError),
        (401, "", InferenceError),
        (403, "This API is restricted", InferenceError),
        (404, "Request for unknown model: 'm' is not found", ModelNotFoundError),
        (404, "Request for unknown model: 'm' version 9 is not found", ModelNotFoundError),
        (400, "Request for unknown model: 'm' is not found", ModelNotFoundError),
        (404, "Not Found", ModelNotFoundError),
        (404, "Request for unknown model: 'm' has no available versions", ModelNotReadyError),
        (400, "Request for unknown model: 'm' has no available versions", ModelNotReadyError),
        (503, "Request for unknown model: 'm' version 1 is not at ready state", ModelNotReadyError),
        (400, "Model m is not ready yet.", ModelNotReadyError),  # MLServer, kserve/kserve issue 2882
        (503, "Model with name m is not ready.", ModelNotReadyError),  # KServe's own server
        (408, "", ServerOverloadedError),
        (429, "slow down", ServerOverloadedError),
        (503, "[request id: <id_unknown>] Exceeds maximum queue size", ServerOverloadedError),
        (503, "Request timeout expired", ServerOverloadedError),
        (502, "", ServerUnavailableError),
        (503, "x is negative: -1.0", ServerUnavailableError),
        (504, "", ServerUnavailableError),
        (500, "failed to parse the request JSON buffer: Invalid value. at 10", InvalidRequestError),
        (500, "failed to get request params.: attempt to get members for non-object", InvalidRequestError),
        (500, "Unable to parse 'data': Shape does not match true shape of 'data' field", InvalidRequestError),
        (500, "Unable to parse 'priority': attempt to access JSON non-unsigned-integer", InvalidRequestError),
        (500, "Unable to parse JSON bytes array: attempt to access JSON non-string", InvalidRequestError),
        (500, "Unable to set 'classification': attempt to access JSON non-unsigned", InvalidRequestError),
        (500, "Failed to process the request(s) for model 'm_0_0', message: Unable to parse 'data'",
         ModelExecutionError),
        (500, "", ModelExecutionError),
        (501, "HTTP end point doesn't support models with decoupled transaction policy", InferenceError),
        (501, "Unsupported compression type", InferenceError),
        (505, "", InferenceError),
        (302, "", InferenceError),
        (204, "", InferenceError),
    ],
)  # fmt: skip
def test_status_and_message_give_the_error_class(
    status: int, message: str, kind: type[InferenceError]
) -> None:
    """The class alone determines what happens next."""
    error = error_from_response(status, body(message), model_name="m")
    assert type(error) is kind
    assert error.status == status and error.server_message == message and error.model_name == "m"
    assert str(status) in str(error) and message in str(error)


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        (b'<?xml version="1.0" ?>\n<html><h1>Unable to connect</h1></html>', ServerUnavailableError),
        (b"<!doctype html><h1>Internal Server Error</h1>", ModelExecutionError),
        (b"<html><h1>Internal Server Error</h1></html>", ModelExecutionError),
    ],
)
def test_500_with_the_page_of_tinyproxy_is_not_the_model_raising(
    page: bytes, kind: type[InferenceError]
) -> None:
    """Web frameworks answer with HTML when a model raises."""
    assert type(error_from_response(500, page, model_name="m")) is kind


def test_400_of_a_readiness_request_is_model_not_ready() -> None:
    """On the ready endpoints 400 means not ready, which is transient."""
    assert type(error_from_response(400, body("Model version not ready"), what="ready")) is ModelNotReadyError


def test_400_of_a_statistics_request_is_model_not_found() -> None:
    """Triton's message differs there."""
    error = error_from_response(400, body("requested model 'm' is not available"), what="statistics")
    assert type(error) is ModelNotFoundError


def test_500_of_other_requests_is_not_a_model_execution_error() -> None:
    """No model ran, so none raised."""
    assert type(error_from_response(500, b"", what="load")) is InferenceError


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", ""),
        (b'{"error": "queue\\u0007 full\\r\\n  now"}', "queue full now"),
        (b'{"detail": "not found"}', "not found"),
        (b'{"error": {"code": 5}}', '{"error": {"code": 5}}'),
        (b"<html>\n<h1>502 Bad Gateway</h1>\n</html>", "502 Bad Gateway"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 100_000, "[" * 499 + "..." + "[" * 498),
        (b"5", "5"),
    ],
)
def test_any_error_body_gives_one_short_line(answer: bytes, message: str) -> None:
    """JSON of several servers, a proxy's page, broken bytes: shown without control characters."""
    assert error_from_response(500, answer).server_message == message


@given(st.integers(100, 599), st.binary(max_size=300), st.text(max_size=30))
def test_any_answer_gives_an_error_that_pickles(status: int, answer: bytes, header: str) -> None:
    """Any status, body and Retry-After make an error that pickles and has one line of limited length."""
    error = error_from_response(status, answer, model_name="m", retry_after=header, location=header, now=NOON)
    assert isinstance(error, InferenceError)
    assert error.server_message.isprintable() and len(error.server_message) <= 1000
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, vars(copy)) == (type(error), error.args, vars(error))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("5", 5.0),
        (" 120 ", 120.0),
        ("0", 0.0),
        ("9" * 400, 1e9),
        ("1.5", None),
        ("-1", None),
        ("soon", None),
        ("²", None),
        ("Mon, 05 Jan 2026 12:00:30 GMT", 30.0),
        ("Mon, 05 Jan 2026 11:00:00 GMT", 0.0),
        ("Mon, 05 Jan 2026 12:00:30", 30.0),
        ("Mon, 99 Jan 2026 12:00:30 GMT", None),
    ],
)
def test_retry_after_may_be_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    """Both forms of the header, and None for anything that is neither."""
    assert parse_retry_after(header, NOON) == seconds
    assert error_from_response(503, b"", retry_after=header, now=NOON).retry_after_seconds == seconds


def test_a_retry_after_date_without_a_clock_is_ignored() -> None:
    """The codec has no clock of its own."""
    assert parse_retry_after("Mon, 05 Jan 2026 12:00:30 GMT") is None


def test_a_redirects_address_is_shown_without_credentials() -> None:
    """The address is shown, since it is not followed; its password and query are not."""
    error = error_from_response(301, b"", location="https://user:secret@host/v2?token=secret")
    assert "https://host/v2" in str(error) and "secret" not in str(error)
    assert not error.retryable


@pytest.mark.parametrize(
    ("status", "message", "may_have_changed"),
    [
        (
            400,
            "[request id: a] input 'x' data-type is 'FP32', but model 'm' expects 'FP64'",
            True,
        ),
        (400, "unexpected inference input 'x' for model 'm'", True),
        (400, "unexpected inference output 'y' for model 'm'", True),
        (
            400,
            "[request id: a] unexpected shape for input 'x' for model 'm'. Expected [-1,4], got [1,5]",
            True,
        ),
        (400, "[request id: a] inference request batch-size must be <= 16 for 'm'", True),
        (
            400,
            "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['x'], but missing ['z']",
            True,
        ),
        (400, "x is negative: -1.0", False),
        (400, "request has size 67108865 > 67108864 limit", False),
        (500, "Failed to process the request(s) for model 'm', message: ValueError: unexpected input", False),
        (413, "<html>Request Entity Too Large</html>", False),
        (503, "Exceeds maximum queue size", False),
    ],
)
def test_refusals_that_may_mean_another_model(status: int, message: str, may_have_changed: bool) -> None:
    """Names, datatypes, shapes, numbers of inputs and batch limits; not what a model says of values."""
    body = json.dumps({"error": message}).encode()
    assert error_from_response(status, body, model_name="m").model_may_have_changed is may_have_changed


def test_the_reason_at_the_end_of_a_traceback_is_kept() -> None:
    """PyTriton's messages end with it."""
    message = (
        "Traceback (most recent call last)\n" + "  File x, line 1\n" * 500 + "ValueError: I do not like this"
    )
    error = error_from_response(500, json.dumps({"error": message}).encode(), model_name="m")
    assert error.server_message.startswith("Traceback")
    assert error.server_message.endswith("ValueError: I do not like this")
    huge = b'{"error": "head ' + b"x" * 200_000 + b' tail"}'
    assert error_from_response(500, huge).server_message.endswith("xx tail")


def test_a_page_is_cut_to_its_title_and_text() -> None:
    """Of a proxy or a web framework."""
    page = b"""<!DOCTYPE html><html lang="en"><head><title>404 Not Found</title><style>p {color: red}</style>
    </head><body><h1>Oops</h1><p>No page &quot;here&quot;</p><script>alert(1)</script></body></html>"""
    assert error_from_response(404, page).server_message == '404 Not Found: Oops No page "here"'
    assert len(error_from_response(502, b"<html><body>" + b"<p>text</p>" * 10**4).server_message) <= 200


def test_a_server_that_names_the_model_is_one_of_the_protocol() -> None:
    """The hint at a wrong address is for others."""
    known = error_from_response(
        404, b'{"error": "Model nosuch not found"}', model_name="nosuch", what="metadata"
    )
    assert "is this the address" not in known.message
    other = error_from_response(404, b'{"detail": "Not Found"}', model_name="nosuch", what="metadata")
    assert "is this the address of a server of the Open Inference Protocol?" in other.message
