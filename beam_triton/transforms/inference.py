"""`TritonInference`, the transform that users compose, and the DoFn under it."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.pvalue import DoOutputsTuple, PCollection
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Tuple
from apache_beam.typehints.typehints import is_consistent_with

from beam_triton.options import InferenceOptions
from beam_triton.transforms.bundle import BundleScorer, with_own_windows
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import ModelDoFn
from beam_triton.transforms.results import FAILURES_TAG

_MAIN_TAG = "results"


class TritonInferenceDoFn(ModelDoFn):
    """Scores elements in batches, many requests in flight, on connections that the process shares.

    The arguments are those of `TritonInference`, and ``with_exception_handling``: elements that fail leave as
    outputs tagged ``failures`` (see `beam_triton.transforms.results.Failure`); otherwise the first one fails
    the bundle.

    An element is an array-like (a model with one input), a mapping or row of input name to array-like, or
    ``(key, element)``; shapes have no batch dimension. An output is a ``PredictionResult(example, inference,
    model_id)``, keyed as the element was, with the element's own timestamp, windows and pane. ``inference``
    maps output names to arrays that are views of the whole batch's answer: copy what you keep for long.

    ``setup`` asks the server for the model's inputs, outputs and batch limit, and takes a reference to the
    shared session. If the server cannot be reached it keeps trying for ``timeout_seconds``, or for the
    breaker's ``max_wait_seconds`` where the process uses the model already. ``teardown`` releases the
    reference, as does the garbage collection of a DoFn that was never torn down.

    Raises:
        ConfigurationError: at construction, for options that cannot work.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        model_name: str,
        *,
        with_exception_handling: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(InferenceOptions.from_options({"endpoint": endpoint, **options}), model_name)
        self._tags_failures = with_exception_handling
        self._scorer: BundleScorer | None = None

    def start_bundle(self) -> None:
        """Start with nothing buffered and nothing in flight."""
        assert self._model is not None, "setup has not been called"
        self._cancel()
        self._scorer = BundleScorer(
            self._model,
            self._options.batching,
            InferenceMetrics(self._model.channel.pool),
            tags_failures=self._tags_failures,
            default=self._default,
        )

    def process(self, element: Any, windowed_value: Any = beam.DoFn.WindowedValueParam) -> Iterable[Any]:
        """Take one element; gives the results that are ready, of this and earlier elements."""
        assert self._scorer is not None
        try:
            outputs = self._scorer.add(windowed_value)
        except BaseException:
            self._cancel()
            raise
        if outputs and len(windowed_value.windows) != 1:
            return with_own_windows(outputs)
        return outputs

    def finish_bundle(self) -> Iterable[Any]:
        """Wait until nothing is in flight, and give the remaining results."""
        assert self._scorer is not None
        try:
            return self._scorer.finish()
        except BaseException:
            self._cancel()
            raise


class TritonInference(beam.PTransform[Any, Any]):
    """Scores a PCollection on a model of an NVIDIA Triton Inference Server.

    ::

        scored = images | TritonInference("http://triton:8000", "digits")
        results, failures = images | TritonInference(...).with_exception_handling()

    Elements, results and options are those of `TritonInferenceDoFn`. Nothing is sent to the server here:
    options are checked, and the rest happens on the workers.

    Args:
        endpoint: URL of the server, or a list of them for fail-over.
        model_name: the model.
        options: the keyword arguments that `InferenceOptions` describes.

    Raises:
        ConfigurationError: an option cannot work.
    """

    def __init__(self, endpoint: str | Sequence[str], model_name: str, **options: Any) -> None:
        super().__init__()
        InferenceOptions.from_options({"endpoint": endpoint, **options})
        self._model_name = model_name
        self._new_dofn = partial(TritonInferenceDoFn, endpoint, model_name, **options)
        self._new_dofn()
        self._handles_exceptions = False
        self._error_handler: Any = None

    def with_exception_handling(self) -> "TritonInference":
        """Failed elements come out beside the results: applied, the transform returns both.

        A failure is ``(element, (exception type, message, traceback lines))``, one element each,
        never a batch, with the element's own timestamp and windows.
        """
        self._handles_exceptions = True
        return self

    def with_error_handler(self, error_handler: Any) -> "TritonInference":
        """Failed elements go to one of Beam's error handlers; ``None`` changes nothing."""
        self._error_handler = error_handler
        return self

    def default_label(self) -> str:
        """The step's name where the user does not give one."""
        return f"TritonInference({self._model_name})"

    def display_data(self) -> dict[str, Any]:
        return self._new_dofn().display_data()

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results, or with exception handling ``(results, failures)``."""
        handles_exceptions = self._handles_exceptions or self._error_handler is not None
        dofn = self._new_dofn(with_exception_handling=handles_exceptions)
        scoring = beam.ParDo(dofn).with_output_types(_output_type(pcoll))
        if not handles_exceptions:
            scored: PCollection[Any] = pcoll | "Score" >> scoring
            return scored
        outputs: DoOutputsTuple = pcoll | "Score" >> scoring.with_outputs(FAILURES_TAG, main=_MAIN_TAG)
        results, failures = outputs[_MAIN_TAG], outputs[FAILURES_TAG]
        if self._error_handler is not None:
            self._error_handler.add_error_pcollection(failures)
            return results
        return results, failures


def _output_type(pcoll: PCollection[Any]) -> Any:
    """Keyed results for keyed elements, as far as the input's type shows."""
    element_type = pcoll.element_type
    arguments = getattr(element_type, "tuple_types", None)
    if arguments is not None and len(arguments) == 2:
        return Tuple[arguments[0], PredictionResult]
    may_be_keyed = element_type is None or is_consistent_with(Tuple[AnyType, AnyType], element_type)
    return AnyType if may_be_keyed else PredictionResult
