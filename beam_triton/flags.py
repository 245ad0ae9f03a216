"""Options on command lines: each option of `InferenceOptions` and its policies that text can say is a flag.

Names, defaults and help come from the option classes and their docstrings. `TritonOptions`, ``score`` and the
other commands spell the flags in their own ways.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from beam_triton.auth import auth_from_text
from beam_triton.credentials import REDACTED, is_reference, redact_headers, redact_url
from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.validation import Options

_NONE = "none"
_BOOLEANS = {"true": True, "false": False}


class Flag(NamedTuple):
    """An option, or a field of one of its policies.

    Attributes:
        path: ``("timeout_seconds",)``, or ``("pool", "max_total")``.
        default: what the option is without the flag; None where that is nothing.
        help: a sentence.
        read: makes a value of the text. Its ConfigurationErrors go on after the flag, as a sentence does.
        argparse: further arguments of ``add_argument``.
    """

    path: tuple[str, ...]
    default: Any
    help: str
    read: Callable[[Any], Any]
    argparse: Mapping[str, Any]


@dataclass(frozen=True)
class Spelling:
    """Flags as a command line spells them: name of the flag (``pool_max_total``) to ``--option``."""

    flags: Mapping[str, str]

    def add_to(self, parser: Any, *names: str, **changes: Any) -> None:
        """Add the flags of these names, or all, to a parser or group; ``changes`` are for argparse.

        What is not given is None, whatever the default that the help names, unless ``changes`` have one.
        """
        for name in names or self.flags:
            flag = ALL_FLAGS[name]
            default = changes.get("default", flag.default)
            shown = f"{flag.help} (default: {_shown(default)})" if default is not None else flag.help
            arguments = {"help": shown.replace("%", "%%"), **flag.argparse, **changes}
            parser.add_argument(self.flags[name], **arguments)

    def values(self, given: object) -> dict[str, Any]:
        """The values of the flags that are given, by name; ``given`` has them as attributes.

        Values that are no text (set in Python) are taken as they are.

        Raises:
            ConfigurationError: a text makes no value; the message names the flag as it is spelt here.
        """
        values = {}
        for name, option in self.flags.items():
            text = getattr(given, option.lstrip("-").replace("-", "_"), None)
            if text is not None:
                try:
                    values[name] = ALL_FLAGS[name].read(text)
                except ConfigurationError as error:
                    raise ConfigurationError(f"{option} {error.message}") from None
        return values


def with_values(options: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the values of flags in their place, by name of the flag.

    Raises:
        ConfigurationError: a flag is for a policy that is switched off.
    """
    merged = dict(options)
    for name, value in values.items():
        option, *field = ALL_FLAGS[name].path
        if not field:
            merged[option] = value
            continue
        policy = merged.get(option, {})
        if policy is None and option == "circuit_breaker":
            raise ConfigurationError(
                f"{name} has no meaning where circuit_breaker is none: leave one of them out"
            )
        change = {field[0]: value}
        merged[option] = (
            replace(policy, **change) if isinstance(policy, Options) else {**(policy or {}), **change}
        )
    return merged


