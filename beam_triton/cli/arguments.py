"""What both commands take, and how errors are explained on a terminal."""

from __future__ import annotations

import argparse
from typing import Any

from beam_triton.errors import (
    ConfigurationError,
    ConnectError,
    InferenceError,
    RemoteProtocolError,
    TlsError,
    TritonError,
)

_REFERENCES = ("env:", "file:")
_DEFAULT_TIMEOUT_SECONDS = 10.0


def add_server(parser: argparse.ArgumentParser) -> None:
    """The server, and how it is reached."""
    parser.add_argument("endpoint", metavar="ENDPOINT", help="its URL, such as http://triton:8000")
    parser.add_argument(
        "--auth-token",
        metavar="REFERENCE",
        help="a bearer token as env:NAME or file:PATH; the token itself would show in the process list",
    )
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a header field for every request; VALUE may be env:NAME or file:PATH; may be repeated",
    )
    parser.add_argument("--ca-bundle", metavar="PATH", help="authorities to trust, for https endpoints")
    parser.add_argument(
        "--timeout-seconds",
        type=float,
        default=_DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="deadline of a request (default: %(default)g)",
    )


def add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The model, and what is sent to it."""
    parser.add_argument("--model", required=required, metavar="NAME", help="the model")
    parser.add_argument("--model-version", metavar="N", help="its version (default: the server's choice)")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="INPUT=SIZES",
        help="an input's shape without the batch dimension, such as image=3,224,224, where the model "
        "leaves sizes open (1 by default); may be repeated",
    )


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a client that shows every failure at once, as it is.

    Raises:
        ConfigurationError: an argument makes no sense.
    """
    timeout_seconds = given.timeout_seconds
    options: dict[str, Any] = {
        "timeout_seconds": timeout_seconds,
        "pool": {"connect_timeout_seconds": min(5.0, timeout_seconds / 2)},
        "retry": {"max_retries": 0},
        "circuit_breaker": None,
        "headers": dict(_header(text) for text in given.header) or None,
        "auth_token": _reference(given.auth_token),
        "tls": {"ca_bundle": given.ca_bundle},
    }
    if getattr(given, "model_version", None) is not None:
        options["model_version"] = given.model_version
    return options


def shapes_of(given: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The shapes that the user gives, by input name.

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
        hint = "Is the endpoint https, and does --ca-bundle name the authority that signed its certificate?"
    elif isinstance(error, ConnectError):
        hint = "Is the server started, and is this its HTTP port (Triton's is 8000 unless changed)?"
    elif isinstance(error, RemoteProtocolError):
        hint = "Is this the HTTP port? Triton's others are 8001 (gRPC) and 8002 (metrics) unless changed."
    elif isinstance(error, InferenceError) and error.status in (401, 403):
        hint = "Give --auth-token env:NAME, or --header NAME=env:NAME, with what this server asks for."
    return f"{error}. {hint}" if hint else str(error)


def _reference(token: str | None) -> str | None:
    if token is not None and not token.startswith(_REFERENCES):
        # What was given is not repeated: it may be the token.
        raise ConfigurationError(
            "--auth-token takes a reference, env:NAME or file:PATH, not the token itself: "
            "everybody on this machine can read its command lines"
        )
    return token


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigurationError("--header takes NAME=VALUE")
    return name.strip(), value.strip()
