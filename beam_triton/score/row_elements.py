"""Rows to elements of a model: which columns are taken, and how each input's array is made of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.protocol.datatypes import Array
from beam_triton.score.conversion import Convert, column_converter, columns_converter
from beam_triton.score.mapping import InputColumns, list_columns, tensors_to_feed
from beam_triton.score.rows import Columns, RowError

Element = Array | dict[str, Array]
MakeElement = Callable[[Any], Element]


class ElementMaker:
    """Compiles, for the columns of a file, the function that makes an element of a row's values.

    A model with one input gets bare arrays, any other a dict of input name to array. Raises
    ConfigurationError when the mapping does not fit the model.
    """

    def __init__(self, model: ModelSpec, mapping: Sequence[InputColumns]) -> None:
        self._model = model
        self._feeds = tensors_to_feed(model, mapping)
        if not self._feeds:
            raise ConfigurationError(
                f"no column feeds model {model.name!r}: map its inputs; {model.describe()}"
            )
        mapped = {entry.name for entry in mapping}
        self._optional = [spec for spec in model.inputs if spec.optional and spec.name not in mapped]

    def columns_used(self, columns: Columns | None) -> set[str]:
        """The names of the columns that a file with these columns is asked for.

        Raises ConfigurationError as `InputColumns.expand` does.
        """
        used = {name for _, entry in self._feeds for name in entry.expand(columns)}
        return used | {spec.name for spec in self._optional}

    def check(self, columns: Columns) -> None:
        """Raise ConfigurationError when no row of a file with these columns can become an element."""
        try:
            self._compile(columns)
        except RowError as error:
            raise ConfigurationError(error.message) from None

    def check_keys(self, keys: Collection[str]) -> None:
        """Raise ConfigurationError when no JSON object with some of these keys can become an element.

        No keys at all tell nothing of the objects to come.
        """
        try:
            self._compile(None)
        except LocalProtocolError as error:
            raise ConfigurationError(f"{error.message}; {self._model.describe()}") from None
        if keys:
            feeds = [(spec, entry.expand(None)) for spec, entry in self._feeds]
            try:
                self._refuse_missing(feeds, keys)
            except RowError as error:
                raise ConfigurationError(error.message) from None

    def compile(self, columns: Columns | None) -> MakeElement:
        """The function from a row's values to its element; it raises RowError for a row that does not fit.

        Where the columns themselves do not fit, so does no row, and the function raises for each.
        """
        try:
            return self._compile(columns)
        except (LocalProtocolError, ConfigurationError) as error:
            message = error.message

            def refuse(values: Any) -> Element:
                raise RowError(message)

            return refuse

    def _compile(self, columns: Columns | None) -> MakeElement:
        feeds = [(spec, entry.expand(columns)) for spec, entry in self._feeds]
        if columns is None:
            return self._combine([_from_mapping(spec, names) for spec, names in feeds], maps=True)
        self._refuse_missing(feeds, columns.names)
        twice = [name for _, names in feeds for name in names if columns.names.count(name) > 1]
        if twice:
            raise RowError(f"column {twice[0]!r} appears more than once in the header")
        feeds += [(spec, (spec.name,)) for spec in self._optional if spec.name in columns.names]
        try:
            makers = [_from_sequence(spec, names, columns) for spec, names in feeds]
        except LocalProtocolError as error:
            raise RowError(f"{error.message}; {self._model.describe()}") from None
        return self._combine(makers, names=[spec.name for spec, _ in feeds])

    def _refuse_missing(
        self, feeds: Sequence[tuple[TensorSpec, tuple[str, ...]]], present: Collection[str]
    ) -> None:
        missing = [name for _, names in feeds for name in names if name not in present]
        if missing:
            raise RowError(
                f"there is no column {missing[0]!r} for the inputs of model {self._model.name!r} "
                f"({', '.join(spec.describe() for spec, _ in feeds)}); "
                f"the file has {list_columns(list(present))}"
            )

    def _combine(
        self, makers: list[Convert], *, names: list[str] | None = None, maps: bool = False
    ) -> MakeElement:
        if names is None:
            names = [spec.name for spec, _ in self._feeds]
        if len(makers) == 1 and len(self._model.inputs) == 1:
            return makers[0]
        pairs = list(zip(names, makers, strict=True))
        optional = [(spec.name, _from_mapping(spec, (spec.name,))) for spec in self._optional] if maps else []

        def make(values: Any) -> Element:
            element = {name: maker(values) for name, maker in pairs}
            for name, maker in optional:
                if values.get(name) is not None:
                    element[name] = maker(values)
            return element

        return make


def _from_sequence(spec: TensorSpec, names: tuple[str, ...], columns: Columns) -> Convert:
    indexes = [columns.names.index(name) for name in names]
    is_text = columns.types is None
    if len(indexes) == 1:
        index = indexes[0]
        convert_one = column_converter(spec, names[0], is_text=is_text)
        return lambda values: convert_one(values[index])
    convert = columns_converter(spec, names, is_text=is_text)
    first, last = indexes[0], indexes[-1] + 1
    if indexes == list(range(first, last)):
        return lambda values: convert(values[first:last])
    take = itemgetter(*indexes)
    return lambda values: convert(take(values))


def _from_mapping(spec: TensorSpec, names: tuple[str, ...]) -> Convert:
    take = itemgetter(*names)
    convert = (
        column_converter(spec, names[0], is_text=False)
        if len(names) == 1
        else columns_converter(spec, names, is_text=False)
    )

    def make(values: dict[str, Any]) -> Array:
        try:
            taken = take(values)
        except KeyError as error:
            raise RowError(
                f"there is no {error.args[0]!r} for input {spec.describe()}; "
                f"the row has {list_columns(list(values))}"
            ) from None
        return convert(taken)

    return make
