"""Outputs that keep their windows whatever Beam multiplies."""

from __future__ import annotations

import pickle
from typing import Any

from apache_beam import coders, pvalue
from apache_beam.transforms.window import GlobalWindow, IntervalWindow, SlidingWindows
from apache_beam.utils.windowed_value import PaneInfo, PaneInfoTiming, WindowedValue

from beam_triton.transforms.windows import with_own_windows

PANE = PaneInfo(True, False, PaneInfoTiming.EARLY, 2, -1)
TWO = (IntervalWindow(0, 10), IntervalWindow(5, 15))


def test_windows_are_not_multiplied() -> None:
    """Beam repeats the windows of what is yielded while an element has several: not of these."""
    (output,) = with_own_windows([WindowedValue("a", 7, TWO, PANE)])
    output.windows *= 3
    assert list(output.windows) == list(TWO)
    assert (output.value, output.timestamp, output.pane_info) == ("a", 7, PANE)


def test_tagged_outputs_keep_their_tag() -> None:
    """A failure is wrapped inside of its tag."""
    (output,) = with_own_windows([pvalue.TaggedOutput("failures", WindowedValue("a", 7, TWO))])
    output.value.windows *= 2
    assert (output.tag, list(output.value.windows)) == ("failures", list(TWO))


def test_the_given_values_stay_as_they_are() -> None:
    """Input values may be used elsewhere."""
    given = WindowedValue("a", 7, (GlobalWindow(),))
    list(with_own_windows([given]))
    given.windows *= 2
    assert len(given.windows) == 2


def test_they_are_coded_and_pickled_as_other_windows() -> None:
    """Runners encode them, and pickle them between processes."""
    (output,) = with_own_windows([WindowedValue("a", 7, TWO, PANE)])
    coder: Any = coders.WindowedValueCoder(coders.StrUtf8Coder(), SlidingWindows(10, 5).get_window_coder())
    assert coder.decode(coder.encode(output)) == WindowedValue("a", 7, TWO, PANE)
    assert tuple(pickle.loads(pickle.dumps(output)).windows) == TWO
