"""A model on a worker, from setup to teardown: opened, checked, held by a DoFn, and closed with its owner."""

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import apache_beam as beam
from apache_beam.transforms.display import DisplayDataItem

from beam_triton.client import TritonClient
from beam_triton.dispatch.channel import Channel
from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.policy.circuit_breaker import max_hold_seconds
from beam_triton.protocol import InferRequestEncoder, ModelSpec, TensorSpec
from beam_triton.protocol.paths import model_path
from beam_triton.remote_model import RemoteModel, is_in_use
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.results import DefaultValue

_logger = logging.getLogger(__name__)

Owner = TypeVar("Owner")


class ModelDoFn(beam.DoFn):
    """Holds a model, and a reference to the process's session, from ``setup`` to ``teardown``.

    A subclass creates ``_scorer``, which has methods ``finish`` and ``cancel``, in ``start_bundle``.

    Raises:
        ConfigurationError: ``model_name`` is not a name.
    """

    _of_sequences = False

    def __init__(self, options: InferenceOptions, model_name: str) -> None:
        model_path(model_name)  # Refuses what is not a name.
        self._options = options
        self._model_name = model_name
        self._model: RemoteModel | None = None
        self._scorer: Any = None
        self._release: "weakref.finalize[[Channel], ModelDoFn] | None" = None

    def display_data(self) -> dict[str, Any]:
        """What a runner's job page shows; endpoints and headers without secrets."""
        return display_data_of(self._options, self._model_name)

    def setup(self) -> None:
        """Open the model and take a reference to the shared session."""
        self._model = open_model(self._options, self._model_name, of_sequences=self._of_sequences)
        self._release = close_with(self, self._model)

    def teardown(self) -> None:
        """Release the reference to the shared session. Never raises; may be called twice."""
        try:
            self._cancel()
            if self._release is not None:
                self._release.detach()
            if self._model is not None:
                self._model.close()
        except Exception:
            _logger.exception("teardown could not release everything")
        self._model = None

    def _finish(self) -> Iterable[Any]:
        """Wait until nothing is in flight; gives the remaining results.

        `TritonInferenceDoFn` does so in its own file, which spares a reader one on the way of a request.
        """
        try:
            outputs: Iterable[Any] = self._scorer.finish()
            return outputs
        except BaseException:
            self._cancel()
            raise

    def _cancel(self) -> None:
        """Abandon what the bundle has in flight, if anything."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.cancel()


def display_data_of(options: InferenceOptions, model_name: str, **more: str) -> dict[str, Any]:
    """Display data of the options that are not the defaults, without secrets."""
    shown = {"model_name": model_name, **more, **options.shown()}
    return {
        name: DisplayDataItem(text, label=name.replace("_", " ").capitalize()) for name, text in shown.items()
    }


def annotations_of(
    transform: beam.PTransform[Any, Any], options: InferenceOptions, model_name: str
) -> dict[str, Any]:
    """Annotations of a transform, in the words of ``RunInference``: runners find models by them."""
    kind, version = type(transform), options.model_version
    return {
        "model_handler": f"{kind.__name__}({options.servers}, {model_name!r})",
        "model_handler_type": f"{kind.__module__}.{kind.__qualname__}",
        "model_identifier": model_name if version in (None, "") else f"{model_name}:{version}",
    }


def open_model(options: InferenceOptions, model_name: str, *, of_sequences: bool = False) -> RemoteModel:
    """Open the model, which takes sequences or unrelated elements.

    Keep trying for ``timeout_seconds`` where the model cannot be reached at once. Where this process uses it
    already, it is known to exist and the server restarts: keep trying for as long as requests wait for the
    server (``max_wait_seconds`` of the circuit breaker).

    Raises:
        ConfigurationError: the model takes the other kind of elements, or cannot be scored at all, or
            ``default_value`` does not fit its outputs; ModelMismatchError where it is not the locked one.
        TritonError: there is no such model, or no server.
    """
    wait_seconds = options.timeout_seconds
    if is_in_use(model_name, options):
        wait_seconds = max(wait_seconds, max_hold_seconds(options.circuit_breaker))
    with TritonClient.from_inference_options(options) as client:
        model = client.open_model(model_name, wait_seconds=wait_seconds)
    try:
        check_can_be_scored(model.spec, model.encoder.expected_outputs, of_sequences=of_sequences)
        default_of(options, model.encoder)
        return model
    except BaseException:
        model.close()
        raise


def open_described(options: InferenceOptions, model_name: str, *, of_sequences: bool = False) -> RemoteModel:
    """As `open_model`, for a pipeline that is being built: the server is not asked where ``model_spec``
    describes the model, not even for a comparison with a lock file."""
    options = before_workers(options, model_name)
    spec = options.spec_of(model_name)
    if spec is not None:
        # How tensors travel makes no difference to elements and results.
        options = replace(options, model_spec=replace(spec, lock_file=""), binary=True)
    return open_model(options, model_name, of_sequences=of_sequences)


def before_workers(options: InferenceOptions, model_name: str) -> InferenceOptions:
    """The options for a pipeline that is being built, where no `WorkerTriton` is started.

    Raises:
        ConfigurationError: it alone could describe the model.
    """
    if not isinstance(options.endpoint, WorkerTriton):
        return options
    if options.spec_of(model_name) is None:
        raise ConfigurationError(
            f"{options.endpoint} is started on the workers, and what model {model_name!r} takes and gives is "
            f"needed here, where the pipeline is built: give model_spec=ModelSpec(…), or a lock file, which "
            f"python -m beam_triton lock writes for any server of the model (docs/lock-file.md)"
        )
    return replace(options, endpoint=options.endpoint.url)


def default_of(options: InferenceOptions, encoder: InferRequestEncoder) -> DefaultValue | None:
    """What elements that fail for good yield: ``default_value``, matched to the requested outputs (None:
    nothing).

    Raises:
        ConfigurationError: it does not fit.
    """
    if options.default_value is None:
        return None
    return DefaultValue(options.default_value, encoder.model, tuple(encoder.expected_outputs))


def close_with(owner: Owner, model: RemoteModel) -> "weakref.finalize[[Channel], Owner]":
    """Close the model once its owner, which may be the model itself, is garbage.

    Beam does not tear down a DoFn whose sibling's setup failed, nor any model of ``RunInference``. A caller
    that closes the model earlier calls ``detach`` on the returned object.
    """
    # Not model.close: that would hold the model, which would never become garbage.
    closing = weakref.finalize(owner, _close_on_a_thread, model.channel)
    closing.atexit = False
    return closing


def _close_on_a_thread(channel: Channel) -> None:
    # The garbage collector runs on any thread at any time, even on one that holds a lock of this very pool.
    threading.Thread(target=channel.close, name="beam_triton-close", daemon=True).start()


def check_can_be_scored(
    spec: ModelSpec, outputs: Sequence[TensorSpec] = (), *, of_sequences: bool = False
) -> None:
    """Refuse models that cannot take batches of unrelated elements, or elements of sequences one by one;
    ``outputs`` are those that are asked for.

    Raises:
        ConfigurationError: the model is decoupled, takes sequences where unrelated elements are sent or the
            other way round, or an output of a batch has no batch dimension.
    """
    whole = [output.describe() for output in outputs if output.name in spec.whole_outputs]
    if whole and spec.max_batch_size > 1 and not of_sequences:
        others = [output.name for output in spec.outputs if output.name not in spec.whole_outputs]
        raise ConfigurationError(
            f"model {spec.name!r}: output {', '.join(whole)} has no batch dimension, though the inputs have "
            f"one: its values cannot be divided among the elements of a request. Send elements alone by "
            f'batching={{"max_batch_size": 1}}'
            + (f", or ask for the others by outputs={others!r}" if others else "")
            + "; if the metadata are wrong, describe the model by model_spec"
        )
    if spec.decoupled:
        raise ConfigurationError(
            f"model {spec.name!r} is decoupled (any number of answers to a request), which /infer refuses: "
            f"TritonGenerate takes its text"
        )
    if spec.sequence_batching and not of_sequences:
        raise ConfigurationError(
            f"model {spec.name!r} batches sequences, whose requests depend on each other; a Beam bundle "
            f"has no order. TritonSequenceInference takes the elements of each key in order"
        )
    if of_sequences and not spec.sequence_batching:
        raise ConfigurationError(
            f"model {spec.name!r} has no sequence_batching in its configuration: it knows nothing of earlier "
            f"elements. Use TritonInference; or, where the server does not say it, give "
            f"model_spec=ModelSpec(…, sequence_batching=True)"
        )
    if of_sequences and spec.correlation_id_datatype not in ("", "UINT64", "INT64"):
        raise ConfigurationError(
            f"model {spec.name!r} gets correlation IDs as {spec.correlation_id_datatype}, to which Triton "
            f"cuts those of 64 bits: sequences could get each other's state. Declare the control input of "
            f"CONTROL_SEQUENCE_CORRID as TYPE_UINT64 in its configuration"
        )
