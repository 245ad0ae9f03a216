"""`TritonTextEmbeddings` and `TritonImageEmbeddings`, for Beam's ``MLTransform`` and its RAG types."""

import copy
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.internal import cloudpickle_pickler
from apache_beam.io.filesystems import FileSystems
from apache_beam.ml.inference.base import RunInference, RunInferenceDLQ
from apache_beam.ml.rag.embeddings.base import create_rag_adapter
from apache_beam.ml.rag.types import Chunk
from apache_beam.ml.transforms.base import EmbeddingsManager, EmbeddingTypeAdapter
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.typehints import Any as AnyType

from beam_triton.credentials import REDACTED, is_reference, redact_headers, redact_url
from beam_triton.errors import (
    ConfigurationError,
    LocalProtocolError,
    RemoteProtocolError,
    TritonError,
    with_message,
)
from beam_triton.options import InferenceOptions
from beam_triton.protocol import TensorSpec, checked_parameters
from beam_triton.protocol.text import shorten
from beam_triton.remote_model import RemoteModel
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.exception_handling import (
    DeadLetters,
    ExceptionHandling,
    FailureThreshold,
    dead_letter_type,
)
from beam_triton.transforms.results import FAILURES_TAG, Failure
from beam_triton.transforms.row_results import row_type
from beam_triton.transforms.row_schema import columns_of_type
from beam_triton.transforms.run_inference import TritonModelHandler, score_batch
from beam_triton.validation import positive_integer

Preprocess = Callable[[list[Any]], Any]
"""Values in, the model's inputs out: a row for each value, or input name to rows."""


class _TritonEmbeddings(EmbeddingsManager):
    """What embeddings of texts and of images have in common."""

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        columns: list[str] | None = None,
        *,
        type_adapter: EmbeddingTypeAdapter[Any, Any] | None = None,
        input: str | None = None,
        output: str | None = None,
        preprocess: Preprocess | None = None,
        inference_args: dict[str, Any] | None = None,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        kind = type(self).__name__
        if columns is not None:
            if isinstance(columns, str) or not columns or not all(isinstance(name, str) for name in columns):
                raise ConfigurationError(
                    f"{kind}: columns must be a list of column names, such as ['text'], not {columns!r}"
                )
            if type_adapter is not None:
                raise ConfigurationError(f"{kind} takes columns or type_adapter, not both")
        if "inputs" in options:
            raise ConfigurationError(
                f"{kind}: columns are what is embedded, and input names the model's input"
            )
        if preprocess is not None and not callable(preprocess):
            raise ConfigurationError(
                f"{kind}: preprocess must be a function that takes a list of values, not {preprocess!r}"
            )
        for name, size in (("min_batch_size", min_batch_size), ("max_batch_size", max_batch_size)):
            if size is not None:
                positive_integer(f"{kind}: {name}", size)
        if output is not None:
            if options.get("outputs") is not None:
                raise ConfigurationError(f"{kind}: output names the one output, so leave outputs out")
            options["outputs"] = [output]
        self._remake = partial(
            type(self),
            endpoint,
            model_name,
            columns,
            type_adapter=type_adapter,
            input=input,
            preprocess=preprocess,
            inference_args=inference_args,
            min_batch_size=min_batch_size,
            max_batch_size=max_batch_size,
            **options,
        )
        self._is_rag = columns is None and type_adapter is None
        super().__init__(
            columns=columns,
            type_adapter=self._rag_adapter() if self._is_rag else type_adapter,
            min_batch_size=min_batch_size,
            max_batch_size=max_batch_size,
            inference_args=checked_parameters(inference_args),
        )
        self._input = input
        self._preprocess = preprocess
        self._target = endpoint, model_name
        self._options = options
        _EmbeddingHandler(self)  # Refuses options that cannot work.

    def get_model_handler(self) -> "_EmbeddingHandler":
        """A handler for Beam's ``RunInference`` over the bare values: texts or images in, vectors out."""
        return _EmbeddingHandler(self, EmbeddingTypeAdapter(input_fn=list, output_fn=_vectors_alone))

    def get_ptransform_for_processing(self, **kwargs: Any) -> "_Embed":
        """The transform that ``MLTransform`` applies, and writes into its artifacts.

        Raises:
            ConfigurationError: an option holds a secret itself, which would be written there.
        """
        _check_holds_no_secret(_EmbeddingHandler(self)._options)
        return _Embed(self)

    def _element_type(self, given: Any) -> Any:
        """Beam's type of elements that have their vectors."""
        if self._is_rag:
            return Chunk
        if self.columns is None:
            return AnyType
        fields = columns_of_type(given)
        if fields is None:
            return AnyType
        return row_type([(name, Sequence[float] if name in self.columns else kind) for name, kind in fields])

    @staticmethod
    def _rag_adapter() -> EmbeddingTypeAdapter[Any, Any]:
        raise NotImplementedError

    def _read(self, value: Any) -> Any:
        """The value as ``preprocess`` takes it, or an error that says why it cannot be embedded."""
        raise NotImplementedError

    def _to_input(self, value: Any, tensor: TensorSpec | None) -> Any:
        """The value as the model's input takes it; ``tensor`` is None where the server names none."""
        raise NotImplementedError

    def _check_input(self, tensor: TensorSpec) -> None:
        """Refuse an input that cannot take the values without ``preprocess``."""


