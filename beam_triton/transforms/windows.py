"""Outputs that keep their own windows when an element of several windows is being processed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from apache_beam import pvalue
from apache_beam.transforms.window import BoundedWindow
from apache_beam.utils.windowed_value import WindowedValue


class _OwnWindows(tuple[BoundedWindow, ...]):
    """Windows that are not multiplied.

    Beam takes a WindowedValue that ``process`` yields for one made once a window, and so repeats its
    windows (``windows *= k``) when the current element has k of them. Results here belong to other
    elements and are made once. Holding them back until ``finish_bundle``, where Beam does not do
    this, would hold a whole bundle's results in memory wherever windows slide.
    """

    __slots__ = ()

    def __mul__(self, count: Any) -> _OwnWindows:
        return self


def with_own_windows(outputs: Iterable[Any]) -> Iterator[Any]:
    """The same outputs, safe to yield from ``process`` whatever the current element's windows."""
    for output in outputs:
        if isinstance(output, pvalue.TaggedOutput):
            yield pvalue.TaggedOutput(output.tag, _own(output.value))
        else:
            yield _own(output)


def _own(value: WindowedValue) -> WindowedValue:
    return WindowedValue(value.value, value.timestamp, _OwnWindows(value.windows), value.pane_info)
