"""How the columns of a row and the outputs of a model make the columns of a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from types import UnionType
from typing import Any, Literal, Union, get_args, get_type_hints

from apache_beam.typehints.schemas import named_fields_from_element_type

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import InferRequestEncoder, TensorSpec
from beam_triton.transforms.column_check import check_columns, check_kept, kept_column
from beam_triton.transforms.row_inputs import Columns, InputReader
from beam_triton.transforms.row_results import Fields, OutputColumn, RowFailures, RowResults

Keep = Literal["all"] | Sequence[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class RowSchema:
    """The options of ``output="row"``; see `TritonInference`.

    Raises:
        ConfigurationError: an option is of the wrong kind.
    """

    inputs: Mapping[str, Columns] | None = None
    keep: Keep = None
    prefix: str = ""
    names: Mapping[str, str] | None = None
    text_outputs: bool | Sequence[str] = False
    version_column: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep, str) and self.keep != "all":
            raise ConfigurationError(f'keep: "all", or a list of columns such as [{self.keep!r}]')
        if self.keep is not None and not isinstance(self.keep, Sequence | Mapping):
            raise ConfigurationError(f"keep must be a list of columns, not {self.keep!r}")
        if not isinstance(self.prefix, str):
            raise ConfigurationError(f"prefix must be the beginning of column names, not {self.prefix!r}")
        version_column = self.version_column
        if version_column is not None and (
            not isinstance(version_column, str) or _as_field_name(version_column or "_") != version_column
        ):
            raise ConfigurationError(
                f"version_column must be a column's name such as 'model_version', not {version_column!r}"
            )
        if not isinstance(self.text_outputs, bool) and (
            isinstance(self.text_outputs, str) or not isinstance(self.text_outputs, Sequence)
        ):
            raise ConfigurationError(
                f"text_outputs must be True, or a list of outputs, not {self.text_outputs!r}"
            )

    def of_elements(
        self, element_type: Any, encoder: InferRequestEncoder, classification: Mapping[str, int] | None
    ) -> tuple[RowResults, RowFailures]:
        """How results and failures of elements of that type are made; the type is compared with the model.

        Raises:
            ConfigurationError: elements do not fit the model, columns are not known, or two have one name.
        """
        InputReader(encoder.element_model, self.inputs)  # Refuses inputs that the model does not have.
        columns = columns_of_type(element_type)
        if columns is not None:
            check_columns(dict(columns), encoder.element_model, self.inputs)
        outputs = self.output_columns(encoder, classification or {})
        kept = self.kept(columns, encoder, element_type)
        checked = () if columns is not None else tuple(kept_column(name, kind) for name, kind in kept)
        results = RowResults(self.inputs, kept, outputs, checked, self.version_column)
        counts = Counter(name for name, _ in results.fields)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ConfigurationError(
                f"two columns have the name {', '.join(map(repr, twice))}: name the outputs' columns by "
                f"prefix=, or by outputs={{output: column}}"
                + (", or choose another version_column" if self.version_column in twice else "")
            )
        return results, RowFailures(columns)

    def output_columns(
        self, encoder: InferRequestEncoder, classification: Mapping[str, int]
    ) -> tuple[OutputColumn, ...]:
        """The columns that the outputs make.

        Raises:
            ConfigurationError: the server does not name the outputs, or an option names one that is none.
        """
        specs = encoder.expected_outputs
        if not specs:
            raise ConfigurationError(
                f"the server does not name the outputs of model {encoder.model.name!r}, which "
                f'output="row" needs for the columns: give model_spec'
            )
        text = self.text_outputs
        if not isinstance(text, bool):
            unknown = [name for name in text if name not in {spec.name for spec in specs}]
            if unknown:
                raise ConfigurationError(
                    f"text_outputs: {', '.join(map(repr, unknown))} is not among the outputs: "
                    f"{', '.join(spec.describe() for spec in specs)}"
                )
            no_text = [spec.describe() for spec in specs if spec.name in text and spec.datatype != "BYTES"]
            if no_text:
                raise ConfigurationError(f"text_outputs: {', '.join(no_text)} is not BYTES, and never text")
        columns = tuple(self._output(spec, spec.name in classification) for spec in specs)
        if self.version_column in [name for column in columns for name, _ in column.fields()]:
            raise ConfigurationError(
                f"version_column: {self.version_column!r} is the name of an output's column: choose another"
            )
        return columns

    def _output(self, spec: TensorSpec, is_classes: bool) -> OutputColumn:
        name = (self.names or {}).get(spec.name)
        if name is None:
            name = _as_field_name(self.prefix + spec.name)
        text = self.text_outputs
        is_text = spec.datatype == "BYTES" and (text if isinstance(text, bool) else spec.name in text)
        return OutputColumn(spec, name, text=is_text and not is_classes, classes=is_classes)

    def kept(self, columns: Fields | None, encoder: InferRequestEncoder, element_type: Any) -> Fields:
        """The columns that results begin with, of elements with these ``columns``.

        Raises:
            ConfigurationError: a column that is to be kept is not there, or ``columns`` are not known.
        """
        keep = self.keep
        if isinstance(keep, Mapping):
            if columns is not None:
                check_kept(keep, dict(columns))
            return list(keep.items())
        if columns is None:
            if keep is not None and not keep:
                return []
            raise ConfigurationError(
                f"the columns of the elements are not known, as their type {element_type} has no schema. "
                f"Name those to keep with their types, keep={{'id': int}}, or keep none by keep=[]; or give "
                f"the elements a schema: beam.Row, a NamedTuple, .with_output_types(…)"
            )
        if keep == "all":
            return columns
        if keep is None:
            fed = self._feeding_columns(encoder)
            return [(name, kind) for name, kind in columns if name not in fed]
        types = dict(columns)
        check_kept(dict.fromkeys(keep, Any), types)
        return [(name, types[name]) for name in keep]

    def _feeding_columns(self, encoder: InferRequestEncoder) -> set[str]:
        fed: set[str] = set()
        inputs = {spec.name: spec.name for spec in encoder.model.inputs} | dict(self.inputs or {})
        for columns in inputs.values():
            fed.update([columns] if isinstance(columns, str) else columns)
        return fed


def columns_of_type(element_type: Any) -> Fields | None:
    """Names and types of the columns of a type that has a schema; None for one that has none."""
    try:
        fields = named_fields_from_element_type(element_type)
    # KeyError: a NamedTuple without annotations.
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    # Beam does not evaluate annotations, which are strings after `from __future__ import annotations`.
    try:
        hints = get_type_hints(getattr(element_type, "user_type", element_type))
    except (TypeError, NameError):
        hints = {}
    return [(name, _as_optional(hints.get(name, Any)) if kind is Any else kind) for name, kind in fields]


def _as_optional(kind: Any) -> Any:
    """``X | None`` in the only spelling that Beam's schemas (2.77) read."""
    if isinstance(kind, UnionType):
        return Union[get_args(kind)]  # noqa: UP007
    return kind


def _as_field_name(name: str) -> str:
    """A column's name of an output's: Beam makes a NamedTuple of a schema, which has rules for names."""
    name = "".join(each if each.isalnum() or each == "_" else "_" for each in name)
    if not name[0].isalpha():
        name = "output_" + name.lstrip("_")
    return name + "_" if iskeyword(name) else name
