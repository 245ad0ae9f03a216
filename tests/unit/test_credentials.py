"""Secrets: read on the worker, renewed, and shown nowhere."""

from __future__ import annotations

import os
import pickle
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.credentials import (
    REDACTED,
    check_header_name,
    check_reference,
    describe,
    redact_headers,
    redact_url,
    resolve,
)
from beam_triton.errors import ConfigurationError

SECRET = "s3cr3t-t0ken"


def token() -> str:
    return SECRET


def test_a_plain_string_is_used_as_the_secret() -> None:
    """A string that is not a reference is returned unchanged."""
    assert resolve(SECRET, "auth_token") == SECRET


def test_an_environment_variable_is_read_at_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is that of the worker's environment at the time of use."""
    monkeypatch.setenv("TRITON_TOKEN", "first")
    assert resolve("env:TRITON_TOKEN") == "first"
    monkeypatch.setenv("TRITON_TOKEN", "second")
    assert resolve("env:TRITON_TOKEN") == "second"


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which option and which variable."""
    monkeypatch.delenv("TRITON_TOKEN", raising=False)
    with pytest.raises(ConfigurationError, match="auth_token: the environment variable TRITON_TOKEN is"):
        resolve("env:TRITON_TOKEN", "auth_token")


@pytest.mark.parametrize("line_end", ["", "\n", "\r\n", "\n\n"])
def test_a_file_is_read_without_its_line_end(tmp_path: Path, line_end: str) -> None:
    """Editors and `echo` end a file with a line end that is not part of the secret."""
    (tmp_path / "token").write_bytes(f"{SECRET}{line_end}".encode())
    assert resolve(f"file:{tmp_path / 'token'}") == SECRET


def test_a_rotated_file_is_read_again(tmp_path: Path) -> None:
    """A new secret of the same length and time stamp is seen, written in place or swapped by link."""
    path = tmp_path / "token"
    path.write_text("old-1")
    os.utime(path, ns=(1, 1))
    assert resolve(f"file:{path}") == "old-1"
    path.write_text("new-2")
    os.utime(path, ns=(1, 1))
    assert resolve(f"file:{path}") == "new-2"
    (tmp_path / "next").write_text("new-3")
    os.replace(tmp_path / "next", path)
    assert resolve(f"file:{path}") == "new-3"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The error says which option, which file, and what is wrong with it."""
    path = tmp_path / "nothing"
    with pytest.raises(ConfigurationError, match=f"auth_token: the file {path} .*No such file"):
        resolve(f"file:{path}", "auth_token")
    with pytest.raises(ConfigurationError, match="Is a directory"):
        resolve(f"file:{tmp_path}")


def test_an_endless_file_is_refused() -> None:
    """A device instead of a file neither hangs nor fills the memory."""
    with pytest.raises(ConfigurationError, match="/dev/zero is longer than 65536 bytes"):
        resolve("file:/dev/zero")


def test_a_callable_is_called_for_each_use() -> None:
    """A callable may return renewed secrets."""
    tokens = iter(["first", "second"])

    def renewing() -> str:
        return next(tokens)

    assert [resolve(renewing), resolve(renewing)] == ["first", "second"]


def test_a_callable_that_fails_is_named() -> None:
    """The error names the callable and the type of what it raised, and keeps no reference to that."""

    def broken() -> str:
        raise OSError(SECRET)

    with pytest.raises(ConfigurationError, match="auth_token: callable broken raised OSError") as e:
        resolve(broken, "auth_token")
    assert e.value.__cause__ is None and e.value.__context__ is None
    assert SECRET not in "".join(traceback.format_exception(e.value))


def test_a_callable_must_return_a_string() -> None:
    """Bytes or None from a callable are refused by type."""
    with pytest.raises(ConfigurationError, match="returned a bytes, not a string"):
        resolve(lambda: SECRET.encode())  # type: ignore[arg-type, return-value]  # the mistake under test


def test_a_callable_and_a_reference_pickle_without_the_value() -> None:
    """The pickled pipeline names the secret and does not contain it."""
    for secret in (token, "env:TRITON_TOKEN", "file:/run/secrets/triton"):
        assert SECRET.encode() not in pickle.dumps(secret)


UNFIT = ["a\nb", "a\r\nSet-Cookie: b", "a\0b", "a\x7fb", "日本", "a\x1bb"]


