"""`TritonEnrichmentHandler`, for Beam's ``Enrichment``."""

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import apache_beam as beam
import numpy as np

from beam_triton.dispatch.channel import Channel
from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import ModelSpec
from beam_triton.protocol.paths import model_path
from beam_triton.remote_model import RemoteModel
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.model_dofn import close_with, open_described, open_model
from beam_triton.transforms.row_inputs import Columns, InputReader, checked_inputs
from beam_triton.transforms.row_results import row_of_outputs
from beam_triton.transforms.row_schema import RowSchema
from beam_triton.transforms.run_inference import score_batch
from beam_triton.validation import positive, positive_integer

try:
    from apache_beam.io import requestresponse
    from apache_beam.transforms.enrichment import EnrichmentSourceHandler
except ImportError:
    requestresponse = None  # type: ignore[assignment]

    class EnrichmentSourceHandler:  # type: ignore[no-redef]
        """Stands for Beam's, which cannot be imported."""


class TritonEnrichmentHandler(EnrichmentSourceHandler):  # type: ignore[type-arg]
    """Adds a model's outputs to rows, for Beam's ``Enrichment``; needs ``apache-beam[gcp]``.

    ::

        handler = TritonEnrichmentHandler("http://triton:8000", "digits", inputs={"image": "pixels"})
        enriched = rows | Enrichment(handler, timeout=None)

    Choose it for a pipeline that has ``Enrichment``'s joins, or its Redis cache where the same inputs come
    again and again. Otherwise `TritonInference` is faster and loses less: here one batch at a time is with
    the server, a row that fails takes its batch along (``default_value`` avoids that), there are no dead
    letters, and the metrics are Beam's alone.

    Columns feed inputs, and outputs become columns, as with ``TritonInference(…, output="row")``. Where a row
    has a column of an output's name, Beam's default join keeps the row's: give ``prefix``, or names by
    ``outputs``.

    Failures are Beam's: ``UserCodeQuotaException`` where the server is overloaded,
    ``UserCodeTimeoutException`` after ``timeout_seconds``, ``UserCodeExecutionException`` for everything
    else; ``Enrichment`` repeats the first two, although the library has done so already. Its own ``timeout``
    (30 seconds) does not end a call, but discards what comes later and repeats it: with ``timeout=None`` the
    deadlines are those of the options.

    Args:
        endpoint: URL of the server, a list of them for fail-over, or a `WorkerTriton`.
        model_name: the model.
        inputs: input name to the column that feeds it, or to several columns of one value each; the others
            are fed by columns of their own name.
        outputs: names of outputs, or output name to column; by default all, under their own names.
        prefix: of the names of the outputs' columns.
        text_outputs: outputs whose BYTES are UTF-8 text and become ``str``: ``True`` for all, or some names.
            The Redis cache holds JSON, which has no bytes.
        min_batch_size, max_batch_size: rows in a call; a call is sent as several requests at a time. In a
            batch, Beam gives rows the timestamp of the end of their window; 1 sends every row alone, and
            keeps its own.
        max_batch_duration_secs: how long a batch is collected, across bundles; by default it ends with its
            bundle.
        options: the keyword arguments that `InferenceOptions` describes.

    Raises:
        ConfigurationError: an option cannot work, or google-api-core is not installed.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        *,
        inputs: Mapping[str, Columns] | None = None,
        outputs: Mapping[str, str] | Sequence[str] | None = None,
        prefix: str = "",
        text_outputs: bool | Sequence[str] = False,
        min_batch_size: int = 1,
        max_batch_size: int = 1000,
        max_batch_duration_secs: float | None = None,
        **options: Any,
    ) -> None:
        if requestresponse is None:
            raise ConfigurationError(
                "TritonEnrichmentHandler needs google-api-core, as Beam's Enrichment does: "
                "pip install apache-beam[gcp]"
            )
        model_path(model_name)  # Refuses what is not a name.
        self._model_name = model_name
        names = outputs if isinstance(outputs, Mapping) else None
        self._schema = RowSchema(checked_inputs(inputs), None, prefix, names, text_outputs)
        asked = outputs if names is None else list(names)
        self._options = InferenceOptions.from_options(
            {"endpoint": endpoint, "outputs": asked, **options}, owner=type(self)
        )
        positive_integer("min_batch_size", min_batch_size)
        positive_integer("max_batch_size", max_batch_size)
        if min_batch_size > max_batch_size:
            raise ConfigurationError(
                f"min_batch_size={min_batch_size} is above max_batch_size={max_batch_size}"
            )
        self._batching: dict[str, Any] = {"min_batch_size": min_batch_size, "max_batch_size": max_batch_size}
        if max_batch_duration_secs is not None:
            positive("max_batch_duration_secs", max_batch_duration_secs)
            self._batching["max_batch_duration_secs"] = max_batch_duration_secs
        self._model: RemoteModel | None = None
        self._release: weakref.finalize[[Channel], TritonEnrichmentHandler] | None = None

    def __repr__(self) -> str:
        # Beam names the namespace of its metrics after it.
        return f"TritonEnrichmentHandler({self._model_name!r})"

    def __enter__(self) -> "TritonEnrichmentHandler":
        """Open the model and take a reference to the shared session."""
        self._model = open_model(self._options, self._model_name)
        self._release = close_with(self, self._model)
        return self

    def __exit__(self, *raised: object) -> None:
        """Release the reference to the shared session; a second call does nothing."""
        if self._release is not None:
            self._release.detach()
        if self._model is not None:
            self._model.close()
        self._model = None

    def __call__(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """``(row, row of outputs)``, or a list of them for a list of rows.

        Raises:
            UserCodeExecutionException, or one of its children: a row failed for good.
        """
        rows = request if isinstance(request, list) else [request]
        try:
            answered = list(zip(rows, self._answers(rows), strict=True))
        except TritonError as error:
            kind = requestresponse.UserCodeExecutionException
            if error.is_overload:
                kind = requestresponse.UserCodeQuotaException
            elif isinstance(error, TimeoutError):
                kind = requestresponse.UserCodeTimeoutException
            raise kind(f"{type(error).__name__}: {error}") from error
        return answered if isinstance(request, list) else answered[0]

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Arguments for Beam's ``BatchElements``; none where every row is sent alone."""
        return self._batching if self._batching["max_batch_size"] > 1 else {}

    def get_cache_key(self, request: Any) -> str:
        """The model with its version, and a hash of the row's inputs; other columns do not count.

        Raises:
            TritonError: a column is missing, or the server does not describe the model.
        """
        options = self._options
        asked = (options.urls, options.outputs, options.parameters, options.classification, self._schema)
        hashed = hashlib.sha256(repr(asked).encode())
        for name, value in sorted(InputReader(self._spec, self._schema.inputs)(request).items()):
            kind, data = _hashable(value)
            hashed.update(repr((name, kind, len(data))).encode() + data)
        return f"{self._spec.model_id}:{hashed.hexdigest()}"

    @cached_property
    def _spec(self) -> ModelSpec:
        """The model as rows see it; the cache asks a handler that is not open."""
        model = open_described(self._options, self._model_name)
        model.close()
        return model.encoder.element_model

    def _answers(self, rows: list[Any]) -> list[beam.Row]:
        model, options = self._model, self._options
        if model is None:
            raise ConfigurationError(f"{self!r} is not open: call it within a with block, as Enrichment does")
        columns = self._schema.output_columns(model.encoder, options.classification or {})
        results = score_batch(rows, model, options, inputs=self._schema.inputs)
        return [row_of_outputs(columns, result.inference) for result in results]


def _hashable(value: Any) -> tuple[str, bytes]:
    if isinstance(value, str | bytes):
        return type(value).__name__, value if isinstance(value, bytes) else value.encode()
    try:
        array = np.asarray(value)
    except ValueError:
        return "repr", repr(value).encode()
    if array.dtype.hasobject:
        return "repr", repr(array.tolist()).encode()
    return f"{array.dtype.str}{array.shape}", array.tobytes()
