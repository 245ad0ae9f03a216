"""`TritonInference`: the transform that users compose."""

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.pvalue import DoOutputsTuple, PCollection
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Tuple
from apache_beam.typehints.typehints import is_consistent_with

from beam_triton.options import InferenceOptions
from beam_triton.transforms.bundle import FAILURES_TAG
from beam_triton.transforms.dofn import TritonInferenceDoFn

_MAIN_TAG = "results"


class TritonInference(beam.PTransform[Any, Any]):
    """Scores a PCollection on a model of an NVIDIA Triton Inference Server.

    ::

        scored = images | TritonInference("http://triton:8000", "digits")
        results, failures = images | TritonInference(...).with_exception_handling()

    Elements, results and options are those of `TritonInferenceDoFn`. The server is not asked for
    anything here: options are checked, and the rest happens on the workers.

    Args:
        endpoint: URL of the server, or a list of them for fail-over.
        model_name: the model.
        options: the keyword arguments that `InferenceOptions` describes.

    Raises:
        ConfigurationError: an option cannot work.
    """

    def __init__(self, endpoint: str | Sequence[str], model_name: str, **options: Any) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._model_name = model_name
        self._given = options
        self._options = InferenceOptions.from_options({"endpoint": endpoint, **options})
        self._handles_exceptions = False
        self._error_handler: Any = None
        self._dofn(handles_exceptions=False)

    def with_exception_handling(self) -> "TritonInference":
        """Failed elements come out beside the results: applied, the transform gives both.

        A failure is ``(element, (exception type, message, traceback lines))``, one element each,
        never a batch, with the element's own timestamp and windows.
        """
        self._handles_exceptions = True
        return self

    def with_error_handler(self, error_handler: Any) -> "TritonInference":
        """Failed elements go to one of Beam's error handlers; ``None`` leaves everything as it is."""
        self._error_handler = error_handler
        return self

    def default_label(self) -> str:
        """The step's name where the user gives none."""
        return f"TritonInference({self._model_name})"

    def display_data(self) -> dict[str, Any]:
        return self._dofn(handles_exceptions=False).display_data()

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results, or with exception handling ``(results, failures)``."""
        handles_exceptions = self._handles_exceptions or self._error_handler is not None
        scoring = beam.ParDo(self._dofn(handles_exceptions)).with_output_types(_output_type(pcoll))
        if not handles_exceptions:
            scored: PCollection[Any] = pcoll | "Score" >> scoring
            return scored
        outputs: DoOutputsTuple = pcoll | "Score" >> scoring.with_outputs(FAILURES_TAG, main=_MAIN_TAG)
        results, failures = outputs[_MAIN_TAG], outputs[FAILURES_TAG]
        if self._error_handler is not None:
            self._error_handler.add_error_pcollection(failures)
            return results
        return results, failures

    def _dofn(self, handles_exceptions: bool) -> TritonInferenceDoFn:
        return TritonInferenceDoFn(
            self._endpoint, self._model_name, with_exception_handling=handles_exceptions, **self._given
        )


def _output_type(pcoll: PCollection[Any]) -> Any:
    """Keyed results for keyed elements, as far as the input's type tells."""
    element_type = pcoll.element_type
    arguments = getattr(element_type, "tuple_types", None)
    if arguments is not None and len(arguments) == 2:
        return Tuple[arguments[0], PredictionResult]
    may_be_keyed = element_type is None or is_consistent_with(Tuple[AnyType, AnyType], element_type)
    return AnyType if may_be_keyed else PredictionResult
