"""Elements that travel together."""

from __future__ import annotations

from typing import Any

from apache_beam.utils.windowed_value import WindowedValue


class ElementBatch:
    """A batch in columns: elements, their tensors as they were prepared, their numbers within the bundle.

    Columns, because a tuple an element would be one more object that the garbage collector visits again and
    again while thousands of elements wait for their answers.
    """

    __slots__ = ("numbers", "tensors", "windowed_values")

    def __init__(self, windowed_values: list[WindowedValue], tensors: list[Any], numbers: list[int]) -> None:
        self.windowed_values = windowed_values
        self.tensors = tensors
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.windowed_values)

    def __getitem__(self, part: slice) -> ElementBatch:
        return ElementBatch(self.windowed_values[part], self.tensors[part], self.numbers[part])