@pytest.mark.parametrize("value", UNFIT)
def test_a_value_that_would_break_the_header_is_refused(value: str, tmp_path: Path) -> None:
    """No source of a secret can smuggle a second header in, and the error does not repeat it."""
    (tmp_path / "token").write_text(f"{SECRET}{value}x")
    for secret in (f"{SECRET}{value}x", lambda: f"{SECRET}{value}x"):
        with pytest.raises(ConfigurationError, match="auth_token") as e:
            resolve(secret, "auth_token")
        assert SECRET not in str(e.value)
    if value.isascii():
        with pytest.raises(ConfigurationError, match="auth_token"):
            resolve(f"file:{tmp_path / 'token'}", "auth_token")


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_secret_is_refused(empty: str, tmp_path: Path) -> None:
    """An empty variable or file is a mistake of the deployment, found before the server's 401."""
    (tmp_path / "token").write_text(empty)
    for secret in (empty, lambda: empty, f"file:{tmp_path / 'token'}"):
        with pytest.raises(ConfigurationError, match=r"auth_token.* is empty"):
            resolve(secret, "auth_token")


@pytest.mark.parametrize("reference", ["env:", "env:A=B", "file:", "file:a\0b", "", "a\nb", 3, None, b"x"])
def test_a_malformed_reference_is_refused_at_construction(reference: object) -> None:
    """References that no worker could read are refused where the pipeline is built."""
    with pytest.raises(ConfigurationError, match="auth_token"):
        check_reference(reference, "auth_token")


@pytest.mark.parametrize("reference", ["env:NOT_SET_HERE", "file:/not/here", token, SECRET])
def test_checking_a_reference_reads_nothing(reference: object) -> None:
    """The machine that builds the pipeline need not have the secret."""
    check_reference(reference, "auth_token")


def test_a_description_shows_only_the_source() -> None:
    """Display data says where a secret comes from."""
    assert describe(SECRET) == REDACTED
    assert describe("env:TRITON_TOKEN") == "env:TRITON_TOKEN"
    assert describe("file:/run/token") == "file:/run/token"
    assert describe(token) == "callable token"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\nb", "ü", "a\r", None, 1])
def test_an_invalid_header_name_is_refused(name: object) -> None:
    """Only tokens of RFC 9110 are header names."""
    with pytest.raises(ConfigurationError, match="header name"):
        check_header_name(name)


def test_valid_header_names_and_values_are_accepted() -> None:
    """Latin-1 text and tabs are allowed in a value."""
    check_header_name("X-Request_ID.2")
    for value in ("plain", "with\ttab", "café"):
        assert resolve(value) == value


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://triton:8000", "http://triton:8000"),
        ("https://user:pw@triton:8000/base", "https://***@triton:8000/base"),
        ("http://user@triton", "http://***@triton"),
        ("http://u:p@ss@triton/x", "http://***@triton/x"),
        ("http://u:p/ss@triton/x", "http://***@triton/x"),
        ("http://u:p?ss@triton/x", "http://***@triton/x"),
        ("http://u:p://ss@triton/x", "http://***@triton/x"),
        ("u:pw@triton:8000", "***@triton:8000"),
        ("http://triton/v2?key=abc", "http://triton/v2?***"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_credentials(url: str, shown: str) -> None:
    """User, password and query are removed; what a user needs to recognise the server stays."""
    assert redact_url(url) == shown


@given(
    scheme=st.sampled_from(["http://", "https://", "//", ""]),
    user=st.text(alphabet="ux:/?#@%. ", max_size=8),
    rest=st.sampled_from(["", ":8000", "/v2", "?a=b", "/v2?a=b#c"]),
)
def test_no_password_survives_redaction(scheme: str, user: str, rest: str) -> None:
    """Whatever surrounds it, well-formed or not, a password before the last @ is removed."""
    assert SECRET not in redact_url(f"{scheme}{user}:{SECRET}@triton{rest}")
    assert SECRET not in redact_url(f"{scheme}{SECRET}{user}@triton{rest}")


def test_only_the_protocols_own_headers_are_shown() -> None:
    """A header of the user's is hidden whatever its name; the order is kept."""
    headers = {"Authorization": SECRET, "Content-Length": 3, "x-tenant": SECRET, "CONTENT-TYPE": "a/b"}
    assert redact_headers(headers) == {
        "Authorization": "***",
        "Content-Length": "3",
        "x-tenant": "***",
        "CONTENT-TYPE": "a/b",
    }
