"""Which columns of a file feed which inputs of a model, as a user writes it.

::

    image=pixels          one column: a number, a text for BYTES, or an array (a list, "[0, 1]", "0 1")
    image=p0:p63          several columns, stacked in this order
    image=p0:p31,q0:q31
    image:FP32[64]=p0:p63 with datatype and shape, for servers that do not name a model's inputs

A range whose ends differ in a number only (p0:p63, x08:x11) counts; any other range is the columns between
its ends in the file's order. An input that is not mapped takes the column of its own name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec

_DECLARED = re.compile(r"(?P<name>.+):(?P<datatype>[A-Z]+[0-9]*)(?:\[(?P<shape>[-0-9, ]*)\])?$")
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>[0-9]+)$", re.DOTALL)
# A typing error in a range must not ask for gigabytes of names.
_MOST_COLUMNS = 100_000


@dataclass(frozen=True)
class InputColumns:
    """One input and the columns that feed it: names and ranges as they were written.

    ``declared`` is the tensor that the user describes, None where the server's description is to be used.
    """

    name: str
    columns: tuple[str, ...]
    declared: TensorSpec | None = None

    @classmethod
    def parse(cls, text: str) -> InputColumns:
        """Read ``NAME=COLUMNS``. Raises ConfigurationError for anything else."""
        name, equals, columns = text.partition("=")
        parts = tuple(part.strip() for part in columns.split(","))
        if not equals or not name.strip() or not all(parts):
            raise ConfigurationError(
                f"input {text!r} must be NAME=COLUMNS, for example image=pixels or image=p0:p63"
            )
        match = _DECLARED.match(name.strip())
        if match is None or match["datatype"] not in DATATYPES:
            return cls(name.strip(), parts)
        shape = tuple(int(dim) for dim in (match["shape"] or "-1").split(",") if dim.strip())
        return cls(match["name"], parts, TensorSpec(match["name"], match["datatype"], shape))

    def expand(self, known: Sequence[str] | None) -> tuple[str, ...]:
        """The columns' names, ranges written out. ``known`` None: the file has no order of columns.

        Raises ConfigurationError for a range that cannot be written out.
        """
        names: list[str] = []
        for part in self.columns:
            if ":" not in part or (known is not None and part in known):
                names.append(part)
            else:
                first, _, last = part.partition(":")
                names.extend(_counted(part, first, last) or _between(part, first, last, known))
        return tuple(names)


def _counted(text: str, first: str, last: str) -> list[str]:
    start, stop = _NUMBERED.match(first), _NUMBERED.match(last)
    if not start or not stop or start["stem"] != stop["stem"]:
        return []
    low, high = int(start["number"]), int(stop["number"])
    if not 0 <= high - low < _MOST_COLUMNS:
        raise ConfigurationError(f"column range {text!r} must go up, by less than {_MOST_COLUMNS}")
    # x08:x11 counts with leading zeros, p0:p63 without.
    width = len(start["number"]) if start["number"].startswith("0") else 0
    return [f"{start['stem']}{number:0{width}d}" for number in range(low, high + 1)]


def _between(text: str, first: str, last: str, known: Sequence[str] | None) -> Sequence[str]:
    if known is None:
        raise ConfigurationError(
            f"column range {text!r}: rows of JSON Lines have no order of columns; "
            f"use a counted range such as p0:p63, or name the columns"
        )
    if first not in known or last not in known or known.index(first) > known.index(last):
        raise ConfigurationError(
            f"column range {text!r} is not in the file, whose columns are {list_columns(known)}"
        )
    return known[known.index(first) : known.index(last) + 1]


def tensors_to_feed(
    model: ModelSpec, mapping: Sequence[InputColumns]
) -> list[tuple[TensorSpec, InputColumns]]:
    """Each input that gets a value, in the model's order, with its columns.

    An optional input that is not mapped is left out. Raises ConfigurationError when the mapping names no
    input of the model, names one twice, or describes it otherwise than the server.
    """
    by_name = {entry.name: entry for entry in mapping}
    specs = {spec.name: spec for spec in model.inputs}
    for entry in mapping:
        spec, declared = specs.get(entry.name), entry.declared
        if entry is not by_name[entry.name]:
            raise ConfigurationError(f"input {entry.name!r} is mapped twice; list all its columns in one")
        if not model.inputs and declared is None:
            raise ConfigurationError(
                f"the server does not name the inputs of model {model.name!r}: give the datatype and shape "
                f"too, for example {entry.name}:FP32[64]={','.join(entry.columns)}"
            )
        if model.inputs and spec is None:
            raise ConfigurationError(f"model {model.name!r} has no input {entry.name!r}; {model.describe()}")
        if spec is not None and declared is not None and declared.datatype != spec.datatype:
            raise ConfigurationError(
                f"input {entry.name!r} is {spec.datatype}, not {declared.datatype}; {model.describe()}"
            )
    return [
        (spec, by_name.get(spec.name, InputColumns(spec.name, (spec.name,))))
        for spec in model.inputs or [entry.declared for entry in mapping if entry.declared is not None]
        if spec.name in by_name or not spec.optional
    ]


def list_columns(names: Sequence[str]) -> str:
    """Column names for a message, shortened where there are many."""
    shown = list(names) if len(names) <= 12 else [*names[:8], f"… ({len(names) - 10} more)", *names[-2:]]
    return ", ".join(shown) or "none"
