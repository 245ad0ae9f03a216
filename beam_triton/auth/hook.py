"""The hook that sees every request before it is sent: ``auth=``, as in requests.

It is called for each attempt, because a signature may hold the time, and gets what is sent: the method, the
whole URL, the header fields and the body as bytes. Only header fields, the path and the query are its to
change: the library has counted the bytes of the body, and has chosen the server.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from requests import PreparedRequest
from requests.auth import AuthBase, HTTPDigestAuth
from requests.structures import CaseInsensitiveDict

from beam_triton.credentials import LIBRARY_HEADERS, check_header_name
from beam_triton.errors import ConfigurationError, TritonError

AuthFunction: TypeAlias = Callable[[str, str, dict[str, str], bytes], Mapping[str, str]]
Auth: TypeAlias = AuthBase | AuthFunction
"""A `requests.auth.AuthBase`, or a callable that takes method, URL, header fields and body, and returns the
header fields to add or to replace."""

Buffer = bytes | bytearray | memoryview


class Authorized(NamedTuple):
    """What ``auth`` made of a request: its target (path and query), and all its header fields."""

    target: str
    headers: dict[str, str]


def check_auth(auth: object) -> None:
    """Check that ``auth`` is one, without calling it. Raises `ConfigurationError`."""
    if isinstance(auth, HTTPDigestAuth):
        raise ConfigurationError(
            "auth: HTTPDigestAuth answers a challenge of the server, for which a request is sent twice; "
            "use a scheme that signs each request by itself, or put a proxy in front that does this"
        )
    if callable(auth) and not isinstance(auth, type):
        return
    hint = f"not a {type(auth).__name__}"
    if isinstance(auth, type):
        hint = f"not the class {auth.__name__}: give an object of it"
    elif isinstance(auth, tuple | list):
        hint += "; for a user and a password give requests.auth.HTTPBasicAuth(user, password)"
    elif isinstance(auth, str):
        hint += "; for a bearer token give auth_token"
    raise ConfigurationError(
        f"auth must be a requests.auth.AuthBase, or a callable that takes method, URL, headers and body and "
        f"returns header fields, {hint}"
    )


def describe_auth(auth: Auth) -> str:
    """The name of ``auth``, for display data and errors; never its values."""
    return getattr(auth, "__name__", type(auth).__name__)


def renew(auth: Auth) -> None:
    """Have ``auth`` replace a token that it keeps, where it can: a server has refused it."""
    method = getattr(auth, "renew", None)
    if callable(method):
        method()


def authorized(
    auth: Auth,
    method: str,
    base_url: str,
    target: str,
    headers: Mapping[str, str],
    body: Sequence[Buffer] = (),
) -> Authorized:
    """The request as ``auth`` wants it sent to ``base_url`` (scheme, host and port) at ``target``.

    Raises:
        ConfigurationError: ``auth`` failed, or changed what it must not. Nothing that it said is repeated,
            for it may hold a secret; the place is.
        TritonError: that ``auth`` raised itself.
    """
    what = f"auth ({describe_auth(auth)})"
    # A signer wants bytes, and the parts of a body may be views of several arrays.
    content = body[0] if len(body) == 1 and isinstance(body[0], bytes) else b"".join(body)
    given = dict(headers)
    raised, place = "", ""
    try:
        if isinstance(auth, AuthBase):
            changed_target, fields = _by_requests(auth, what, method, base_url, target, given, content)
        else:
            added = auth(method, base_url + target, dict(given), content)
            if not isinstance(added, Mapping):
                raise ConfigurationError(
                    f"{what} returned a {type(added).__name__}, and must return the header fields to add, "
                    f"as a dict"
                )
            changed_target, fields = target, _merged(given, added)
    except TritonError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raised, place = type(error).__name__, f"{frame.filename}:{frame.lineno}"
    if raised:
        # Raised outside the handler: as its context, the other error could carry a secret in its message.
        raise ConfigurationError(f"{what} raised {raised} at {place}")
    _check_fields(what, given, fields)
    return Authorized(changed_target, fields)


def _by_requests(
    auth: AuthBase,
    what: str,
    method: str,
    base_url: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes,
) -> tuple[str, dict[str, str]]:
    request = PreparedRequest()
    request.method, request.url = method, base_url + target
    request.headers = CaseInsensitiveDict(headers)
    request.body = body or None
    request.hooks = {"response": []}
    request = auth(request)
    if not isinstance(request, PreparedRequest):
        raise ConfigurationError(
            f"{what} returned a {type(request).__name__}, and must return the request that it was given"
        )
    if request.hooks.get("response"):
        raise ConfigurationError(
            f"{what} waits for the server's answer to send the request again, which is not supported: use a "
            f"scheme that signs each request by itself"
        )
    if (request.body or b"") != body or request.method != method:
        raise ConfigurationError(f"{what} changed the request's body or method: it may change header fields")
    url = request.url or ""
    changed = request.path_url
    if url != base_url + target and not url.startswith((f"{base_url}/", f"{base_url}?")):
        raise ConfigurationError(
            f"{what} changed the request's host: it may change header fields, the path and the query"
        )
    fields = {
        name: value.decode("latin-1") if isinstance(value, bytes) else value
        for name, value in request.headers.items()
    }
    return (changed if url != base_url + target else target), fields


def _merged(headers: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    replaced = {name.lower() for name in added if isinstance(name, str)}
    kept = {name: value for name, value in headers.items() if name.lower() not in replaced}
    return {**kept, **added}


def _check_fields(what: str, given: Mapping[str, str], fields: Mapping[str, str]) -> None:
    own = {name.lower(): value for name, value in given.items() if name.lower() in LIBRARY_HEADERS}
    for name, value in fields.items():
        check_header_name(name)
        if not isinstance(value, str):
            raise ConfigurationError(
                f"{what}: the header {name} is a {type(value).__name__}, and must be a string"
            )
        if not value.isprintable() or not value.isascii():
            raise ConfigurationError(
                f"{what}: the header {name} holds a line end, another control character or one beyond ASCII "
                f"(the value is not shown)"
            )
    kept = {name.lower(): value for name, value in fields.items() if name.lower() in LIBRARY_HEADERS}
    if kept != own:
        changed = sorted(name for name in own.keys() | kept.keys() if own.get(name) != kept.get(name))
        raise ConfigurationError(
            f"{what} changed {', '.join(changed)}, which the library sets: leave these header fields as they "
            f"were given"
        )
