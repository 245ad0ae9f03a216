"""An element on its way in (key and inputs) and out (result, default value or failure)."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
from apache_beam.ml.inference.base import PredictionResult

from beam_triton.errors import ConfigurationError, LocalProtocolError, TritonError
from beam_triton.protocol import InferResponse, ModelSpec, TensorSpec, to_array

Failure = tuple[Any, tuple[type[BaseException], str, list[str]]]
"""``(element, (exception type, message, traceback lines))``, as Beam's own dead letters are."""

FAILURES_TAG = "failures"

DEFAULT_MODEL_ID = "default"


class Outputs:
    """What a DoFn gives Beam: made while it is iterated, and made again for whoever iterates it again.

    Beam's runtime type checker iterates everything that a DoFn returns, except generators, before the runner
    does. An iterator would be spent then, and its elements lost without an error.
    """

    __slots__ = ("_arguments", "_make")

    def __init__(self, make: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        self._make = make
        self._arguments = arguments

    def __iter__(self) -> Iterator[Any]:
        return self._make(*self._arguments)


prediction_result: Callable[[Iterable[Any]], PredictionResult] = partial(tuple.__new__, PredictionResult)
"""Makes a PredictionResult of ``(example, inference, model_id)``: the tuple's constructor is five times as
fast as PredictionResult's own, which is Python code."""


def split_key(element: Any) -> tuple[bool, Any, Any]:
    """Whether the element is keyed, its key, and the rest.

    A plain tuple of two is ``(key, element)``; a NamedTuple is a row, whatever its length.
    """
    if type(element) is tuple and len(element) == 2:
        return True, element[0], element[1]
    return False, None, element


def model_inputs(element: Any) -> Any:
    """The request encoder's input: a mapping for a row, any other element unchanged."""
    if isinstance(element, beam.Row):
        return element.as_dict()
    if isinstance(element, tuple) and hasattr(element, "_asdict"):
        return element._asdict()
    return element


def rows_of(response: InferResponse, has_batch_dimension: bool, count: int) -> Iterator[dict[str, Any]]:
    """An answer's outputs, one dict for each of the request's ``count`` elements, made lazily.

    Raises:
        RemoteProtocolError: the answer does not account for every element.
    """
    return response.rows(count) if has_batch_dimension else iter((response.whole(),))


class DefaultResult(PredictionResult):
    """A result that did not come from the model: ``default_value`` stands in for an element that failed.

    It is a `PredictionResult` whose ``model_id`` is ``"default"``.
    """

    __slots__ = ()


class DefaultValue:
    """Makes results from the user's ``default_value``, each with arrays of its own.

    Raises:
        ConfigurationError: the value does not fit the requested outputs.
    """

    def __init__(self, value: Any, model: ModelSpec, outputs: tuple[TensorSpec, ...]) -> None:
        if not isinstance(value, Mapping):
            if len(outputs) != 1:
                names = ", ".join(spec.name for spec in outputs)
                raise ConfigurationError(
                    f"default_value must map output names to values, as model {model.name!r} has "
                    f"{len(outputs)} outputs: {names}"
                )
            value = {outputs[0].name: value}
        specs = {spec.name: spec for spec in outputs}
        missing = sorted(specs.keys() - value.keys())
        unknown = sorted(map(str, value.keys() - specs.keys()))
        if specs and (missing or unknown):
            raise ConfigurationError(
                f"default_value does not fit the outputs of model {model.name!r}: "
                f"missing {missing}, unknown {unknown}"
            )
        self._arrays = {}
        for name, given in value.items():
            try:
                spec = specs.get(name)
                self._arrays[name] = to_array(given, spec) if spec else np.asarray(given)
            except LocalProtocolError as error:
                raise ConfigurationError(f"default_value: {error.message}") from None

    def result(self, example: Any) -> DefaultResult:
        """The default for one element."""
        inference = {name: array.copy() for name, array in self._arrays.items()}
        return DefaultResult(example, inference, model_id=DEFAULT_MODEL_ID)  # type: ignore[no-untyped-call]

    def rows(self, output: str, count: int) -> npt.NDArray[Any]:
        """The default of one output for ``count`` rows, along a new first dimension."""
        return np.repeat(self._arrays[output][np.newaxis], count, axis=0)


def failure_of(element: Any, error: TritonError) -> Failure:
    """An element's dead letter."""
    return element, (type(error), str(error), traceback.format_exception(error))