def with_texts(options: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments with what ``--option NAME=JSON`` gives in their place.

    Text that is no JSON is a string; ``auth`` is what `auth_from_text` takes. Of a mapping that is there
    already, what the text leaves out stays.

    Raises:
        ConfigurationError: one has no name, or names what has an argument of its own; or ``auth`` is wrong.
    """
    merged = dict(options)
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name in ("endpoint", "auth_token"):
            # The value is not repeated: it may be a secret.
            raise ConfigurationError(
                f"--option takes NAME=JSON for options other than endpoint and auth_token, not {name!r}"
            )
        before, given = merged.get(name), _auth(value) if name == "auth" else json_or_text(value)
        if isinstance(before, Mapping) and isinstance(given, Mapping):
            given = {**before, **given}
        merged[name] = given
    return merged


def names_of(text: str) -> tuple[str, ...]:
    """The names of ``a,b``. Its ConfigurationError goes on after the flag."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigurationError(f"{text!r} must be names with commas between them")
    return names


def _all_names(texts: str | Sequence[str]) -> tuple[str, ...]:
    given = [texts] if isinstance(texts, str) else texts
    return tuple(name for text in given for name in names_of(text))


def json_or_text(text: Any) -> Any:
    """What a text of JSON says; any other text, and what is no text, as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _mapping(text: Any) -> Any:
    value = json_or_text(text)
    if not isinstance(value, Mapping):
        raise ConfigurationError('takes a JSON object such as {"name": …}')
    return value


def _headers(text: Any) -> Any:
    headers = _mapping(text)
    for name, shown in redact_headers(headers).items():
        value = headers[name]
        if shown == REDACTED and not (callable(value) or (isinstance(value, str) and is_reference(value))):
            raise ConfigurationError(f"{name} must be env:NAME or file:PATH: others can see a command line")
    return headers


def _proxies(text: Any) -> Any:
    proxies = _mapping(text)
    for scheme, url in proxies.items():
        if isinstance(url, str) and not is_reference(url) and redact_url(url) != url:
            raise ConfigurationError(
                f"{scheme} has a password, which others can see on a command line: give env:NAME or file:PATH"
            )
    return proxies


def _reference(text: Any) -> Any:
    if isinstance(text, str) and not is_reference(text):
        # The message does not repeat the argument: it may be the token.
        raise ConfigurationError("must be env:NAME or file:PATH: others can see a command line")
    return text


def _auth(text: Any) -> Any:
    return auth_from_text(text) if isinstance(text, str) else text


def _as_it_is(value: Any) -> Any:
    return value


def _boolean(text: Any) -> Any:
    return _BOOLEANS.get(text.lower(), text) if isinstance(text, str) else text


def _or_none(text: Any) -> Any:
    return None if text == _NONE else text


def _number_or_none(text: str) -> Any:
    return text if text == _NONE else float(text)


_JSON = {"metavar": "JSON"}
# Where the type of an option does not say how text says it.
_SPECIAL: dict[str, tuple[Callable[[Any], Any], Mapping[str, Any]]] = {
    "auth": (_auth, {"metavar": "KIND", "help": "google, aws:REGION or aws:REGION:SERVICE"}),
    "auth_token": (_reference, {"metavar": "REFERENCE", "help": "a bearer token: env:NAME or file:PATH"}),
    "headers": (_headers, _JSON),
    "proxies": (_proxies, _JSON),
    "model_spec": (json_or_text, {"metavar": "FILE"}),
    "bucket_boundaries": (json_or_text, _JSON),
    "pad": (json_or_text, _JSON),
}


def _kind(name: str, hint: Any, default: Any) -> tuple[Callable[[Any], Any], Mapping[str, Any]]:
    """How a flag of that type is read, and its arguments of ``add_argument``."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    if get_origin(hint) is Literal:
        return _as_it_is, {"choices": get_args(hint)}
    kinds = set(get_args(hint) or (hint,)) - {NoneType}
    if kinds == {bool}:
        return _boolean, {"choices": tuple(_BOOLEANS), "nargs": "?", "const": "true"}
    if kinds in ({int}, {float}):
        unit = {"metavar": "SECONDS" if name.endswith("_seconds") else "N"}
        if NoneType in get_args(hint) and default is not None:
            return _or_none, {"type": _number_or_none, **unit}
        return _as_it_is, {"type": kinds.pop(), **unit}
    if Sequence[str] in kinds:
        return _all_names, {"action": "append", "metavar": "A,B"}
    if hint is Any:
        return json_or_text, _JSON
    if any(get_origin(kind) is Mapping for kind in kinds):
        return _mapping, _JSON
    return _as_it_is, {"metavar": "TEXT"}


def _flags(options: type[Options], *path: str) -> dict[str, Flag]:
    found, hints, helps = {}, get_type_hints(options), _descriptions(options)
    for field in fields(options):
        hint, steps, about = hints[field.name], (*path, field.name), helps.get(field.name, "")
        policies = [
            kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Options)
        ]
        if policies != [hint]:
            default = None if field.default is MISSING else field.default
            read, argparse = _kind(field.name, hint, default)
            if policies:
                read, argparse = _or_none, {"choices": (_NONE,)}
            found["_".join(steps)] = Flag(steps, default, about, read, argparse)
        for policy in policies:
            found.update(_flags(policy, *steps))
    return found


def _descriptions(options: type[Options]) -> dict[str, str]:
    """The first sentence about each field, out of the docstring's ``Attributes``."""
    _, _, text = (inspect.getdoc(options) or "").partition("Attributes:\n")
    found = {}
    for names, about in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", text, re.M):
        sentence = re.split(r"(?<=\.) ", " ".join(about.split()), maxsplit=1)[0]
        found.update(dict.fromkeys(names.split(", "), sentence.replace("`", "").removesuffix(".")))
    return found


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


ALL_FLAGS = _flags(InferenceOptions)
"""By name: ``timeout_seconds``, ``pool_max_total``."""
