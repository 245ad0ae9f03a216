"""The arguments that commands share, and how they explain errors on a terminal."""

from __future__ import annotations

import argparse
import re
from typing import Any

from beam_triton.credentials import is_reference
from beam_triton.errors import (
    ConfigurationError,
    ConnectError,
    InferenceError,
    RemoteProtocolError,
    TlsError,
    TritonError,
)
from beam_triton.flags import Spelling, with_texts, with_values

# A person waits for the answer.
_TIMEOUT_SECONDS = 10.0

FLAGS = Spelling(
    {
        "auth_token": "--auth-token",
        "tls_ca_bundle": "--ca-bundle",
        "timeout_seconds": "--timeout-seconds",
        "model_version": "--model-version",
        "outputs": "--outputs",
        "batching_max_batch_size": "--max-batch-size",
    }
)
"""Options of `InferenceOptions`, as the commands spell them."""


def add_server(parser: argparse.ArgumentParser, *, as_option: bool = False) -> None:
    """Add the arguments that say where the server is, which may be left out ``as_option``, and how to reach
    it."""
    name, metavar = ("--endpoint", "URL") if as_option else ("endpoint", "ENDPOINT")
    parser.add_argument(name, metavar=metavar, help="URL of the server, such as http://triton:8000")
    FLAGS.add_to(parser, "auth_token")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a header field for every request; VALUE may be env:NAME or file:PATH; may be repeated",
    )
    FLAGS.add_to(parser, "tls_ca_bundle")
    FLAGS.add_to(parser, "timeout_seconds", default=_TIMEOUT_SECONDS)


def add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the arguments that name the model and the shapes of what is sent to it."""
    parser.add_argument("--model", required=required, metavar="NAME", help="the model")
    FLAGS.add_to(parser, "model_version")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="INPUT=SIZES",
        help="shape of an input without the batch dimension, such as image=3,224,224, where the model "
        "leaves sizes open (default: 1 for each); may be repeated",
    )
    parser.add_argument(
        "--inputs",
        metavar="FILE",
        help="send these elements instead of zeros: .json or .jsonl (input name to value, a line each), "
        ".parquet or .csv (a column for each input), .npz, .npy, or any other file as one BYTES value",
    )
    FLAGS.add_to(parser, "outputs")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the argument for every option that has none of its own."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="any other keyword argument of TritonInference, such as binary=false, "
        'input_parameters=\'{"text": {"content_type": "str"}}\', auth=google or auth=aws:eu-west-1; may be '
        "repeated",
    )


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a client that reports every failure at once, without retries.

    Raises:
        ConfigurationError: an argument makes no sense.
    """
    timeout_seconds = with_texts(FLAGS.values(given), given.option).get("timeout_seconds")
    # A person waits for the answer.
    impatient: dict[str, Any] = {
        "retry": {"max_retries": 0},
        "circuit_breaker": None,
        "headers": dict(_header(text) for text in given.header) or None,
    }
    if isinstance(timeout_seconds, int | float):
        impatient["pool"] = {"connect_timeout_seconds": min(5.0, timeout_seconds / 2)}
    return with_texts(with_values(impatient, FLAGS.values(given)), given.option)


def given_options_of(given: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that the user gave, as plain data: ``auth`` is its text.

    They are printed: a header's value and a proxy's password that were given as text are left out, for the
    name of an environment variable.
    """
    values = FLAGS.values(given)
    if values.get("timeout_seconds") == _TIMEOUT_SECONDS:
        values.pop("timeout_seconds")
    # What tries sizes has this argument for the largest of them.
    values.pop("batching_max_batch_size", None)
    auth = [text.partition("=")[::2] for text in given.option if text.startswith("auth=")]
    headers = dict(_header(text) for text in given.header)
    others = [text for text in given.option if not text.startswith("auth=")]
    options = with_texts(with_values({"headers": headers} if headers else {}, values), others)
    if options.get("headers"):
        options["headers"] = {name: _reference(text, name) for name, text in options["headers"].items()}
    for key, url in (options.get("proxies") or {}).items():
        if "@" in (url or ""):
            options["proxies"] = {**options["proxies"], key: _reference(url, f"{key}_proxy")}
    return {**options, **dict(auth)}


def shapes_of(given: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """One element's shape of each input whose shape the user gave.

    Raises:
        ConfigurationError: one is not ``INPUT=SIZE,SIZE,…``.
    """
    shapes = {}
    for text in given.shape:
        name, separator, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.split(",") if size.strip())
        except ValueError:
            shape = (-1,)
        if not separator or not name or min(shape, default=0) < 0:
            raise ConfigurationError(f"--shape {text!r}: give it as INPUT=3,224,224")
        shapes[name] = shape
    return shapes


def explained(error: TritonError) -> str:
    """An error's message, and what a person at a terminal may do about it."""
    hint = ""
    if isinstance(error, TlsError):
        if "tls.ca_bundle" in error.message:
            hint = "Here, --ca-bundle names it."
        elif "certificate is refused" not in error.message:
            hint = "Does the server speak TLS at this port?"
    elif isinstance(error, ConnectError):
        hint = "Is the server running, and is this its HTTP port (Triton's is 8000 by default)?"
    elif isinstance(error, RemoteProtocolError) and error.is_foreign:
        hint = "Is this the HTTP port? By default, Triton's gRPC port is 8001 and its metrics port 8002."
    elif isinstance(error, InferenceError) and error.status in (401, 403):
        hint = "Give this server's credentials with --auth-token env:NAME or --header NAME=env:NAME."
    return f"{error}. {hint}" if hint else str(error)


def _reference(secret: str, name: str) -> str:
    return secret if is_reference(secret) else f"env:{re.sub('[^A-Z0-9]', '_', name.upper())}"


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigurationError("--header takes NAME=VALUE")
    return name.strip(), value.strip()
