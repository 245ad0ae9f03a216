"""A model for each element: a bundle's elements are scored on the models that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, TypeAlias

from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.errors import ConfigurationError, LocalProtocolError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.protocol.paths import model_path
from beam_triton.protocol.text import shorten
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bundle import BundleScorer, dead_letter
from beam_triton.transforms.exception_handling import DeadLetters
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import close_with, open_model
from beam_triton.transforms.results import Outputs, split_key
from beam_triton.transforms.row_inputs import columns_of

ModelName: TypeAlias = str | Callable[[Any], str] | Mapping[str, str]
"""A model for all elements; what gives that of an element; or ``{"column": …}``, the column that names it."""


class ModelColumn:
    """Gives the model that an element names in a column."""

    def __init__(self, column: str) -> None:
        self.column = column

    def __call__(self, element: Any) -> Any:
        """The column's value.

        Raises:
            LocalProtocolError: the element has no such column.
        """
        row = split_key(element)[2]
        columns = columns_of(row)
        if columns is None or self.column not in columns:
            found = "it is no row" if columns is None else f"its columns: {', '.join(map(shorten, columns))}"
            raise LocalProtocolError(
                f"the element has no column {self.column!r} that names its model; {found}: {shorten(row)}"
            )
        return columns[self.column]


def model_of_element(model_name: Any) -> Callable[[Any], Any] | None:
    """What gives the model of an element; None where ``model_name`` is the name of one for all.

    Raises:
        ConfigurationError: it is a mapping, and does not name a column.
    """
    if isinstance(model_name, Mapping):
        column = model_name.get("column")
        if len(model_name) != 1 or not isinstance(column, str) or not column:
            raise ConfigurationError(
                f"model_name is a name, a callable, or {{'column': 'the column that names the model'}}, and "
                f"not {model_name!r}"
            )
        return ModelColumn(column)
    return model_name if callable(model_name) else None


def shown_model_name(model_name: Any) -> Any:
    """The model as labels and display data show it; what is neither a callable nor a mapping is unchanged."""
    if isinstance(model_name, Mapping):
        return f"column {model_name.get('column')}"
    return getattr(model_name, "__name__", type(model_name).__name__) if callable(model_name) else model_name


class OpenModels:
    """Models of one DoFn, opened when elements name them, and closed with it."""

    def __init__(self, options: InferenceOptions) -> None:
        self._options = options
        self._models: dict[str, RemoteModel] = {}
        self._closing: list[Any] = []

    def get(self, name: str) -> RemoteModel:
        """The model of that name.

        Raises:
            TritonError: it cannot be opened.
        """
        model = self._models.get(name)
        if model is None:
            model_path(name)  # Refuses what is not a name.
            model = self._models[name] = open_model(self._options.of_model(name), name)
            self._closing.append(close_with(self, model))
        return model

    def close(self) -> None:
        """Close all of them."""
        models, self._models = self._models, {}
        while self._closing:
            self._closing.pop().detach()
        for model in models.values():
            model.close()


class ManyModelsScorer:
    """Scores the elements of one bundle by a `BundleScorer` a model; requests to all of them overlap.

    Args:
        model_of: gives the name of an element's model.
        models: opens models.
        new_scorer: makes the scorer of a model.
        dead_letters: what becomes of elements whose model cannot be opened, which is tried once in a bundle.
    """

    def __init__(
        self,
        model_of: Callable[[Any], Any],
        models: OpenModels,
        new_scorer: Callable[[RemoteModel], BundleScorer],
        dead_letters: DeadLetters | None,
    ) -> None:
        self._model_of = model_of
        self._models = models
        self._new_scorer = new_scorer
        self._metrics = InferenceMetrics()
        self._dead_letters = dead_letters
        self._scorers: dict[str, BundleScorer] = {}
        self._refusals: dict[str, TritonError] = {}
        self._taken = 0

    def add(self, windowed_value: WindowedValue) -> Iterable[Any]:
        """Take an element; outputs that are ready, each with the windows of its own element."""
        index = self._taken
        self._taken = index + 1
        try:
            scorer = self._scorer(self._name_of(windowed_value.value))
        except TritonError as error:
            self._metrics.count("elements")
            self._metrics.count("failures")
            return (dead_letter(self._dead_letters, windowed_value, index, error),)
        return scorer.add(windowed_value, index)

    def finish(self) -> Iterable[Any]:
        """Send what is buffered, wait for everything, and give the remaining outputs."""
        for scorer in self._scorers.values():
            scorer.send_buffered()
        outputs = [scorer.finish() for scorer in self._scorers.values()]
        self._metrics.flush()
        return Outputs(chain.from_iterable, outputs)

    def cancel(self) -> None:
        """Abandon whatever is in flight. A second call does nothing."""
        for scorer in self._scorers.values():
            scorer.cancel()

    def _name_of(self, element: Any) -> str:
        try:
            name = self._model_of(element)
        except TritonError:
            raise
        except Exception as error:
            raise LocalProtocolError(
                f"model_name, called with the element, raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(name, str) or not name:
            raise LocalProtocolError(
                f"model_name gives {shorten(name)} for the element, which names no model"
            )
        return name

    def _scorer(self, name: str) -> BundleScorer:
        scorer = self._scorers.get(name)
        if scorer is not None:
            return scorer
        refusal = self._refusals.get(name)
        if refusal is not None:
            raise refusal
        try:
            scorer = self._scorers[name] = self._new_scorer(self._models.get(name))
        except TritonError as error:
            self._refusals[name] = error
            raise
        return scorer
