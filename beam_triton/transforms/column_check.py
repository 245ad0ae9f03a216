"""The schema of the input against the inputs of the model, while the pipeline is built.

What no value of a column's type can be is an error; what some values cannot be is a warning, as those rows
become failures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import numpy as np

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec
from beam_triton.transforms.row_inputs import Columns, KeptColumn

_logger = logging.getLogger(__name__)

_VALUES: dict[Any, tuple[type, ...]] = {
    int: (int, np.integer),
    float: (float, np.floating, int, np.integer),
    str: (str,),
    bytes: (bytes,),
}
"""What Beam's coder writes as a column of this type, without a loss."""


class _Kind(NamedTuple):
    """A column's type: ``leaf`` values in lists ``rank`` deep; ``leaf`` is None where it is not known."""

    leaf: Any
    rank: int
    nullable: bool


def _kind_of(column_type: Any) -> _Kind:
    rank, nullable = 0, False
    while True:
        origin, arguments = get_origin(column_type), get_args(column_type)
        if origin in (Union, UnionType) and type(None) in arguments and len(arguments) == 2:
            nullable = True
            (column_type,) = (each for each in arguments if each is not type(None))
        elif isinstance(origin, type) and issubclass(origin, Sequence):
            rank += 1
            column_type = arguments[0]
        else:
            return _Kind(None if column_type is Any else column_type, rank, nullable)


def check_columns(fields: Mapping[str, Any], model: ModelSpec, inputs: Mapping[str, Columns] | None) -> None:
    """Compare the columns of rows with what the model takes.

    Args:
        fields: column name to type, as Beam's schema has it.
        model: the model; nothing is compared where its server does not name the inputs.
        inputs: input name to the columns that feed it, where they have other names.

    Raises:
        ConfigurationError: no row can be scored; the message lists every reason.
    """
    problems: list[str] = []
    for spec in model.inputs:
        columns = (inputs or {}).get(spec.name, spec.name)
        if isinstance(columns, str):
            problems += _problems_of_column(columns, spec, fields)
        else:
            problems += _problems_of_values(columns, spec, fields)
    if problems:
        found = ", ".join(f"{name}: {_shown(kind)}" for name, kind in fields.items()) or "none"
        raise ConfigurationError(
            f"the rows do not fit model {model.name!r}: {'; '.join(problems)}. The rows' columns: {found}. "
            f"The model's {model.describe()}"
        )


