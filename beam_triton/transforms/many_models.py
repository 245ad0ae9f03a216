"""A model for each element: a bundle's elements are scored on the models and versions chosen for them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from apache_beam.pvalue import AsDict, AsIter, AsList, AsSideInput, AsSingleton, EmptySideInput, PCollection
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.dispatch.activity import ACTIVITY
from beam_triton.errors import ConfigurationError, LocalProtocolError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.protocol.paths import checked_version, model_path
from beam_triton.protocol.text import shorten
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.bundle import BundleScorer, dead_letter
from beam_triton.transforms.exception_handling import DeadLetters
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import close_with, open_model
from beam_triton.transforms.results import Outputs, split_key
from beam_triton.transforms.row_inputs import columns_of

ModelName: TypeAlias = str | Callable[[Any], Any] | Mapping[str, str] | AsSideInput
"""A model for all elements; what gives that of an element; ``{"column": …}``, the column that names it; or a
side input of its name."""

ModelVersion: TypeAlias = str | int | Callable[[Any], Any] | Mapping[str, str] | AsSideInput | None
"""As `ModelName`, of versions; None leaves the choice to the server."""


class FromSideInput:
    """Stands for a side input where the pipeline, to which that belongs, does not go.

    Args:
        has_many: it gives its values one by one.
    """

    def __init__(self, has_many: bool = False) -> None:
        self._has_many = has_many
        self._given: Any = None
        self._value: Any = None

    def value_of(self, given: Any) -> Any:
        """What the side input says by ``given``, its value for the current window; None where it is empty.

        Of many values that is the one that all of them are (FnApiRunner, of Beam 2.77, repeats those of
        `PeriodicImpulse`); otherwise a list of them, which no model and no version is.
        """
        # The same object for all elements of a window.
        if given is not self._given:
            self._given, self._value = given, given
            if isinstance(given, EmptySideInput):
                self._value = None
            elif self._has_many:
                different: list[Any] = []
                for each in given:
                    if each not in different:
                        different.append(each)
                self._value = different[0] if len(different) == 1 else different or None
        return self._value


class ElementColumn:
    """Gives what an element holds in a column.

    Args:
        option: the option that the column feeds.
        column: its name.
    """

    def __init__(self, option: str, column: str) -> None:
        self.option = option
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
            what = "names its model" if self.option == "model_name" else "says the version of its model"
            raise LocalProtocolError(
                f"the element has no column {self.column!r} that {what}; {found}: {shorten(row)}"
            )
        return columns[self.column]


class ModelChoice:
    """Which model, in which version, scores an element.

    Raises:
        ConfigurationError: ``model_name`` or ``model_version`` is a mapping, and does not name a column.
    """

    def __init__(self, model_name: Any, model_version: Any) -> None:
        self._name, self._name_of = model_name, _by_element("model_name", model_name)
        self._version, self._version_of = model_version, _by_element("model_version", model_version)
        self._name_side = model_name if isinstance(model_name, FromSideInput) else None
        self._version_side = model_version if isinstance(model_version, FromSideInput) else None

    @property
    def has_one_name(self) -> bool:
        """All elements are scored on the model of one name."""
        return self._name_of is None and self._name_side is None

    @property
    def has_one_version(self) -> bool:
        """All elements are scored on one version, or on that of the server's choice."""
        return self._version_of is None and self._version_side is None

    def switch(self, name: Any, version: Any) -> None:
        """Take what the side inputs say for the next element; of an option that is none, nothing."""
        if self._name_side is not None:
            self._name = self._name_side.value_of(name)
        if self._version_side is not None:
            self._version = self._version_side.value_of(version)

    def of(self, element: Any) -> tuple[Any, Any]:
        """Name and version for an element, as they were given.

        Raises:
            LocalProtocolError: a callable raised, a column is not there, or two versions are named.
        """
        name, version = self._name, self._version
        if self._name_of is not None:
            name = _called("model_name", self._name_of, element)
        if self._version_of is not None:
            version = _called("model_version", self._version_of, element)
        if type(name) is tuple and len(name) == 2:
            if version is not None:
                raise LocalProtocolError(
                    f"model_name gives {shorten(name)} for the element, a model with its version, and "
                    f"model_version gives {shorten(version)}: give only one of them"
                )
            name, version = name
        elif isinstance(version, Mapping):
            version = version.get(name) if isinstance(name, str) else None
        return name, version


def side_inputs_of(given: Mapping[str, Any]) -> dict[str, AsSideInput]:
    """Those of the options, name to value, that are side inputs.

    Raises:
        ConfigurationError: one is of a kind that has no meaning here, or is a PCollection.
    """
    side_inputs: dict[str, AsSideInput] = {}
    for option, value in given.items():
        is_by_name = isinstance(value, AsDict) and option == "model_version"
        if isinstance(value, AsSingleton | AsIter | AsList) or is_by_name:
            side_inputs[option] = value
        elif isinstance(value, AsSideInput | PCollection):
            by_name = "" if option == "model_name" else ", or AsDict(…) of model names and their versions"
            raise ConfigurationError(
                f"{option} as a side input is beam.pvalue.AsSingleton(…), or AsIter(…) of values that are "
                f"the same in a window{by_name}; and not {type(value).__name__}"
            )
    return side_inputs


def shown(given: Any) -> Any:
    """A model's name or version as labels and display data show it; what is fixed is unchanged."""
    if isinstance(given, AsSideInput | FromSideInput):
        return "side input"
    if isinstance(given, Mapping):
        return f"column {given.get('column')}"
    return getattr(given, "__name__", type(given).__name__) if callable(given) else given


