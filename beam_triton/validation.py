"""Option classes: frozen dataclasses that check themselves and can be read from plain dicts.

Every rule takes the full name of a field and its value, and raises `ConfigurationError` naming both.
Numbers are judged by `numbers`, so that numpy scalars pass without numpy being imported; a bool is
never a number, because ``max_retries: true`` in a YAML file is a mistake, not a one.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import TypeVar, cast

from beam_triton.errors import ConfigurationError

Self = TypeVar("Self", bound="Options")
T = TypeVar("T")
Rule = Callable[[str, object], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the option classes; a subclass is a frozen, keyword-only dataclass."""

    @classmethod
    def from_options(cls: type[Self], value: Self | Mapping[str, object] | None) -> Self:
        """Give ``value`` itself if it is of this class, the class made from a dict, or the defaults for None.

        Raises `ConfigurationError` for an unknown or missing option and for any other type.
        """
        if value is None:
            value = {}
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigurationError(
                f"expected a {cls.__name__} or a dict of its options, got {type(value).__name__}"
            )
        return made_of(cls, value)


def made_of(kind: type[T], given: Mapping[str, object]) -> T:
    """The dataclass ``kind`` made from a dict of its fields.

    Raises `ConfigurationError` for an unknown or missing one.
    """
    assert is_dataclass(kind)
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigurationError(
                f"{kind.__name__} has no option {reprlib.repr(name)}{hint}; "
                f"its options: {', '.join(known) or 'none'}"
            )
    for field in fields(kind):
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigurationError(f"{kind.__name__} needs the option {field.name!r}")
    return cast(T, kind(**given))


def check(options: Options, rule: Rule, *names: str, allow_none: bool = False) -> None:
    """Apply ``rule`` to the named fields; with ``allow_none``, a field that is None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None or not allow_none:
            rule(f"{type(options).__name__}.{name}", value)


def positive(name: str, value: object) -> None:
    """A finite number above zero."""
    if not 0 < _number(value) < math.inf:
        raise _refused(name, value, "a number above 0")


def not_negative(name: str, value: object) -> None:
    """A finite number of zero or more."""
    if not 0 <= _number(value) < math.inf:
        raise _refused(name, value, "a number of 0 or more")


def fraction(name: str, value: object) -> None:
    """A number above zero and at most one."""
    if not 0 < _number(value) <= 1:
        raise _refused(name, value, "a number above 0 and at most 1")


def positive_integer(name: str, value: object) -> None:
    """A whole number of one or more."""
    if not (isinstance(value, numbers.Integral) and _number(value) >= 1):
        raise _refused(name, value, "a whole number of 1 or more")


def not_negative_integer(name: str, value: object) -> None:
    """A whole number of zero or more."""
    if not (isinstance(value, numbers.Integral) and _number(value) >= 0):
        raise _refused(name, value, "a whole number of 0 or more")


def boolean(name: str, value: object) -> None:
    """True or False, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise _refused(name, value, "True or False")


def one_of(allowed: Iterable[object]) -> Rule:
    """The rule that accepts exactly the ``allowed`` values."""
    choices = tuple(allowed)

    def rule(name: str, value: object) -> None:
        # By type as well: 1 == True, and 1.0 == 1.
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _refused(name, value, "one of " + ", ".join(map(repr, choices)))

    return rule


def _number(value: object) -> float:
    """The value as a float, NaN (which no comparison accepts) where it is not a number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def _refused(name: str, value: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{name} must be {expected}, got {reprlib.repr(value)}")
