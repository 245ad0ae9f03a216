"""Beam YAML's ``RunInference`` with ``model_handler: {type: Triton, …}``, registered by importing this."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.typehints import Any as AnyType
from apache_beam.yaml.yaml_ml import ModelHandlerProvider, run_inference

from beam_triton.rows import plain, plain_options
from beam_triton.transforms.model_dofn import open_model
from beam_triton.transforms.row_results import RowResults, row_of_outputs, row_type
from beam_triton.transforms.row_schema import RowSchema
from beam_triton.transforms.run_inference import TritonModelHandler

__all__ = ["TritonModelHandlerProvider", "run_inference"]


@ModelHandlerProvider.register_handler_type("Triton")
class TritonModelHandlerProvider(ModelHandlerProvider):
    """`TritonModelHandler` from the ``config`` of a ``model_handler``.

    By default a row's columns feed the inputs of their names, and the inference is a row of the model's
    outputs, whose types are those of `beam_triton.rows.TritonInference`: the server is asked for the model
    while the pipeline is built, unless ``model_spec`` describes it.

    Args:
        endpoint: URL of the server, or a list of them for fail-over.
        model_name: the model.
        preprocess: a callable, or a path and a name, that makes an element of a row: a mapping of input name
            to value, or the value of the only input.
        postprocess: the same for the inference, made of a PredictionResult. Its type is the one that the
            callable's annotation names.
        text_outputs: outputs whose BYTES are UTF-8 text: ``true`` for all, or a list of names.
        options: the keyword arguments of `TritonModelHandler`.

    Raises:
        ConfigurationError: an option cannot work.
        TritonError: the server cannot be asked.
    """

    def __init__(
        self,
        endpoint: Any,
        model_name: str,
        preprocess: dict[str, str] | None = None,
        postprocess: dict[str, str] | None = None,
        text_outputs: Any = True,
        **options: Any,
    ) -> None:
        options = plain_options(options)
        handler = TritonModelHandler(plain(endpoint), model_name, **options)
        super().__init__(handler, preprocess, postprocess)
        if postprocess is not None:
            self._output_type = _annotated_type(self._postprocess_fn)
            return
        model = open_model(handler._options, model_name)
        try:
            schema = RowSchema(keep=[], text_outputs=plain(text_outputs))
            rows, _ = schema.of_elements(AnyType, model.encoder, handler._options.classification)
        finally:
            model.close()
        self._output_type = row_type(rows.fields)
        self._postprocess_fn = _RowOfOutputs(rows)

    def inference_output_type(self) -> Any:
        """The type of the column that holds the inference."""
        return self._output_type

    @staticmethod
    def default_preprocess_fn() -> Any:
        """Leaves rows as they are."""
        return _same

    @staticmethod
    def validate(model_handler_spec: Any) -> None:
        """Nothing is left to check when the handler has been made."""


@dataclass(frozen=True)
class _RowOfOutputs:
    """Makes a row of a PredictionResult."""

    results: RowResults

    def __call__(self, result: PredictionResult) -> beam.Row:
        inference: Any = result.inference
        return row_of_outputs(self.results.outputs, inference)


def _same(row: Any) -> Any:
    return row


def _annotated_type(function: Any) -> Any:
    """What the function's annotation says that it returns."""
    annotation = inspect.signature(getattr(function, "_callable", function)).return_annotation
    return AnyType if annotation is inspect.Signature.empty else annotation