def _by_element(option: str, given: Any) -> Callable[[Any], Any] | None:
    """What gives the option's value for an element; None where it is the same for all of a window.

    Raises:
        ConfigurationError: it is a mapping, and does not name a column; or a side input.
    """
    if isinstance(given, Mapping):
        column = given.get("column")
        if len(given) != 1 or not isinstance(column, str) or not column:
            what = option.removeprefix("model_")
            raise ConfigurationError(
                f"{option} is a {what}, a callable, {{'column': 'the column that has the {what}'}} or a side "
                f"input, and not {given!r}"
            )
        return ElementColumn(option, column)
    if isinstance(given, AsSideInput | PCollection):
        raise ConfigurationError(
            f"{option} as a side input is for TritonInference, which hands its values to the workers"
        )
    return given if callable(given) else None


def _called(option: str, give: Callable[[Any], Any], element: Any) -> Any:
    try:
        return give(element)
    except TritonError:
        raise
    except Exception as error:
        raise LocalProtocolError(
            f"{option}, called with the element, raised {type(error).__name__}: {error}"
        ) from error


@dataclass
class _OpenModel:
    model: RemoteModel
    closing: weakref.finalize[Any, Any]
    used_at: float


class OpenModels:
    """Models of one DoFn, opened when elements name them; closed with it, or when none has for long."""

    def __init__(self, options: InferenceOptions) -> None:
        self._options = options
        self._models: dict[tuple[str, str | None], _OpenModel] = {}

    def get(self, name: str, version: str | None = None) -> RemoteModel:
        """The model of that name, in that version or the one of the server's choice.

        Raises:
            TritonError: it cannot be opened.
        """
        now = time.monotonic()
        held = self._models.get((name, version))
        if held is None:
            model_path(name)  # Refuses what is not a name.
            model = open_model(self._options.of_model(name, version), name)
            held = self._models[name, version] = _OpenModel(model, close_with(self, model), now)
        held.used_at = now
        return held.model

    def close_unused(self) -> None:
        """Close those that no bundle has asked for in the time that idle connections are kept."""
        before = time.monotonic() - self._options.pool.keep_alive_seconds
        for key in [key for key, held in self._models.items() if held.used_at < before]:
            self._close(key)

    def close(self) -> None:
        """Close all of them."""
        for key in list(self._models):
            self._close(key)

    def _close(self, key: tuple[str, str | None]) -> None:
        held = self._models.pop(key)
        held.closing.detach()
        held.model.close()


class ManyModelsScorer:
    """Scores the elements of one bundle by a `BundleScorer` a model; requests to all of them overlap.

    Args:
        choice: of an element's model.
        models: opens models.
        new_scorer: makes the scorer of a model.
        dead_letters: what becomes of elements whose model cannot be opened, which is tried once in a bundle.
    """

    def __init__(
        self,
        choice: ModelChoice,
        models: OpenModels,
        new_scorer: Callable[[RemoteModel], BundleScorer],
        dead_letters: DeadLetters | None,
    ) -> None:
        self._choice = choice
        self._models = models
        self._new_scorer = new_scorer
        self._metrics = InferenceMetrics(times_bundle=True)
        self._dead_letters = dead_letters
        # By model and version, as they are given for elements and as they are checked.
        self._scorers: dict[tuple[Any, Any], BundleScorer] = {}
        self._refusals: dict[tuple[str, str | None], TritonError] = {}
        self._taken = 0

    def add(self, windowed_value: WindowedValue) -> Iterable[Any]:
        """Take an element; outputs that are ready, each with the windows of its own element."""
        index = self._taken
        self._taken = index + 1
        try:
            scorer = self._scorer(*self._choice.of(windowed_value.value))
        except TritonError as error:
            self._metrics.count("elements")
            self._metrics.count("failures")
            ACTIVITY.failed(error)
            return (dead_letter(self._dead_letters, windowed_value, index, error),)
        return scorer.add(windowed_value, index)

    def finish(self) -> Iterable[Any]:
        """Send what is buffered, wait for everything, and give the remaining outputs."""
        scorers = dict.fromkeys(self._scorers.values())
        for scorer in scorers:
            scorer.send_buffered()
        outputs = [scorer.finish() for scorer in scorers]
        self._metrics.flush()
        return Outputs(chain.from_iterable, outputs)

    def cancel(self) -> None:
        """Abandon whatever is in flight. A second call does nothing."""
        for scorer in self._scorers.values():
            scorer.cancel()

    def _scorer(self, name: Any, version: Any) -> BundleScorer:
        try:
            return self._scorers[name, version]
        except (KeyError, TypeError):
            scorer = self._scorers[name, version] = self._new_or_same(_checked(name, version))
            return scorer

    def _new_or_same(self, chosen: tuple[str, str | None]) -> BundleScorer:
        scorer = self._scorers.get(chosen)
        if scorer is not None:
            return scorer
        refusal = self._refusals.get(chosen)
        if refusal is not None:
            raise refusal
        try:
            scorer = self._scorers[chosen] = self._new_scorer(self._models.get(*chosen))
        except TritonError as error:
            self._refusals[chosen] = error
            raise
        return scorer


def _checked(name: Any, version: Any) -> tuple[str, str | None]:
    if not isinstance(name, str) or not name:
        raise LocalProtocolError(f"model_name gives {shorten(name)} for the element, which names no model")
    try:
        return name, checked_version(int(version) if isinstance(version, np.integer) else version)
    except ConfigurationError:
        raise LocalProtocolError(
            f"model_version gives {shorten(version)} for the element, which is no version such as 3 or "
            f"'v0.1.0'; None leaves it to the server"
        ) from None
