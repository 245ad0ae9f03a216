"""An element on its way in (key and inputs) and out (result, default value or failure)."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.errors import ConfigurationError, LocalProtocolError, TritonError
from beam_triton.protocol import InferRequestEncoder, InferResponse, ModelSpec, TensorSpec, to_array
from beam_triton.transforms.row_inputs import Columns, InputReader

Failure = tuple[Any, tuple[type[BaseException], str, list[str]]]
"""``(element, (exception type, message, traceback lines))``, as Beam's own dead letters are."""

FAILURES_TAG = "failures"

RESULTS_AT_A_TIME = 64
"""So many results of an answer are made at once, the next ones when these have gone downstream: if a thousand
waited, the garbage collector would look at each of them over and over, which with batches of 1,024 was a
third of all time."""

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


def rows_of(response: InferResponse, is_batched: bool, count: int) -> Iterator[dict[str, Any]]:
    """An answer's outputs, one dict for each of the request's ``count`` elements, made lazily.

    Raises:
        RemoteProtocolError: the answer does not account for every element.
    """
    return response.rows(count) if is_batched else iter((response.whole(),))


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
                if spec is not None and spec.datatype == "BF16":
                    # As answers have it; `to_array` would give its bits.
                    spec = replace(spec, datatype="FP32")
                self._arrays[name] = to_array(given, spec) if spec else np.asarray(given)
            except LocalProtocolError as error:
                # It speaks of inputs, which are read alike.
                reason = error.message.replace("input ", "output ", 1)
                raise ConfigurationError(f"default_value: {reason}") from None

    def result(self, example: Any) -> DefaultResult:
        """The default for one element."""
        inference = {name: array.copy() for name, array in self._arrays.items()}
        return DefaultResult(example, inference, model_id=DEFAULT_MODEL_ID)  # type: ignore[no-untyped-call]

    def rows(self, output: str, count: int) -> npt.NDArray[Any]:
        """The default of one output for ``count`` rows, along a new first dimension."""
        return np.repeat(self._arrays[output][np.newaxis], count, axis=0)


@dataclass(frozen=True)
class PredictionResults:
    """Makes a ``PredictionResult`` for each element: one of the two kinds of results, beside `RowResults`.

    Attributes:
        inputs: input name to the columns of rows that feed it.
        keep_example: results hold their elements; otherwise None, which lets go of large inputs.
    """

    inputs: Mapping[str, Columns] | None = None
    keep_example: bool = True

    def reader(self, encoder: InferRequestEncoder) -> InputReader:
        """Takes the inputs of ``encoder``'s model out of elements.

        Raises:
            ConfigurationError: ``inputs`` does not fit the model.
        """
        return InputReader(encoder.element_model, self.inputs)

    def of_answer(
        self, windowed_values: list[WindowedValue], response: InferResponse, is_batched: bool
    ) -> Iterable[WindowedValue]:
        """Results in the windows of their elements, made while they are iterated.

        Raises:
            RemoteProtocolError: the answer does not account for every element.
        """
        # Checks the answer; the rows themselves are made when the results are.
        rows_of(response, is_batched, len(windowed_values))
        return Outputs(self._results, windowed_values, response, is_batched)

    def _results(
        self, windowed_values: list[WindowedValue], response: InferResponse, is_batched: bool
    ) -> Iterator[WindowedValue]:
        rows = rows_of(response, is_batched, len(windowed_values))
        results = self._parts_of_results(windowed_values, rows, response.model_id)
        return chain.from_iterable(results)

    def _parts_of_results(
        self, windowed_values: list[WindowedValue], rows: Iterator[dict[str, Any]], model_id: str
    ) -> Iterator[list[WindowedValue]]:
        keep_example = self.keep_example
        for start in range(0, len(windowed_values), RESULTS_AT_A_TIME):
            part = windowed_values[start : start + RESULTS_AT_A_TIME]
            yield [
                windowed_value.with_value(
                    prediction_result((element, row, model_id))
                    if type(element := windowed_value.value) is not tuple and keep_example
                    else self._result(element, row, model_id)
                )
                # Not strict: that would take a row of the next part.
                for windowed_value, row in zip(part, rows, strict=False)
            ]

    def _result(self, element: Any, row: dict[str, Any], model_id: str) -> Any:
        """A result beside its key, if there is one."""
        is_keyed, key, example = split_key(element)
        result = prediction_result((example if self.keep_example else None, row, model_id))
        return (key, result) if is_keyed else result

    def default(self, element: Any, default: DefaultValue) -> Any:
        """The result of an element that failed and has a default value."""
        is_keyed, key, example = split_key(element)
        result = default.result(example if self.keep_example else None)
        return (key, result) if is_keyed else result


def failure_of(element: Any, error: TritonError) -> Failure:
    """An element's dead letter."""
    return element, (type(error), str(error), traceback.format_exception(error))
