"""Python's own numbers straight to the wire, without an array in between.

Rows of files consist of them: one FP32 input per column, or one list of floats. ``struct`` has the same
rules as ``casting`` (floats rounded, whole numbers checked, no overflow) at a tenth of its cost. For what
``struct`` refuses, the functions return None, and ``casting`` decides.
"""

from __future__ import annotations

import struct
from itertools import chain
from typing import Any

from beam_triton.protocol.datatypes import DATATYPES

# The smallest limit of dimensions of any NumPy; it also ends lists that contain themselves.
_MAX_DEPTH = 32


class NumberPacker:
    """Packs Python numbers of one datatype; see ``packer_of``.

    BOOL takes only ``bool``, an integer datatype only ``int``, a floating-point one ``int`` and ``float``.
    """

    __slots__ = ("_code", "_pack_one", "_takes")

    def __init__(self, code: str) -> None:
        self._code = code
        self._takes = frozenset({bool} if code == "?" else {int, float} if code in "efd" else {int})
        self._pack_one = struct.Struct("<" + code).pack

    def pack_one(self, value: Any) -> bytes | None:
        """The wire bytes of one number, or None if ``casting`` has to decide."""
        if type(value) not in self._takes:
            return None
        try:
            return self._pack_one(value)
        except (struct.error, OverflowError):
            return None

    def pack_lists(self, values: list[Any] | tuple[Any, ...]) -> tuple[bytes, tuple[int, ...]] | None:
        """The wire bytes and shape of a list, or of lists of lists of equal lengths, of numbers; or None."""
        shape = [len(values)]
        while values and type(values[0]) is list:
            if len(shape) == _MAX_DEPTH or set(map(type, values)) != {list}:
                return None
            lengths = set(map(len, values))
            if len(lengths) > 1:
                return None
            shape += lengths
            values = list(chain.from_iterable(values))
        kinds = set(map(type, values))
        if not kinds or not kinds <= self._takes:
            return None
        try:
            return struct.pack(f"<{len(values)}{self._code}", *values), tuple(shape)
        except (struct.error, OverflowError):
            return None


_PACKERS = {
    datatype.name: NumberPacker(datatype.struct_code)
    for datatype in DATATYPES.values()
    if datatype.struct_code is not None
}


def packer_of(datatype: str) -> NumberPacker | None:
    """The packer for ``datatype``; None for BYTES and BF16."""
    return _PACKERS.get(datatype)
