"""What an element may look like, and what of it goes to the model."""

from __future__ import annotations

from typing import Any

import apache_beam as beam


def split_key(element: Any) -> tuple[bool, Any, Any]:
    """Whether the element is keyed, its key, and what remains.

    A plain tuple of two is ``(key, element)``; a NamedTuple is a row, whatever its length.
    """
    if type(element) is tuple and len(element) == 2:
        return True, element[0], element[1]
    return False, None, element


def model_inputs(element: Any) -> Any:
    """What the request encoder takes: a mapping for a row, everything else as it is."""
    if isinstance(element, beam.Row):
        return element.as_dict()
    if isinstance(element, tuple) and hasattr(element, "_asdict"):
        return element._asdict()
    return element
