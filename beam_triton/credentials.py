"""Secrets: named where the pipeline is built, read where it runs, shown nowhere.

A secret is given as

- a callable without arguments, called at each use, so it may return renewed secrets;
- ``"env:NAME"``, an environment variable of the worker;
- ``"file:PATH"``, a file on the worker, read at each use, so a rotated secret is picked up;
- any other string: the secret itself, which then travels in the pickled pipeline.

No error of this module shows a secret's value or keeps a reference to it.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias
from urllib.parse import SplitResult, unquote

from beam_triton.errors import ConfigurationError

Secret: TypeAlias = str | Callable[[], str]

REDACTED = "***"

_ENVIRONMENT = "env:"
_FILE = "file:"

# No secret is longer: the path names another file, or a device without an end.
_MAX_FILE_BYTES = 64 * 1024

# RFC 9110, section 5.6.2 (token) and 5.5 (field-value).
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REFUSED_IN_HEADER_VALUE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")

# The headers that the library writes itself.
LIBRARY_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "host",
        "inference-header-content-length",
        "transfer-encoding",
        "x-vertex-ai-triton-redirect",
    }
)
# Headers that carry no secret of the user's; every other one may, whatever its name.
_SHOWN_HEADERS = LIBRARY_HEADERS | {"accept", "date", "retry-after", "server", "user-agent"}


def check_reference(secret: object, what: str = "the secret") -> None:
    """Check that ``secret`` has the form of a secret, without reading or calling anything.

    Raises `ConfigurationError`, naming the option ``what``.
    """
    if callable(secret):
        return
    if not isinstance(secret, str):
        raise ConfigurationError(
            f"{what} must be a string, a callable, 'env:NAME' or 'file:PATH', not a {type(secret).__name__}"
        )
    if secret.startswith(_ENVIRONMENT):
        name = secret.removeprefix(_ENVIRONMENT)
        if not name or "=" in name or "\0" in name:
            raise ConfigurationError(f"{what}: 'env:' needs the name of an environment variable after it")
    elif secret.startswith(_FILE):
        path = secret.removeprefix(_FILE)
        if not path or "\0" in path:
            raise ConfigurationError(f"{what}: 'file:' needs a path after it")
    else:
        _check_value(secret, what)


def is_reference(secret: Secret) -> bool:
    """Whether ``secret`` says where the value is, and is not the value itself."""
    return callable(secret) or secret.startswith((_ENVIRONMENT, _FILE))


def resolve(secret: Secret, what: str = "the secret") -> str:
    """The secret's current value, which is valid in a header.

    Trailing line ends of variables, files and callables' results are removed. Raises `ConfigurationError` if
    the variable or file does not exist, the callable fails, or the value is empty or not valid in a header.
    """
    check_reference(secret, what)
    if callable(secret):
        value = _call(secret, what)
    elif secret.startswith(_ENVIRONMENT):
        name = secret.removeprefix(_ENVIRONMENT)
        if name not in os.environ:
            raise ConfigurationError(f"{what}: the environment variable {name} is not set on this worker")
        value = os.environ[name]
    elif secret.startswith(_FILE):
        value = _read_file(secret.removeprefix(_FILE), what)
    else:
        return secret
    value = value.rstrip("\r\n")
    _check_value(value, f"{what} ({describe(secret)})")
    return value


def describe(secret: Secret) -> str:
    """The source of the secret, for logs and display data: never its value."""
    if callable(secret):
        return f"callable {getattr(secret, '__name__', type(secret).__name__)}"
    return secret if is_reference(secret) else REDACTED


def check_header_name(name: object) -> None:
    """Check a header's name. Raises `ConfigurationError` if HTTP does not allow it."""
    if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
        raise ConfigurationError(
            f"header name {name!r} is not valid: letters, digits and !#$%&'*+.^_`|~- only, at least one"
        )


def redact_url(url: str) -> str:
    """The URL without user, password and query.

    Everything up to the last ``@`` is removed, even where a URL's grammar ends the password earlier: a
    password that should have been percent-encoded is still a password.
    """
    before, separator, after = url.partition("://")
    scheme, rest = (f"{before}://", after) if separator and before.isalnum() else ("", url)
    _, at, rest = rest.rpartition("@")
    rest, question_mark, _ = rest.partition("?")
    return scheme + (REDACTED + at if at else "") + rest + (question_mark + REDACTED if question_mark else "")


def basic_authorization(parts: SplitResult) -> str | None:
    """The header that a URL's user name and password make; None where it has no user name."""
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode("ascii")


def redact_headers(headers: Mapping[str, object]) -> dict[str, str]:
    """The headers, with the values hidden except of those that belong to the protocol."""
    return {
        name: str(value) if name.lower() in _SHOWN_HEADERS else REDACTED for name, value in headers.items()
    }


def _call(secret: Callable[[], str], what: str) -> str:
    raised = ""
    try:
        value = secret()
    except Exception as error:
        raised = type(error).__name__
    if raised:
        # Raised outside the handler: as its context, the other error could carry the secret in its message.
        raise ConfigurationError(f"{what}: {describe(secret)} raised {raised}")
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{what}: {describe(secret)} returned a {type(value).__name__}, not a string"
        )
    return value


def _read_file(path: str, what: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(
            f"{what}: the file {path} cannot be read on this worker: {error.strerror}"
        ) from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigurationError(f"{what}: the file {path} is longer than {_MAX_FILE_BYTES} bytes")
    # latin-1 decodes every byte; _check_value decides whether the value is valid in a header.
    return content.decode("latin-1")


def _check_value(value: str, what: str) -> None:
    if not value.strip():
        raise ConfigurationError(f"{what} is empty")
    if _REFUSED_IN_HEADER_VALUE.search(value):
        raise ConfigurationError(
            f"{what} holds a line end, another control character or one beyond latin-1 "
            "(the value is not shown)"
        )