def check_kept(keep: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Compare the columns that are to be kept, and the types that are given for them, with those of the rows.

    Raises:
        ConfigurationError: a column is not there; or Beam would write its values as those of another type,
            5.7 as the int 5.
    """
    unknown = [name for name in keep if name not in fields]
    if unknown:
        raise ConfigurationError(
            f"keep: there is no column {', '.join(map(repr, unknown))}; the columns: {', '.join(fields)}"
        )
    for name, given in keep.items():
        kind, wanted = _kind_of(fields[name]), _kind_of(given)
        if wanted.leaf is None or kind.leaf is None:
            continue
        if kind.rank != wanted.rank or _plain(kind.leaf) != _plain(wanted.leaf):
            raise ConfigurationError(
                f"keep: column {name!r} is {_shown(fields[name])}, and not {_shown(given)}: give its name "
                f"without a type, keep=[{name!r}]"
            )


def kept_column(name: str, column_type: Any) -> KeptColumn:
    """What a column that is kept as this type may hold."""
    kind = _kind_of(column_type)
    types = _VALUES.get(_plain(kind.leaf), ()) if kind.rank == 0 else ()
    return KeptColumn(name, types, kind.nullable or kind.leaf is None)


def _plain(leaf: Any) -> Any:
    """Python's type of the integers, and of the floating-point numbers, of every width."""
    for plain, kind in ((int, np.integer), (float, np.floating)):
        if isinstance(leaf, type) and issubclass(leaf, kind):
            return plain
    return leaf


def _problems_of_column(column: str, spec: TensorSpec, fields: Mapping[str, Any]) -> Iterator[str]:
    if column not in fields:
        if column != spec.name:
            yield f"there is no column {column!r}, which inputs says feeds {spec.name!r}"
        elif not spec.optional:
            yield (
                f"there is no column {column!r} for the input of that name; if another column feeds it, name "
                f"that by inputs={{{spec.name!r}: …}}"
            )
        return
    kind = _kind_of(fields[column])
    about = f"column {column!r}"
    yield from _problems_of_leaf(about, kind, spec)
    if kind.nullable and not spec.optional:
        _warn_of_nulls(about, spec)
    if kind.leaf is None:
        return
    # A single value is taken for a tensor of one value, whatever its rank.
    if kind.rank == 0 and all(size in (1, -1) for size in spec.shape):
        return
    if kind.rank == 1 and spec.shape == (1,):
        _logger.warning(
            "%s is a list, and input %s takes one value: rows with more or fewer values fail",
            about,
            spec.describe(),
        )
    if kind.rank != len(spec.shape):
        yield f"{about} is {_depth(kind.rank)}, and input {spec.describe()} takes {_depth(len(spec.shape))}"


def _depth(rank: int) -> str:
    return ("a single value", "a list")[rank] if rank < 2 else f"lists {rank} deep"


def _problems_of_values(columns: Sequence[str], spec: TensorSpec, fields: Mapping[str, Any]) -> Iterator[str]:
    """Of several columns that are the values of one input."""
    if len(spec.shape) != 1 or spec.shape[0] not in (-1, len(columns)):
        yield (
            f"inputs feeds {len(columns)} columns to {spec.describe()}, which takes another number of values"
            if len(spec.shape) == 1
            else f"inputs feeds a list of columns to {spec.describe()}, which is no list of values"
        )
    for column in columns:
        if column not in fields:
            yield f"there is no column {column!r}, which inputs says feeds {spec.name!r}"
            continue
        kind = _kind_of(fields[column])
        about = f"column {column!r}"
        yield from _problems_of_leaf(about, kind, spec)
        if kind.rank:
            yield f"{about} is a list, and each of the columns of input {spec.name!r} is one value"
        if kind.nullable:
            _warn_of_nulls(about, spec)


def _warn_of_nulls(about: str, spec: TensorSpec) -> None:
    _logger.warning("%s may be null, and input %r may not: rows in which it is null fail", about, spec.name)


def _problems_of_leaf(about: str, kind: _Kind, spec: TensorSpec) -> Iterator[str]:
    leaf, datatype = kind.leaf, DATATYPES[spec.datatype]
    if leaf is None:
        return
    takes = f"input {spec.name!r} takes {spec.datatype}"
    is_number = isinstance(leaf, type) and (issubclass(leaf, np.number) or leaf in (int, float))
    if leaf is str or leaf is bytes:
        if not datatype.is_bytes:
            yield f"{about} is text ({_shown(leaf)}), and {takes}: convert it to numbers first"
    elif leaf is bool:
        if spec.datatype != "BOOL":
            yield f"{about} is bool, and {takes}: write 0 and 1"
    elif not is_number:
        yield f"{about} is {_shown(leaf)}, of which no tensor is made, and {takes}"
    elif datatype.is_bytes:
        yield f"{about} is {_shown(leaf)}, and {takes}: convert it to str or bytes first"
    else:
        _warn_of_narrowing(about, leaf, spec)


def _warn_of_narrowing(about: str, leaf: type, spec: TensorSpec) -> None:
    target, given = DATATYPES[spec.datatype].wire_dtype, np.dtype(leaf)
    if target.kind in "iub" and given.kind == "f":
        _logger.warning(
            "%s is %s, and input %r takes %s: rows with fractions fail",
            about,
            given,
            spec.name,
            spec.datatype,
        )
    elif target.kind in "iub" and not np.can_cast(given, target, "safe"):
        # No warning: every Python int is an int64 to Beam.
        _logger.info(
            "%s is %s, and input %r takes %s: rows with values out of its range fail",
            about,
            given,
            spec.name,
            spec.datatype,
        )


def _shown(column_type: Any) -> str:
    """A column's type as the user wrote it."""
    kind = _kind_of(column_type)
    text = "any" if kind.leaf is None else getattr(kind.leaf, "__name__", str(kind.leaf))
    if text.startswith("BeamSchema_"):
        text = "a row"
    return "list of " * kind.rank + text + (" or null" if kind.nullable else "")
