"""The DoFn that scores elements on a Triton Inference Server."""

from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.transforms.display import DisplayDataItem

from beam_triton.options import InferenceOptions
from beam_triton.transforms.bundle import BundleScorer
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import ModelDoFn
from beam_triton.transforms.windows import with_own_windows


class TritonInferenceDoFn(ModelDoFn):
    """Scores elements in batches, many requests in flight, on connections that the process shares.

    Args:
        endpoint: URL of the server, or a list of them.
        model_name: the model.
        with_exception_handling: elements that fail leave as outputs tagged ``failures`` (see
            `beam_triton.transforms.results.Failure`); otherwise the first one fails the bundle.
        options: the keyword arguments that `InferenceOptions` describes.

    An element is an array-like (a model with one input), a mapping or row of input name to
    array-like, or ``(key, element)``; shapes are without the batch dimension. An output is a
    ``PredictionResult(example, inference, model_id)``, keyed as the element was, with the element's
    own timestamp, windows and pane. ``inference`` maps output names to arrays that are views of the
    whole batch's answer: copy what you keep for long.

    ``setup`` asks the server for the model's inputs, outputs and batch limit (for ``timeout_seconds``
    if it cannot be reached at once, and where the process uses the model already for the breaker's
    ``max_wait_seconds``) and takes a reference to the shared session; ``teardown`` gives
    it back, as does the garbage collection of a DoFn that was never torn down.

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

    def display_data(self) -> dict[str, Any]:
        """What a runner's job page shows; endpoints and headers without their secrets."""
        shown = {"model_name": self._model_name, **self._options.shown()}
        return {
            name: DisplayDataItem(text, label=name.replace("_", " ").capitalize())
            for name, text in shown.items()
        }

    def start_bundle(self) -> None:
        """Begin with nothing buffered and nothing in flight."""
        assert self._model is not None, "setup has not been called"
        self._cancel()
        self._scorer = BundleScorer(
            self._model,
            self._options.batching,
            InferenceMetrics(self._model.channel.pool),
            tags_failures=self._tags_failures,
            default=self._default,
        )

    def process(
        self, element: Any, windowed_value: Any = beam.DoFn.WindowedValueParam
    ) -> Iterable[Any] | None:
        """Take one element; gives the results that have become ready, of this and of earlier ones."""
        assert self._scorer is not None
        try:
            outputs = self._scorer.add(windowed_value)
        except BaseException:
            self._cancel()
            raise
        if outputs is not None and len(windowed_value.windows) != 1:
            return with_own_windows(outputs)
        return outputs

    def finish_bundle(self) -> Iterable[Any]:
        """Wait until nothing is in flight any more, and give the remaining results."""
        assert self._scorer is not None
        try:
            return self._scorer.finish()
        finally:
            self._cancel()
