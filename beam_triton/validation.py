"""Option classes: frozen dataclasses that check themselves and can be read from plain dicts.

Every rule takes the full name of a field and its value, and raises `ConfigurationError` naming both.
A number is what `numbers` counts as one, so that NumPy scalars pass without an import of NumPy; a bool is
not a number, because ``max_retries: true`` in a YAML file is a mistake, not a 1.
"""

from __future__ import annotations

import inspect
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
    def from_options(
        cls: type[Self], value: Self | Mapping[str, object] | None, *, owner: type | None = None
    ) -> Self:
        """``value`` itself if it is of this class, options from a dict, or the defaults for None.

        ``owner`` is the class whose keyword arguments they are, beside its own: an error names it and them.

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
        return from_mapping(cls, value, owner)


def from_mapping(kind: type[T], given: Mapping[str, object], owner: type | None = None) -> T:
    """An instance of the dataclass ``kind`` from a dict of its fields; ``owner`` as for `Options`.

    Raises `ConfigurationError` for a field that is unknown or missing.
    """
    assert is_dataclass(kind)
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            own = [] if owner is None else _keywords_of(owner)
            known = list(dict.fromkeys([*own, *known]))
            close = get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigurationError(
                f"{(owner or kind).__name__} has no option {reprlib.repr(name)}{hint}; "
                f"its options: {', '.join(known) or 'none'}"
            )
    for field in fields(kind):
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigurationError(f"{kind.__name__} needs the option {field.name!r}")
    return cast(T, kind(**given))


def _keywords_of(owner: type) -> list[str]:
    parameters = inspect.signature(owner).parameters.values()
    return [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]


def check(options: Options, rule: Rule, *names: str, allow_none: bool = False) -> None:
    """Apply ``rule`` to the named fields; with ``allow_none``, None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None or not allow_none:
            rule(f"{type(options).__name__}.{name}", value)


def rule(accepts: Callable[[object], bool], expected: str) -> Rule:
    """The rule that accepts what ``accepts`` does; ``expected`` says it in words."""

    def check_value(name: str, value: object) -> None:
        if not accepts(value):
            raise ConfigurationError(f"{name} must be {expected}, got {reprlib.repr(value)}")

    return check_value


def one_of(allowed: Iterable[object]) -> Rule:
    """The rule that accepts exactly the ``allowed`` values."""
    choices = tuple(allowed)
    return rule(
        # By type as well: 1 == True, and 1.0 == 1.
        lambda value: any(type(value) is type(choice) and value == choice for choice in choices),
        "one of " + ", ".join(map(repr, choices)),
    )


def _number(value: object) -> float:
    """The value as a float, NaN (which no comparison accepts) where it is not a number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def _whole(value: object) -> float:
    """As `_number`, and NaN for values of other than integer types, even 1.0."""
    return _number(value) if isinstance(value, numbers.Integral) else math.nan


positive = rule(lambda value: 0 < _number(value) < math.inf, "a number above 0")
not_negative = rule(lambda value: 0 <= _number(value) < math.inf, "a number of 0 or more")
fraction = rule(lambda value: 0 < _number(value) <= 1, "a number above 0 and at most 1")
positive_integer = rule(lambda value: _whole(value) >= 1, "a whole number of 1 or more")
not_negative_integer = rule(lambda value: _whole(value) >= 0, "a whole number of 0 or more")
boolean = rule(lambda value: isinstance(value, bool), "True or False")
