"""`TritonInference` with rows in, rows out and options that are plain data: for Beam YAML, Java and Go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection

from beam_triton.auth import auth_from_text
from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.transforms import inference
from beam_triton.transforms.results import failure_of
from beam_triton.transforms.row_inputs import columns_of
from beam_triton.transforms.row_results import Fields, RowFailures, RowResults
from beam_triton.transforms.row_schema import RowSchema

_HANDLING = ("output", "main_tag", "threshold", "timeout")


class TritonInference(inference.TritonInference):
    """Scores rows on a model of an NVIDIA Triton Inference Server.

    A result is a row of the element's columns that feed no input and the model's outputs. The server is asked
    for the model while the pipeline is built, unless ``model_spec`` describes it.

    With ``error_handling`` there are two outputs: ``good``, and what ``error_handling`` names. A failure is a
    row as Beam YAML's other transforms have it: ``element`` (the row that failed), ``msg``, which ends with
    the request that failed, and ``stack``.

    Args:
        endpoint: URL of the server, or a list of them for fail-over.
        model_name: the model.
        inputs: input name to the column that feeds it, where that has another name; or to a list of columns
            of one value each, which make up the tensor.
        keep: the columns that results keep: a list, or ``all``. By default those that feed no input.
        prefix: of the names of the outputs' columns.
        text_outputs: outputs whose BYTES are UTF-8 text: ``true`` for all, or a list of names. The others
            are bytes, which JSON and CSV do not have.
        error_handling: ``output`` names the output of failures; without ``error_handling`` the first one
            fails the pipeline. ``threshold`` is the share of rows that may fail, ``timeout`` lowers
            ``timeout_seconds``.
        options: the other keyword arguments of `beam_triton.TritonInference`. A value that is a row is taken
            as a mapping; ``auth`` is ``google`` or ``aws:REGION``, as for the commands.

    Raises:
        ConfigurationError: an option cannot work, or the rows do not fit the model.
        TritonError: the server cannot be asked.
    """

    def __init__(
        self,
        endpoint: Any,
        model_name: Any,
        inputs: Any = None,
        keep: Any = None,
        prefix: str = "",
        text_outputs: Any = True,
        error_handling: Any = None,
        **options: Any,
    ) -> None:
        if "output" in options:
            raise ConfigurationError(
                "output: results are rows here; failures go to error_handling={output: …}"
            )
        super().__init__(
            plain(endpoint),
            plain(model_name),
            inputs=plain(inputs),
            output="row",
            keep=plain(keep),
            prefix=prefix,
            text_outputs=plain(text_outputs),
            **plain_options(options),
        )
        if error_handling is not None:
            self.with_exception_handling(**_handling(plain(error_handling)))

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results, or the two outputs by name."""
        scored, handling = super().expand(pcoll), self._handling
        if handling is None:
            return scored
        return {tag: scored[tag] for tag in (handling.main_tag, handling.dead_letter_tag)}

    def _rows(self, schema: RowSchema, element_type: Any) -> tuple[RowResults, "RowErrors"]:
        results, failures = super()._rows(schema, element_type)
        return results, RowErrors(failures.columns, element_type)


@dataclass(frozen=True)
class RowErrors(RowFailures):
    """Makes failures as Beam YAML's transforms do."""

    element_type: Any = None

    @property
    def fields(self) -> Fields:
        """Names and types of a failure's columns."""
        return [("element", self.element_type), ("msg", str), ("stack", str)]

    def __call__(self, element: Any, error: TritonError) -> beam.Row:
        """The row of one failure."""
        _, (_, message, stack) = failure_of(element, error)
        return beam.Row(element=element, msg=message, stack="".join(stack))


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `InferenceOptions` from plain data.

    Raises:
        ConfigurationError: ``auth`` is not what `auth_from_text` takes.
    """
    made = {name: plain(value) for name, value in options.items()}
    if isinstance(made.get("auth"), str):
        made["auth"] = auth_from_text(made["auth"])
    return made


def plain(value: Any) -> Any:
    """The value with dicts for rows, which is what other SDKs make of their structures."""
    if isinstance(value, str | bytes):
        return value
    columns = columns_of(value)
    if columns is not None:
        return {name: plain(each) for name, each in columns.items()}
    return [*map(plain, value)] if isinstance(value, Sequence) else value


def _handling(given: Any) -> dict[str, Any]:
    """Arguments of ``with_exception_handling``.

    Raises:
        ConfigurationError: an option is missing, or is not one of ``error_handling``.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("output"), str):
        raise ConfigurationError(
            f"error_handling needs output, the name of the failures, such as {{output: failed}}, and is "
            f"{given!r}"
        )
    for name in given:
        if name not in _HANDLING:
            raise ConfigurationError(
                f"error_handling has no option {name!r}; its options: {', '.join(_HANDLING)}"
            )
    return {"dead_letter_tag" if name == "output" else name: value for name, value in given.items()}