class TritonTextEmbeddings(_TritonEmbeddings):
    """Embeds text columns in ``MLTransform``, or the chunks of Beam's RAG, on a model of a Triton server.

    ::

        MLTransform(write_artifact_location=location).with_transform(
            TritonTextEmbeddings("http://triton:8000", "e5", columns=["title", "body"])
        )

    A column's text is replaced by its vector, a ``list[float]``; without ``columns`` and ``type_adapter``, a
    chunk's vector becomes its ``embedding``. The model takes texts (BYTES), or token ids by ``preprocess``::

        tokenizer = AutoTokenizer.from_pretrained("intfloat/e5-small-v2")
        TritonTextEmbeddings(…, preprocess=partial(tokenizer, padding=True, truncation=True))

    Elements of all columns share requests. With ``MLTransform.with_exception_handling()`` an element that
    fails is a dead letter alone; Beam's own embeddings make one of its whole batch.

    Args:
        endpoint: URL of the server, a list of them for fail-over, or a `WorkerTriton`.
        model_name: the model.
        columns: names of the columns of dicts or rows that hold text.
        type_adapter: Beam's ``EmbeddingTypeAdapter``, for elements of another type.
        input: the model's input that takes the text. By default its only one.
        output: the model's output with the vectors, of shape ``[d]`` for each text. By default its only one.
        preprocess: is called with a list of texts and returns a row for each, or a mapping of input names to
            rows, as HuggingFace's tokenizers do; names that the model does not have are left out. Rows of one
            length share requests.
        inference_args: request parameters.
        min_batch_size, max_batch_size: sizes of Beam's batches, in elements; a batch is sent as several
            requests at a time, whose size is ``batching.max_batch_size``.
        options: the keyword arguments that `TritonModelHandler` and `InferenceOptions` describe. With
            ``default_value`` an element that failed has that vector.

    Raises:
        ConfigurationError: an option cannot work. Nothing is sent here.
    """

    @staticmethod
    def _rag_adapter() -> EmbeddingTypeAdapter[Any, Any]:
        return create_rag_adapter()

    def _read(self, value: Any) -> Any:
        if isinstance(value, str | bytes):
            return value
        raise LocalProtocolError(f"a text is expected, not {shorten(value)} ({type(value).__name__})")

    def _to_input(self, value: Any, tensor: TensorSpec | None) -> Any:
        return value

    def _check_input(self, tensor: TensorSpec) -> None:
        if tensor.datatype != "BYTES":
            raise ConfigurationError(
                f"its input {tensor.describe()} takes no text: give preprocess, such as a tokenizer"
            )


