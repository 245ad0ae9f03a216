"""An error answer to an error class, by status and message together.

The status alone misleads: Triton answers malformed requests with 500, a model between two versions with
404, a full queue and a stopping server both with 503. The messages are those of Triton 2.51; the bodies of
a proxy in front are shown but not relied on.
"""

from __future__ import annotations

import html
import json
import re
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from beam_triton.errors import (
    InferenceError,
    InvalidRequestError,
    ModelExecutionError,
    ModelNotFoundError,
    ModelNotReadyError,
    SequenceLostError,
    ServerOverloadedError,
    ServerUnavailableError,
    SharedMemoryError,
)
from beam_triton.protocol.text import printable

_CREDENTIALS = re.compile(r"//[^/?#]*@")
_MESSAGE_CHARACTERS = 1000
_PAGE_CHARACTERS = 200
_BODY_BYTES = 64 * 1024

# The page of a proxy or a web framework; what people do not see of it, and the marks around what they do.
_HTML = re.compile(r"\s*(<\?xml[^>]*>\s*)?<(!doctype html|html|head|body)\b", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>([^<]*)</title>", re.IGNORECASE)
_UNSEEN = re.compile(r"<(head|script|style)\b.*?(</\1>|$)|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_MARKUP = re.compile(r"<[^>]*>")

# How Triton's messages begin for a 500 that a retry cannot fix. An exception of a model's own code cannot
# look like it: Triton puts "Failed to process the request(s) for model" before its text.
_MALFORMED = (
    "failed to parse the request JSON buffer",
    "failed to get request params",
    "Unable to parse '",
    "Unable to parse JSON",
    "Unable to set '",
    "attempt to access ",
    "attempt to get ",
)
# What a request is told that was right for the model of another day. The words are Triton's; other servers
# name the same things.
_OTHER_MODEL = re.compile(
    r"\b(input|output|inputs|outputs)\b.*\b(unexpected|unknown|missing|required|expect\w*|data-?type|dtype|shape)"
    r"|\b(unexpected|unknown|missing|required|expect\w*)\b.*\b(input|output|inputs|outputs|data-?type|shape)\b"
    r"|\bbatch-?\s?size\b",
    re.IGNORECASE,
)
# tinyproxy answers 500 with a page of XHTML for a server that it cannot reach. Frameworks whose model raises
# may answer it with HTML.
_XHTML = re.compile(rb"\s*<\?xml", re.IGNORECASE)
_OVERLOADED = ("Exceeds maximum queue size", "Request timeout expired")
_NO_SEQUENCE = "must specify the START flag on the first request of the sequence"
NO_SUCH_REGION = "Unable to find shared memory region"
# A region that is not registered, and an output that is larger than its place. Other words stand before a
# model's own text.
_SHARED_MEMORY = (NO_SUCH_REGION, "shared memory size specified with the request")
_UNKNOWN_MODEL = "Request for unknown model"
_NOT_READY = ("has no available versions", "is not at ready state")
# What MLServer (400 "Model m is not ready yet.") and KServe's server (503 "Model with name m is not ready.")
# answer while the model is loading.
_LOADING = re.compile(r"^Model .* is not ready\b")


def error_from_response(
    status: int,
    body: bytes | bytearray | memoryview,
    *,
    model_name: str = "",
    what: str = "infer",
    retry_after: str | None = None,
    location: str | None = None,
    now: datetime | None = None,
) -> InferenceError:
    """The error for an answer whose status is not 200; returned, not raised.

    ``what`` names the request in the message; for ``infer``, ``ready`` and ``statistics`` it also decides
    the meaning of some answers. ``retry_after`` and ``location`` are the headers of that name. ``now``
    turns a ``Retry-After`` date into seconds; without it a date is ignored. ``server_message`` of the error
    is the server's message on one line, of 1,000 characters at most: its head and its tail. Of an HTML page
    it is the title and the text.
    """
    server_message = _server_message(body)
    kind, hint = _classify(status, server_message, what)
    if status == 500 and _XHTML.match(body):
        kind = ServerUnavailableError
    if model_name and model_name in server_message:
        # A server that knows what a model is.
        hint = hint if status in (401, 403, 407) else ""
    if 300 <= status < 400 and location:
        # A password or token in the address must not reach a log.
        address = _CREDENTIALS.sub("//", location).split("?")[0]
        hint = f"redirected to {printable(address, 200)}, which is not followed: use it as endpoint"
        if status in (301, 302, 303) and what == "infer":
            hint += f". A {status} makes a GET of a request; 307 and 308 keep it"
    about = f"{what} of model {model_name!r}" if model_name else what
    reason = server_message or "no message"
    message = f"{about}: the server answered {status}: {reason}{f' ({hint})' if hint else ''}"
    error = kind(
        message,
        status=status,
        server_message=server_message,
        model_name=model_name,
        retry_after_seconds=parse_retry_after(retry_after, now),
    )
    if kind is InvalidRequestError and what == "infer" and _OTHER_MODEL.search(server_message):
        error.model_may_have_changed = True
    return error


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds from a ``Retry-After`` header: a number of seconds, or an HTTP date if ``now`` is given.

    None if there is no header or it cannot be parsed; 0 for a date in the past.
    """
    text = value.strip() if value else ""
    if text.isascii() and text.isdigit():
        # Longer than any job runs; float() of a line of digits would be infinite.
        return float(min(int(text[:12]), 10**9))
    if not text or now is None:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    if now.tzinfo is None:
        now = now.replace(tzinfo=timezone.utc)
    return max(0.0, (date - now).total_seconds())


def _classify(status: int, message: str, what: str) -> tuple[type[InferenceError], str]:
    if status == 407:
        return InferenceError, "a proxy on the way asks for credentials: give them in its URL, see proxies"
    if status in (401, 403):
        return InferenceError, "check auth_token, headers and auth, and whether the server restricts this API"
    if message.startswith(_SHARED_MEMORY):
        return SharedMemoryError, ""
    if message.startswith(_UNKNOWN_MODEL) and status in (400, 404, 503):
        # 404 since Triton 2.42, 400 before; 503 where the request names the version that is not loaded.
        return (ModelNotReadyError if _says(message, _NOT_READY) else ModelNotFoundError), ""
    if status in (400, 404, 500, 503) and _LOADING.match(message):
        return ModelNotReadyError, ""
    if status == 404:
        return ModelNotFoundError, "is this the address of a server of the Open Inference Protocol?"
    if status in (408, 429) or (status == 503 and _says(message, _OVERLOADED)):
        return ServerOverloadedError, ""
    if status in (502, 503, 504):
        return ServerUnavailableError, ""
    if status == 400 and what == "ready":
        return ModelNotReadyError, ""
    if status == 400 and what == "statistics" and message.startswith("requested model"):
        return ModelNotFoundError, ""
    if status == 500 and what == "infer":
        return (InvalidRequestError if message.startswith(_MALFORMED) else ModelExecutionError), ""
    if 400 <= status < 500:
        return (SequenceLostError if _NO_SEQUENCE in message else InvalidRequestError), ""
    return InferenceError, ""


def _text_of_html(page: str) -> str:
    """The title and the text of a page, without its markup."""
    title = _TITLE.search(page)
    text = html.unescape(_MARKUP.sub(" ", _UNSEEN.sub(" ", page)))
    return f"{html.unescape(title[1])}: {text}" if title else text


def _says(message: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in message for phrase in phrases)


def _server_message(body: bytes | bytearray | memoryview) -> str:
    view = memoryview(body).cast("B")
    if len(view) <= _BODY_BYTES:
        text = bytes(view).decode("utf-8", "replace")
    else:
        ends = (view[: _BODY_BYTES // 2], view[-_BODY_BYTES // 2 :])
        text = " ".join(bytes(end).decode("utf-8", "replace") for end in ends)
    if _HTML.match(text):
        return printable(_text_of_html(text), _PAGE_CHARACTERS)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return printable(text, _MESSAGE_CHARACTERS)
    if isinstance(document, dict):
        error = document.get("error")
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            # Google's fronts wrap what the server said.
            message = str(error["message"])
            return (
                _server_message(message.encode())
                if message.startswith("{")
                else printable(message, _MESSAGE_CHARACTERS)
            )
        # "detail" is FastAPI's, and so MLServer's and KServe's.
        for key in ("error", "detail", "message"):
            if isinstance(document.get(key), str):
                return printable(document[key], _MESSAGE_CHARACTERS)
    return printable(text, _MESSAGE_CHARACTERS)
