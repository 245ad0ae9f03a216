"""How much a run measures: all of it, a part of it for a first look, or just enough to see that it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Below this, sweeps measure the first two of their places only.
_FULL_SWEEP = 0.01


@dataclass(frozen=True)
class Scale:
    """``factor`` 1 is what figures are measured with; 0 takes the least that every case can do."""

    factor: float = 1.0

    def count(self, full: int, *, least: int = 1) -> int:
        """So many elements or requests, in place of ``full``."""
        return max(min(full, least), round(full * self.factor))

    def seconds(self, full: float, *, least: float = 0.2) -> float:
        """For how long to measure, in place of ``full``."""
        return max(least, full * self.factor)

    def points(self, values: Sequence[T]) -> Sequence[T]:
        """The values of a sweep."""
        return values if self.factor >= _FULL_SWEEP else values[:2]


FULL = Scale(1.0)
QUICK = Scale(0.05)
"""Minutes instead of an hour; its ratios are hints."""
SMOKE = Scale(0.0)