class TritonImageEmbeddings(_TritonEmbeddings):
    """Embeds image columns in ``MLTransform``, or the images of Beam's RAG, on a model of a Triton server.

    ::

        MLTransform(write_artifact_location=location).with_transform(
            TritonImageEmbeddings("http://triton:8000", "clip_image", columns=["image"])
        )

    An image is the bytes of a file, its path or URI (a ``str``, opened by Beam's ``FileSystems``), a Pillow
    image, or an array. An input of datatype BYTES gets the file, or the Pillow image as PNG. Any other input
    gets an array: a file or Pillow image as RGB of shape ``[height, width, 3]`` and uint8, cast to the
    input's datatype but neither scaled nor resized; a given array unchanged. All else is for ``preprocess``::

        def preprocess(files):
            images = [Image.open(io.BytesIO(file)).convert("RGB").resize((224, 224)) for file in files]
            return [np.asarray(image, np.float32).transpose(2, 0, 1) / 255 for image in images]

    It is called with a list of images, paths read to bytes, and returns what `TritonTextEmbeddings` says;
    HuggingFace's image processors do. The other arguments are those of `TritonTextEmbeddings` as well.

    Raises:
        ConfigurationError: an option cannot work, or this Beam's RAG types have no images.
    """

    @staticmethod
    def _rag_adapter() -> EmbeddingTypeAdapter[Any, Any]:
        if not hasattr(Chunk, "from_image"):
            raise ConfigurationError(
                f"the chunks of Beam {beam.__version__} hold no images: give columns, or use 2.73 or newer"
            )
        return EmbeddingTypeAdapter(input_fn=_images_of, output_fn=create_rag_adapter().output_fn)

    def _read(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        with FileSystems.open(value) as file:
            return file.read()

    def _to_input(self, value: Any, tensor: TensorSpec | None) -> Any:
        is_file = isinstance(value, bytes | bytearray | memoryview)
        if tensor is None or tensor.datatype == "BYTES":
            if is_file:
                return bytes(value)
            if hasattr(value, "save"):
                file = io.BytesIO()
                value.save(file, format="PNG")
                return file.getvalue()
            raise LocalProtocolError(
                f"the model takes the bytes of an image file, not a value of type {type(value).__name__}"
            )
        if is_file:
            value = _opened(bytes(value))
        # A Pillow image; Pillow itself is not needed for it.
        return np.asarray(value.convert("RGB")) if hasattr(value, "convert") else value


class _EmbeddingHandler(TritonModelHandler):
    """Elements in, the same elements with their vectors out."""

    def __init__(
        self,
        manager: _TritonEmbeddings,
        adapter: EmbeddingTypeAdapter[Any, Any] | None = None,
        dead_letters: DeadLetters | None = None,
    ) -> None:
        self._manager = manager
        super().__init__(*manager._target, **manager._options)
        self._adapter = adapter or manager.type_adapter
        self._dead_letters = dead_letters

    def __repr__(self) -> str:
        return f"{type(self._manager).__name__}{super().__repr__().removeprefix('TritonModelHandler')}"

    @property
    def _owner(self) -> type:
        return type(self._manager)

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        arguments = dict(super().batch_elements_kwargs())
        smallest, largest = self._manager.min_batch_size, self._manager.max_batch_size
        if largest:
            arguments["max_batch_size"] = largest
            arguments["min_batch_size"] = min(arguments.get("min_batch_size", 1), largest)
        if smallest:
            arguments["min_batch_size"] = smallest
            arguments["max_batch_size"] = max(arguments.get("max_batch_size", smallest), smallest)
        return arguments

    def _score(
        self, batch: Sequence[Any], model: RemoteModel, inference_args: dict[str, Any] | None
    ) -> list[Any]:
        values: list[Any] = []
        bounds = [0]
        refused: dict[int, TritonError] = {}
        # One element at a time, so that one which cannot be read does not take its batch along.
        for index, element in enumerate(batch):
            try:
                values += self._adapter.input_fn([element])
            except Exception as error:
                refused[index] = _as_triton_error(error)
                if self._manager._is_rag and not hasattr(element, "content"):
                    refused[index] = LocalProtocolError(
                        f"without columns, an element is a Chunk of Beam's RAG, and not of type "
                        f"{type(element).__name__}: name the columns to embed by columns=[…]"
                    )
            bounds.append(len(values))
        vectors = self._vectors(values, model, inference_args)
        results: list[Any] = []
        for index, element in enumerate(batch):
            own = vectors[bounds[index] : bounds[index + 1]]
            failure = refused.get(index) or self._first_error(own)
            if failure is None:
                # A copy: Beam's adapters change the element, which is not ours.
                results += self._adapter.output_fn([copy.copy(element)], own)
            else:
                results.append(self._failed(element, index, failure))
        return results

    def _first_error(self, own: list[Any]) -> TritonError | None:
        for position, vector in enumerate(own):
            if isinstance(vector, TritonError):
                columns = self._manager.columns
                if not columns:
                    return vector
                named = with_message(vector, f"column {columns[position]!r}: {vector.message}")
                named.__cause__ = vector
                return named
        return None

    def _failed(self, element: Any, index: int, error: TritonError) -> "_DeadLetter":
        failure = None if self._dead_letters is None else self._dead_letters.of(element, error)
        if failure is None:
            raise with_message(error, f"element {index} of its batch: {error.message}") from error
        return _DeadLetter(failure)

    def _vectors(
        self, values: list[Any], model: RemoteModel, inference_args: dict[str, Any] | None
    ) -> list[Any]:
        """For each value its vector, or the error that it failed with."""
        tensor = self._checked_input(model)
        output = self._checked_output(model)
        outcomes = self._inputs(values, tensor, [each.name for each in model.spec.inputs])
        sent = [index for index, outcome in enumerate(outcomes) if not isinstance(outcome, TritonError)]
        inputs = [outcomes[index] for index in sent]
        scored = score_batch(inputs, model, self._options, inference_args, keeps_errors=True)
        for index, result in zip(sent, scored, strict=True):
            is_error = isinstance(result, TritonError)
            outcomes[index] = result if is_error else _vector(result.inference, output)
        return outcomes

    def _inputs(self, values: list[Any], tensor: TensorSpec | None, names: list[str]) -> list[Any]:
        """For each value what the request encoder takes, or the error that says why it cannot be sent."""
        name = self._manager._input or (tensor.name if tensor is not None else None)
        outcomes = [_attempt(self._manager._read, value) for value in values]
        good = [index for index, outcome in enumerate(outcomes) if not isinstance(outcome, TritonError)]
        read = [outcomes[index] for index in good]
        if self._manager._preprocess is None:
            prepared = [_attempt(partial(self._manager._to_input, tensor=tensor), value) for value in read]
            rows = [_named(name, value) for value in prepared]
        else:
            rows = _preprocessed(self._manager._preprocess, read, name, names)
        for index, row in zip(good, rows, strict=True):
            outcomes[index] = row
        return outcomes

    def _checked_input(self, model: RemoteModel) -> TensorSpec | None:
        """The input that takes the values; None where ``preprocess`` or the server leaves that open.

        Raises:
            ConfigurationError: there is no such input, or it cannot take them.
        """
        spec, name, preprocess = model.spec, self._manager._input, self._manager._preprocess
        if not spec.inputs:
            return None
        if name is not None:
            found = [tensor for tensor in spec.inputs if tensor.name == name]
        else:
            found = [tensor for tensor in spec.inputs if not tensor.optional] or list(spec.inputs)
            if len(found) > 1 and preprocess is not None:
                return None
        if len(found) != 1:
            what = f"no input {name!r}" if name is not None else f"{len(found)} inputs"
            advice = (
                "name one of them by input=" if name is not None else "give preprocess, such as a tokenizer"
            )
            raise ConfigurationError(f"model {spec.name!r} has {what}: {advice} ({spec.describe()})")
        if preprocess is None:
            try:
                self._manager._check_input(found[0])
            except ConfigurationError as error:
                raise ConfigurationError(f"model {spec.name!r}: {error.message}") from None
        return found[0]

    def _checked_output(self, model: RemoteModel) -> str | None:
        """The output with the vectors; None where the server does not name it.

        Raises:
            ConfigurationError: it is one of several, or holds no vectors.
        """
        outputs = list(model.encoder.expected_outputs)
        if not outputs:
            return None
        if len(outputs) > 1:
            described = ", ".join(tensor.describe() for tensor in outputs)
            raise ConfigurationError(
                f"model {model.spec.name!r} has {len(outputs)} outputs: name the one with the vectors by "
                f"output= ({described})"
            )
        leading = outputs[0].shape[:-1]
        if model.spec.has_batch_dimension and any(dim != 1 for dim in leading):
            raise ConfigurationError(
                f"model {model.spec.name!r}: output {outputs[0].describe()} is no vector for each element. "
                f"If it has one for each token, pool them in the model, or name a pooled output by output="
            )
        return outputs[0].name


class _DeadLetter(NamedTuple):
    """Stands among the results of a batch for an element that failed."""

    failure: Failure


class _Embed(beam.PTransform[Any, Any]):
    """``RunInference`` over the elements; with exception handling a failed element is a dead letter alone."""

    def __init__(self, manager: _TritonEmbeddings) -> None:
        super().__init__()
        self._manager = manager
        self._handling: ExceptionHandling | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # MLTransform's artifacts are made by jsonpickle, which loses lambdas without a word.
        return _from_artifact, (cloudpickle_pickler.dumps(self._manager._remake),)

    def default_label(self) -> str:
        """Different for different columns: ``MLTransform`` gives its steps no other name."""
        columns = ", ".join(self._manager.columns or ())
        return f"{type(self._manager).__name__}({columns})"

    def annotations(self) -> dict[str, Any]:
        return {**super().annotations(), "model_handler": str(self._manager.get_model_handler())}

    def with_exception_handling(
        self,
        *,
        exc_class: Any = Exception,
        use_subprocess: bool = False,
        threshold: float = 1.0,
        timeout: float | None = None,
    ) -> "_Embed":
        """The arguments of ``RunInference.with_exception_handling``; requests keep ``timeout_seconds``."""
        self._handling = ExceptionHandling(
            main_tag="results",
            dead_letter_tag=FAILURES_TAG,
            exc_class=exc_class,
            use_subprocess=use_subprocess,
            threshold=threshold,
            threshold_windowing=None,
            timeout=timeout,
            error_handler=None,
            on_failure_callback=None,
        )
        return self

    def expand(self, pcoll: PCollection[Any]) -> Any:
        manager, handling = self._manager, self._handling
        dead_letters = None if handling is None else handling.dead_letters
        handler = _EmbeddingHandler(manager, dead_letters=dead_letters)
        results = pcoll | RunInference(handler, inference_args=manager.inference_args)
        if handling is None:
            results.element_type = manager._element_type(pcoll.element_type)
            return results
        separated = results | "Separate" >> beam.ParDo(_separate).with_outputs(FAILURES_TAG, main="results")
        results, failures = separated["results"], separated[FAILURES_TAG]
        results.element_type = manager._element_type(pcoll.element_type)
        failures.element_type = dead_letter_type(pcoll.element_type)
        if handling.threshold < 1:
            limit = FailureThreshold(handling.threshold, None, has_default=False)
            _ = (pcoll, results, failures) | "Threshold" >> limit
        return results, RunInferenceDLQ(failures, [], [])


def _separate(result: Any) -> Iterable[Any]:
    if isinstance(result, _DeadLetter):
        yield TaggedOutput(FAILURES_TAG, result.failure)
    else:
        yield result


def _from_artifact(pickled: bytes) -> _Embed:
    embed: _Embed = cloudpickle_pickler.loads(pickled)().get_ptransform_for_processing()
    return embed


def _check_holds_no_secret(options: InferenceOptions) -> None:
    endpoint = options.endpoint
    if isinstance(endpoint, WorkerTriton):
        endpoint = endpoint.model_repository
    endpoints = [endpoint] if isinstance(endpoint, str) else endpoint
    headers, proxies = options.headers or {}, options.proxies or {}
    secrets = [(f"header {name}", headers[name]) for name in headers if _is_hidden(name)]
    secrets += [("auth_token", options.auth_token)] if options.auth_token is not None else []
    urls = [("endpoint", url) for url in endpoints] + [("proxies", url) for url in proxies.values() if url]
    secrets += [(what, url) for what, url in urls if callable(url) or redact_url(url) != url]
    for what, secret in secrets:
        if not is_reference(secret):
            raise ConfigurationError(
                f"{what} holds a secret, which MLTransform would write into its artifacts: give auth_token, "
                f"headers or proxies that are 'env:NAME', 'file:PATH' or a callable"
            )


def _is_hidden(header: str) -> bool:
    return redact_headers({header: ""})[header] == REDACTED


def _vectors_alone(values: Sequence[Any], vectors: Sequence[Any]) -> list[Any]:
    return list(vectors)


def _images_of(items: Sequence[Any]) -> list[Any]:
    for item in items:
        if not item.content.image:
            raise ValueError(f"{type(item).__name__} {item.id} holds no image")
    return [item.content.image for item in items]


def _opened(file: bytes) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigurationError(
            "the model takes an array, and an image file is opened by Pillow, which is not installed: "
            "pip install pillow, or give arrays"
        ) from None
    return Image.open(io.BytesIO(file))


def _attempt(function: Callable[[Any], Any], value: Any) -> Any:
    """What the function makes of the value, or the error that it raised."""
    try:
        return function(value)
    except ConfigurationError:
        raise
    except Exception as error:
        return _as_triton_error(error)


def _as_triton_error(error: Exception, what: str = "") -> TritonError:
    if isinstance(error, TritonError):
        return error
    made = LocalProtocolError(f"{what}{type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def _named(name: str | None, value: Any) -> Any:
    return value if name is None or isinstance(value, TritonError) else {name: value}


def _preprocessed(preprocess: Preprocess, values: list[Any], name: str | None, names: list[str]) -> list[Any]:
    """For each value what ``preprocess`` makes of it, or its error."""
    if not values:
        return []
    try:
        return _rows(preprocess(values), len(values), name, names)
    except Exception as error:
        if len(values) == 1:
            return [_as_triton_error(error, "preprocess failed: ")]
        # One value that cannot be preprocessed does not take the others along.
        return [row for value in values for row in _preprocessed(preprocess, [value], name, names)]


def _rows(made: Any, count: int, name: str | None, names: list[str]) -> list[Any]:
    by_name = isinstance(made, Mapping)
    columns = (
        {key: rows for key, rows in made.items() if not names or key in names} if by_name else {"": made}
    )
    for key, rows in columns.items():
        if len(rows) != count:
            of = f" of {key!r}" if by_name else ""
            raise LocalProtocolError(f"preprocess returned {len(rows)} rows{of} for {count} values")
    if not by_name:
        return [_named(name, row) for row in made]
    if not columns:
        raise LocalProtocolError(
            f"preprocess returned {', '.join(map(repr, made)) or 'nothing'}, and the model's inputs are "
            f"{', '.join(map(repr, names))}"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _vector(outputs: Mapping[str, Any], name: str | None) -> list[float] | TritonError:
    if name is None and len(outputs) == 1:
        (name,) = outputs
    if name is None:
        return RemoteProtocolError(
            f"the answer has {len(outputs)} outputs: name one of {list(outputs)} by output="
        )
    array = outputs[name]
    if array.dtype.kind not in "fiu":
        return RemoteProtocolError(f"output {name!r} holds {array.dtype}, and a vector holds numbers")
    # Leading dimensions of 1 are the batch of a model that has it in its shapes.
    if array.ndim == 0 or not array.size or array.size != array.shape[-1]:
        return RemoteProtocolError(
            f"output {name!r} has the shape {list(array.shape)}, and an embedding is one vector of shape [d]"
        )
    vector: list[float] = array.reshape(-1).astype(float).tolist()
    return vector
