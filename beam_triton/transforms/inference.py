"""`TritonInference`, the transform that users compose, and the DoFn under it."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.pvalue import PCollection
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Tuple
from apache_beam.typehints.typehints import is_consistent_with

from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.transforms.bundle import BundleScorer, with_own_windows
from beam_triton.transforms.exception_handling import (
    DeadLetters,
    ExceptionHandling,
    FailureThreshold,
    Scored,
    dead_letter_type,
)
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import ModelDoFn, default_of


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
        with_exception_handling: bool | DeadLetters = False,
        **options: Any,
    ) -> None:
        super().__init__(InferenceOptions.from_options({"endpoint": endpoint, **options}), model_name)
        self._dead_letters = (
            DeadLetters() if with_exception_handling is True else with_exception_handling or None
        )
        self._scorer: BundleScorer | None = None
        self._failure = ""

    def start_bundle(self) -> None:
        """Start with nothing buffered and nothing in flight."""
        assert self._model is not None, "setup has not been called"
        self._cancel()
        self._scorer = BundleScorer(
            self._model,
            self._options.batching,
            InferenceMetrics(self._model.channel.pool),
            dead_letters=self._dead_letters,
            make_default=partial(default_of, self._options),
        )

    def process(self, element: Any, windowed_value: Any = beam.DoFn.WindowedValueParam) -> Iterable[Any]:
        """Take one element; gives the results that are ready, of this and earlier elements."""
        if self._scorer is None:
            raise self._use_after_failure()
        try:
            outputs = self._scorer.add(windowed_value)
        except BaseException as error:
            self._failure = error.message if isinstance(error, TritonError) else repr(error)
            self._cancel()
            raise
        if outputs and len(windowed_value.windows) != 1:
            return with_own_windows(outputs)
        return outputs

    def finish_bundle(self) -> Iterable[Any]:
        """Wait until nothing is in flight, and give the remaining results."""
        if self._scorer is None:
            raise self._use_after_failure()
        try:
            return self._scorer.finish()
        except BaseException:
            self._cancel()
            raise

    def _use_after_failure(self) -> ConfigurationError:
        """The error for whoever catches what ``process`` raised and goes on, as Beam's ``ParDo`` may."""
        return ConfigurationError(
            f"ParDo(TritonInferenceDoFn(…)).with_exception_handling() cannot know which element of a batch "
            f"failed, and would lose the others: use TritonInference(…).with_exception_handling(), or the "
            f"output 'failures' of TritonInferenceDoFn(…, with_exception_handling=True). The bundle failed "
            f"by {self._failure}"
        )


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
        self._options = InferenceOptions.from_options({"endpoint": endpoint, **options})
        self._model_name = model_name
        self._new_dofn = partial(TritonInferenceDoFn, endpoint, model_name, **options)
        self._new_dofn()
        self._handling: ExceptionHandling | None = None
        self._timeout: dict[str, Any] = {}

    def with_exception_handling(
        self,
        main_tag: str = "good",
        dead_letter_tag: str = "bad",
        *,
        exc_class: Any = Exception,
        partial: bool = False,
        use_subprocess: bool = False,
        threshold: float = 1.0,
        threshold_windowing: Any = None,
        timeout: float | None = None,
        error_handler: Any = None,
        on_failure_callback: Callable[[Exception, Any], None] | None = None,
        allow_unsafe_userstate_in_process: bool = False,
    ) -> "TritonInference":
        """Failed elements come out beside the results: the transform gives ``(results, failures)``.

        A failure is ``(element, (exception type, message, traceback lines))``, one element each, never a
        batch, with the element's own timestamp and windows. Its message ends with what is known of the
        request: ``[endpoint=http://triton:8000 status=500 attempts=2 request_id=…]``. With ``default_value``
        there are none. The arguments are those of Beam's ``ParDo.with_exception_handling``:

        Args:
            main_tag, dead_letter_tag: names of the two outputs, which also come by name:
                ``outputs.good``, ``outputs["bad"]``.
            exc_class: class, or tuple of classes, of the errors that make dead letters; others fail the
                bundle.
            threshold: share of the elements of a window, from 0 to 1, above which failures make the job
                fail, with TooManyFailuresError. Elements that yield ``default_value`` count.
            threshold_windowing: WindowFn for that count; by default that of the elements. An unbounded
                input in the global window needs one.
            timeout: seconds for a request; it lowers ``timeout_seconds``.
            error_handler: takes the failures; the transform returns the results alone.
            on_failure_callback: called on the worker with the exception and the element, once for each
                failed element; an error that it raises is logged.
            partial, allow_unsafe_userstate_in_process: no difference, as an element has one result, and
                nothing here has state.
            use_subprocess: refused.

        Raises:
            ConfigurationError: an argument cannot have a meaning here, or is of the wrong kind.
        """
        self._handling = ExceptionHandling(
            main_tag=main_tag,
            dead_letter_tag=dead_letter_tag,
            exc_class=exc_class,
            use_subprocess=use_subprocess,
            threshold=threshold,
            threshold_windowing=threshold_windowing,
            timeout=timeout,
            error_handler=error_handler,
            on_failure_callback=on_failure_callback,
        )
        if timeout is not None and timeout < self._options.timeout_seconds:
            self._timeout = {"timeout_seconds": timeout}
            self._new_dofn(**self._timeout)
        return self

    def with_error_handler(self, error_handler: Any, **exception_handling: Any) -> "TritonInference":
        """Failed elements go to one of Beam's error handlers; ``None`` changes nothing.

        ``exception_handling`` are further arguments of `with_exception_handling`.
        """
        if error_handler is None:
            return self
        return self.with_exception_handling(error_handler=error_handler, **exception_handling)

    def default_label(self) -> str:
        """The step's name where the user does not give one."""
        return f"TritonInference({self._model_name})"

    def display_data(self) -> dict[str, Any]:
        return self._new_dofn().display_data()

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results, or with exception handling ``(results, failures)``."""
        handling, output_type = self._handling, _output_type(pcoll)
        if handling is None:
            return pcoll | "Score" >> beam.ParDo(self._new_dofn()).with_output_types(output_type)
        dofn = self._new_dofn(with_exception_handling=handling.dead_letters, **self._timeout)
        # Any: Beam's runtime type checkers compare dead letters with the main output's type.
        scoring = beam.ParDo(dofn).with_output_types(AnyType)
        scoring = scoring.with_outputs(handling.dead_letter_tag, main=handling.main_tag)
        outputs = pcoll | "Score" >> scoring.with_output_types(AnyType)
        results, failures = outputs[handling.main_tag], outputs[handling.dead_letter_tag]
        results.element_type = output_type
        failures.element_type = dead_letter_type(pcoll.element_type)
        if handling.threshold < 1:
            has_default = self._options.default_value is not None
            limit = FailureThreshold(
                handling.threshold, handling.threshold_windowing, has_default=has_default
            )
            _ = (pcoll, results, failures) | "Threshold" >> limit
        if handling.error_handler is not None:
            handling.error_handler.add_error_pcollection(failures)
            return results
        return Scored(results, failures, handling)


def _output_type(pcoll: PCollection[Any]) -> Any:
    """Keyed results for keyed elements, as far as the input's type shows."""
    element_type = pcoll.element_type
    arguments = getattr(element_type, "tuple_types", None)
    if arguments is not None and len(arguments) == 2:
        return Tuple[arguments[0], PredictionResult]
    may_be_keyed = element_type is None or is_consistent_with(Tuple[AnyType, AnyType], element_type)
    return AnyType if may_be_keyed else PredictionResult
