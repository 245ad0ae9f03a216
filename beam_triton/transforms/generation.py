"""`TritonGenerate`: text out of decoupled models and language models, by Triton's generate extension."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from typing import Any, Optional

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.pvalue import PCollection
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton.client import TritonClient
from beam_triton.dispatch.activity import ACTIVITY
from beam_triton.dispatch.call import Call
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.request_head import JSON_HEADERS, HttpRequest
from beam_triton.errors import (
    ConfigurationError,
    InferenceError,
    LocalProtocolError,
    ModelExecutionError,
    RemoteProtocolError,
    TritonError,
    with_message,
)
from beam_triton.options import InferenceOptions
from beam_triton.protocol import error_from_response
from beam_triton.protocol.paths import generate_path
from beam_triton.protocol.text import printable, shorten
from beam_triton.remote_model import RemoteModel, new_request_id
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.bundle import dead_letter, with_own_windows
from beam_triton.transforms.column_check import check_kept
from beam_triton.transforms.exception_handling import DeadLetters, dead_letter_type
from beam_triton.transforms.inference import TritonInference, key_and_element, keyed_type, pass_on
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import ModelDoFn, close_with, display_data_of
from beam_triton.transforms.results import Outputs, failure_of, prediction_result, split_key
from beam_triton.transforms.row_inputs import Columns, InputReader, checked_inputs, columns_of, said_of
from beam_triton.transforms.row_results import Fields, RowFailures, row_type
from beam_triton.transforms.row_schema import Keep, RowSchema, columns_of_type
from beam_triton.transport.event_stream import EventStream, StreamLimits
from beam_triton.transport.exchange import Exchange, is_event_stream
from beam_triton.validation import positive

# What options of tensors in batches would say here, and the option that does.
_NO_MEANING = {
    "batching": "the server batches what is in flight: see max_concurrent_requests",
    "binary": "requests are JSON",
    "classification": "answers are text",
    "compression": "Triton takes no compressed requests here",
    "default_value": "use with_exception_handling",
    "input_parameters": "use parameters",
    "outputs": "use output_field",
    "politeness": "the model's statistics do not show a stream's load; use parameters for a priority",
    "priority": "use parameters",
    "request_parameters": "use parameters",
    "response_compression": "a compressed stream comes late",
}
_TIMEOUT_SECONDS = 600.0
_BETWEEN_TOKENS_SECONDS = 60.0
# For a worker to find the model, however long a generation may take.
_SETUP_SECONDS = 30.0
_OWN_FIELDS = ("id", "model_name", "model_version")


@dataclass(frozen=True, kw_only=True)
class Generating:
    """What to ask for and what to make of it; the arguments are those of `TritonGenerate`.

    ``kept`` are the columns that results in rows begin with; None makes PredictionResults.

    Raises:
        ConfigurationError: an argument cannot work.
    """

    prompt_field: str = "text_input"
    inputs: Mapping[str, Columns] | None = None
    parameters: Mapping[str, Any] | None = None
    output_field: str = "text_output"
    stream: bool = False
    api: str = "generate_stream"
    first_token_seconds: float | None = None
    between_tokens_seconds: float | None = _BETWEEN_TOKENS_SECONDS
    repeat_started: bool = False
    kept: Fields | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", checked_inputs(self.inputs))
        for name in ("prompt_field", "output_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigurationError(f"{name} must be the name of a field, not {getattr(self, name)!r}")
        for name in ("first_token_seconds", "between_tokens_seconds"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("stream", "repeat_started"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.api not in ("generate_stream", "generate"):
            raise ConfigurationError(f'api must be "generate_stream" or "generate", not {self.api!r}')
        if self.stream and self.api == "generate":
            raise ConfigurationError('stream=True needs api="generate_stream": "generate" gives one answer')
        if not isinstance(self.parameters or {}, Mapping):
            raise ConfigurationError(f"parameters must map names to values, not {self.parameters!r}")
        for name, value in (self.parameters or {}).items():
            if not isinstance(name, str):
                raise ConfigurationError(f"parameters: a name must be text, not {name!r}")
            if isinstance(value, Mapping):
                if set(value) != {"column"} or not isinstance(value["column"], str):
                    raise ConfigurationError(
                        f"parameters: {name!r} takes a value, a callable, or {{'column': 'its column'}}, not "
                        f"{value!r}"
                    )
            elif not callable(value):
                try:
                    _json_bytes(value)
                except (TypeError, ValueError):
                    raise ConfigurationError(
                        f"parameters: {name!r} cannot be written as JSON: {shorten(value)}"
                    ) from None

    @property
    def limits(self) -> StreamLimits:
        """How long events may take."""
        given = {
            name: getattr(self, name)
            for name in ("first_token_seconds", "between_tokens_seconds")
            if getattr(self, name) is not None
        }
        return StreamLimits(**given, repeat_started=self.repeat_started)

    @property
    def fields(self) -> Fields:
        """Names and types of the columns of results in rows."""
        index: Fields = [("index", int)] if self.stream else []
        return [*(self.kept or ()), (self.output_field, str), *index]

    def body(self, element: Any, columns_to_inputs: InputReader, request_id: str) -> bytes:
        """The request of one element.

        Raises:
            LocalProtocolError: the element is no prompt, lacks a column, or cannot be written as JSON.
        """
        inputs = split_key(element)[2]
        columns = columns_of(inputs)
        if columns is None and not isinstance(inputs, str):
            raise LocalProtocolError(
                f"an element is a prompt (str), a mapping or a row, not a {type(inputs).__name__}: "
                f"{shorten(inputs)}"
            )
        fields = {self.prompt_field: inputs} if columns is None else dict(columns_to_inputs(inputs))
        parameters = {"stream": True} if self.stream and "stream" not in fields else {}
        for name, value in (self.parameters or {}).items():
            if isinstance(value, Mapping) or callable(value):
                value = said_of(element, value, f"parameter {name!r}")
            # Triton refuses null, and a model has its own default.
            if value is not None:
                parameters[name] = value
            else:
                parameters.pop(name, None)
        document = {"id": request_id, **{name: each for name, each in fields.items() if each is not None}}
        if parameters:
            document["parameters"] = parameters
        try:
            return _json_bytes(document)
        except (TypeError, ValueError) as error:
            raise LocalProtocolError(f"the element cannot be written as JSON: {error}") from None

    def answers(self, events: Iterable[str | bytes], about: str) -> list[dict[str, Any]]:
        """The answers that a stream's events are.

        Raises:
            ModelExecutionError: one is an error.
            RemoteProtocolError: one is no answer, or has no text.
        """
        answers: list[dict[str, Any]] = []
        for event in events:
            try:
                document = json.loads(event)
            except (ValueError, RecursionError):
                document = None
            if not isinstance(document, dict):
                raise RemoteProtocolError(f"{about}: the server sent no JSON object but {shorten(event)}")
            if "error" in document:
                raise _error_event(printable(str(document["error"]), 1000), about)
            if not isinstance(document.get(self.output_field), str):
                found = ", ".join(map(shorten, document)) or "none"
                raise RemoteProtocolError(
                    f"{about}: the answer has no text {self.output_field!r}; its fields: {found}. Name the "
                    f"field of the text by output_field"
                )
            answers.append(document)
        return answers

    def texts_before(self, events: Iterable[str]) -> list[str]:
        """The texts of a failed stream's events, up to the one that is no answer."""
        texts: list[str] = []
        for event in events:
            try:
                texts += [each[self.output_field] for each in self.answers([event], "")]
            except TritonError:
                break
        return texts

    def results(self, element: Any, answers: Sequence[dict[str, Any]], model_id: str) -> Iterator[Any]:
        """The results of one element: one, or with ``stream`` one a chunk; keyed as the element is."""
        is_keyed, key, example = split_key(element)
        name = self.output_field
        if not self.stream:
            # What else a model says, such as why it ended, belongs to the last answer.
            last = answers[-1] if answers else {}
            answers = [{**last, name: "".join([each[name] for each in answers])}]
        for index, answer in enumerate(answers):
            own = {"index": index} if self.stream else {}
            if self.kept is None:
                others = {field: each for field, each in answer.items() if field not in _OWN_FIELDS}
                version = answer.get("model_version")
                served = f"{model_id}:{version}" if version else model_id
                result: Any = prediction_result((example, {**others, **own}, served))
            else:
                columns = columns_of(example) or {}
                kept = {column: columns.get(column) for column, _ in self.kept}
                result = beam.Row(**kept, **{name: answer[name]}, **own)
            yield (key, result) if is_keyed else result


@dataclass(frozen=True)
class GenerationFailures(RowFailures):
    """Makes rows of failures, whose last column is the text that came before."""

    @property
    def fields(self) -> Fields:
        """Names and types of a failure's columns."""
        # Beam's schemas do not read the spelling `str | None`.
        return [*super().fields, ("generated", Optional[str])]  # noqa: UP045

    def __call__(self, element: Any, error: TritonError) -> Any:
        """The row of one failure, keyed if the element is."""
        is_keyed, key, failure = split_key(super().__call__(element, error))
        failure = beam.Row(**failure.__dict__, generated=error.generated)
        return (key, failure) if is_keyed else failure


class BundleGenerator:
    """Generates the texts of one bundle's elements, many streams at a time on its thread."""

    def __init__(
        self,
        model: RemoteModel,
        options: InferenceOptions,
        generating: Generating,
        dead_letters: DeadLetters | None,
    ) -> None:
        spec = model.spec
        self._generating = generating
        self._dead_letters = dead_letters
        self._model_name = spec.name
        self._dispatcher: Dispatcher[tuple[WindowedValue, int]] = Dispatcher(model.channel)
        self._columns_to_inputs = InputReader(spec, generating.inputs)
        self._prompt_error = ""
        if spec.inputs and generating.prompt_field not in {each.name for each in spec.inputs}:
            self._prompt_error = (
                f"there is no input {generating.prompt_field!r} for a prompt: name it by prompt_field, or "
                f"give rows; {spec.describe()}"
            )
        streams = generating.api == "generate_stream"
        self._path = generate_path(spec.name, options.model_version, stream=streams)
        self._about = f"{generating.api} of model {spec.name!r}"
        self._metrics = InferenceMetrics(model.channel)
        self._taken = 0
        self._outputs: list[Iterable[Any]] = []

    def add(self, windowed_value: WindowedValue) -> Iterable[Any]:
        """Send an element's request; waits only for a slot. Gives outputs that are ready."""
        index = self._taken
        self._taken += 1
        request_id = new_request_id()
        element = windowed_value.value
        try:
            if self._prompt_error and isinstance(split_key(element)[2], str):
                raise LocalProtocolError(self._prompt_error)
            body = self._generating.body(element, self._columns_to_inputs, request_id)
        except TritonError as error:
            self._fail(windowed_value, index, error)
        else:
            request = HttpRequest(
                "POST",
                self._path,
                JSON_HEADERS,
                (body,),
                len(body),
                request_id,
            )
            self._dispatcher.submit(
                (windowed_value, index), request, self._read, stream_limits=self._generating.limits
            )
            self._dispatcher.step()
        self._take_ended()
        return self._take_outputs()

    def finish(self) -> Iterable[Any]:
        """Wait until every stream has ended, and give the remaining outputs."""
        while self._dispatcher.in_flight:
            self._dispatcher.wait()
            self._take_ended()
        self._take_ended()
        self._metrics.flush()
        return self._take_outputs()

    def cancel(self) -> None:
        """Abandon whatever is in flight; the server stops generating. A second call does nothing."""
        self._dispatcher.cancel()

    def _read(self, exchange: Exchange) -> list[dict[str, Any]]:
        head, stream = exchange.head, exchange.stream
        assert head is not None and stream is not None
        if head.status != 200:
            raise error_from_response(
                head.status,
                _first_event(exchange.body) if is_event_stream(head) else exchange.body,
                model_name=self._model_name,
                what=self._generating.api,
                retry_after=head.get("retry-after"),
                location=head.get("location"),
                now=datetime.now(timezone.utc),
            )
        if not is_event_stream(head):
            return self._generating.answers([bytes(exchange.body)], self._about)
        answers = self._generating.answers(stream.events, self._about)
        if stream.is_within_event:
            raise RemoteProtocolError(
                f"{self._about}: the stream ended within an event, after {len(answers)} complete ones"
            )
        return answers

    def _take_ended(self) -> None:
        completed = self._dispatcher.completed
        while completed:
            (windowed_value, index), call = completed.popleft()
            self._metrics.request_ended(1, call.record)
            if call.error is None:
                self._count_tokens(call, len(call.result))
                self._metrics.count("elements")
                self._outputs.append(Outputs(self._results, windowed_value, call.result))
            else:
                self._fail(windowed_value, index, self._with_what_came(call, call.error))
        self._metrics.take_waits(self._dispatcher)

    def _results(self, windowed_value: WindowedValue, answers: list[dict[str, Any]]) -> Iterator[Any]:
        results = self._generating.results(windowed_value.value, answers, self._model_name)
        return map(windowed_value.with_value, results)

    def _with_what_came(self, call: Call, error: TritonError) -> TritonError:
        if call.stream is None:
            return error
        texts = self._generating.texts_before(call.stream.events)
        self._count_tokens(call, len(texts))
        text = "".join(texts)
        whole = with_message(
            error, f"{error.message}; the text before it: {text!r}" if text else error.message
        )
        whole.generated = text
        return whole

    def _count_tokens(self, call: Call, count: int) -> None:
        if call.stream is not None and count:
            self._metrics.stream_ended(call.stream, count)

    def _fail(self, windowed_value: WindowedValue, index: int, error: TritonError) -> None:
        self._metrics.count("elements")
        self._metrics.count("failures")
        ACTIVITY.failed(error)
        self._outputs.append((dead_letter(self._dead_letters, windowed_value, index, error),))

    def _take_outputs(self) -> Iterable[Any]:
        outputs, self._outputs = self._outputs, []
        return Outputs(chain.from_iterable, outputs) if outputs else ()


class TritonGenerateDoFn(ModelDoFn):
    """The DoFn of `TritonGenerate`, with the same arguments; failures leave as outputs tagged ``failures``
    where ``with_exception_handling`` is set, otherwise the first one fails the bundle.

    Beam's ``AsyncWrapper`` may wrap it: what calls ``process`` without an element's window gets the results
    of that element when they are complete, on any number of threads.

    Raises:
        ConfigurationError: at construction, for options that cannot work.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        *,
        generating: Generating | None = None,
        with_exception_handling: bool | DeadLetters = False,
        **options: Any,
    ) -> None:
        own = {each.name: options.pop(each.name) for each in fields(Generating) if each.name in options}
        self._generating = generating or Generating(**own)
        super().__init__(generate_options(endpoint, options), model_name)
        self._dead_letters = DeadLetters.of_option(with_exception_handling)
        self._failure = ""

    def display_data(self) -> dict[str, Any]:
        """What a runner's job page shows; endpoints and headers without secrets."""
        given, defaults = self._generating, Generating()
        names = [each.name for each in fields(Generating) if each.name != "kept"]
        more = {n: str(getattr(given, n)) for n in names if getattr(given, n) != getattr(defaults, n)}
        return display_data_of(self._options, self._model_name, **more)

    def setup(self) -> None:
        """Ask for the model, and take a reference to the shared session."""
        wait_seconds = min(_SETUP_SECONDS, self._options.timeout_seconds)
        with TritonClient.from_inference_options(self._options) as client:
            self._model = client.open_model(self._model_name, wait_seconds=wait_seconds)
        self._release = close_with(self, self._model)
        field, spec = self._generating.output_field, self._model.spec
        if spec.outputs and field not in {each.name for each in spec.outputs}:
            self.teardown()
            raise ConfigurationError(
                f"there is no output {field!r}: name the field of the text by output_field; {spec.describe()}"
            )

    def start_bundle(self) -> None:
        """Start with nothing in flight."""
        self._cancel()
        self._failure = ""

    def process(self, element: Any, windowed_value: Any = beam.DoFn.WindowedValueParam) -> Iterable[Any]:
        """Send one element; gives the results that are ready, of this and earlier elements."""
        if not isinstance(windowed_value, WindowedValue):
            return self._at_once(element)
        self._check_use()
        if self._scorer is None:
            self._scorer = self._new_scorer()
        try:
            outputs: Iterable[Any] = self._scorer.add(windowed_value)
        except BaseException as error:
            self._failure = repr(error)
            self._cancel()
            raise
        if outputs and len(windowed_value.windows) != 1:
            return with_own_windows(outputs)
        return outputs

    def finish_bundle(self) -> Iterable[Any]:
        """Wait until nothing is in flight, and give the remaining results."""
        self._check_use()
        if self._scorer is None:
            return ()
        return self._finish()

    def _check_use(self) -> None:
        """Stop whoever catches what ``process`` raised and goes on, as Beam's ``ParDo`` may."""
        if self._failure:
            raise ConfigurationError(
                f"ParDo(TritonGenerateDoFn(…)).with_exception_handling() cannot know which element failed, "
                f"and would lose those in flight: use TritonGenerate(…).with_exception_handling(). "
                f"The bundle failed by {self._failure}"
            )

    def _new_scorer(self) -> BundleGenerator:
        assert self._model is not None, "setup has not been called"
        return BundleGenerator(self._model, self._options, self._generating, self._dead_letters)

    def _at_once(self, element: Any) -> Iterator[Any]:
        scorer = self._new_scorer()
        try:
            given = beam.transforms.window.GlobalWindows.windowed_value(element)
            for output in chain(scorer.add(given), scorer.finish()):
                if isinstance(output, beam.pvalue.TaggedOutput):
                    yield beam.pvalue.TaggedOutput(output.tag, output.value.value)
                else:
                    yield output.value
        finally:
            scorer.cancel()


class TritonGenerate(TritonInference):
    """Generates text on a decoupled or language model of a Triton server (vLLM, TensorRT-LLM, Python).

    ::

        texts = prompts | TritonGenerate("http://triton:8000", "llama", parameters={"max_tokens": 200})
        chunks = rows | TritonGenerate(..., stream=True, output="row")
        texts, failures = prompts | TritonGenerate(...).with_exception_handling()

    An element is a prompt (``str``), a mapping or row whose columns feed the model's inputs of the same name,
    or ``(key, element)``. The result is ``PredictionResult(example, inference, model_id)``, as RunInference's
    and this library's other results are, so that what takes those takes these. ``inference`` maps
    ``output_field`` to the joined text, and the other fields of the last answer (``finish_reason``, …) to
    their values. With ``output="row"``, for sinks and SQL, it is a ``beam.Row`` with a schema: the kept
    columns, then the text. Results keep the element's key, timestamp and windows.

    With ``stream=True`` each chunk is a result of its own, with its ``index`` from 0. They leave together
    once the stream has ended: a runner commits a bundle as a whole, so chunks that left earlier would arrive
    no sooner, and those of a request that is repeated would come twice.

    Many streams are in flight on one thread, ``max_concurrent_requests`` of them in a process; ``process``
    sends, ``finish_bundle`` waits. docs/llm.md says what that means where a text takes minutes.

    Args:
        endpoint: URL of the server, a list of them for fail-over, or a `WorkerTriton`.
        model_name: the model; of TensorRT-LLM the ensemble or the BLS model.
        prompt_field: the input that a prompt feeds.
        inputs: input name to the column of rows that feeds it.
        parameters: sent with each request: ``{"temperature": 0.2}`` for all; a value that is a callable takes
            the element, with its key if it has one; ``{"max_tokens": {"column": "limit"}}`` reads a column.
            None leaves a parameter out.
        output_field: the output that holds the text.
        stream: one result a chunk. ``"stream": True`` is sent with the parameters then, unless they say
            something else; vLLM and TensorRT-LLM answer in one piece without it. Joined texts may be streamed
            by ``parameters={"stream": True}``: failures then carry what came before.
        api: ``"generate_stream"`` takes any number of answers; ``"generate"`` is for fronts that pass no
            server-sent events, and for models that give exactly one.
        output: ``"row"`` makes results rows; ``None`` makes them PredictionResults.
        keep: columns of the element that its row keeps: a list, ``"all"``, or column name to type where the
            elements' type has no schema. By default all, if it has one.
        first_token_seconds: from sending to the first event; ``None``: only ``timeout_seconds`` counts.
        between_tokens_seconds: from one event to the next; ``None``: the same.
        repeat_started: whether a request that fails after events came may be sent again, from its start.
            What failed before its first event is repeated as ``retry`` says.
        options: the keyword arguments of `InferenceOptions` that are not about tensors and batches.
            ``timeout_seconds``, for the whole of a generation, is 600 by default.

    A failure's error has what came before it in ``generated``, its message ends with it, and a row of a
    failure has a column ``generated``.

    Raises:
        ConfigurationError: an option cannot work; with ``output="row"``, the columns to keep are not known.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: str,
        *,
        prompt_field: str = "text_input",
        inputs: Mapping[str, Columns] | None = None,
        parameters: Mapping[str, Any] | None = None,
        output_field: str = "text_output",
        stream: bool = False,
        api: str = "generate_stream",
        output: str | None = None,
        keep: Keep = None,
        first_token_seconds: float | None = None,
        between_tokens_seconds: float | None = _BETWEEN_TOKENS_SECONDS,
        repeat_started: bool = False,
        **options: Any,
    ) -> None:
        beam.PTransform.__init__(self)
        if output not in (None, "row"):
            raise ConfigurationError(f'output must be "row" or None, not {output!r}')
        if keep is not None and output is None:
            raise ConfigurationError('keep needs output="row"')
        self._generating = Generating(
            prompt_field=prompt_field,
            inputs=inputs,
            parameters=parameters,
            output_field=output_field,
            stream=stream,
            api=api,
            first_token_seconds=first_token_seconds,
            between_tokens_seconds=between_tokens_seconds,
            repeat_started=repeat_started,
        )
        self._is_row = output == "row"
        self._keep = RowSchema(keep=keep).keep
        self._options = generate_options(endpoint, options)
        self._model_name = model_name
        self._side_inputs = {}
        dofn: Any = partial(
            TritonGenerateDoFn, endpoint, model_name, **{"generating": self._generating} | options
        )
        self._new_dofn = dofn
        self._new_dofn()
        self._handling = None
        self._timeout = {}

    def default_label(self) -> str:
        """The step's name where the user does not give one."""
        return f"TritonGenerate({self._model_name})"

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results, or with exception handling ``(results, failures)``."""
        key_type, element_type = key_and_element(pcoll.element_type)
        output_type: Any = keyed_type(key_type, PredictionResult)
        failure_type, make_failure = dead_letter_type(pcoll.element_type), failure_of
        arguments: dict[str, Any] = dict(self._timeout)
        if self._is_row:
            columns = columns_of_type(element_type)
            made = replace(self._generating, kept=self._kept(columns, element_type))
            # Failures that are generated again bring a column `generated` from the first time.
            own = columns and [field for field in columns if field[0] != "generated"]
            make_failure = GenerationFailures(own)
            output_type, failure_type = (
                keyed_type(key_type, row_type(each.fields)) for each in (made, make_failure)
            )
            arguments["generating"] = made
        if self._handling is not None:
            arguments["with_exception_handling"] = replace(self._handling.dead_letters, make=make_failure)
        results, failures = self._score(pcoll, self._new_dofn(**arguments), output_type, failure_type)
        if self._is_row:
            results |= "Rows" >> pass_on(output_type)
            if failures is not None:
                failures |= "FailedRows" >> pass_on(failure_type)
        return self._with_failures(pcoll, results, failures)

    def _kept(self, columns: Fields | None, element_type: Any) -> Fields:
        keep = self._keep
        if isinstance(keep, Mapping):
            if columns is not None:
                check_kept(keep, dict(columns))
            kept = list(keep.items())
        elif columns is None:
            if keep:
                raise ConfigurationError(
                    f"the columns of the elements are not known, as their type {element_type} has no schema: "
                    f"name those to keep with their types, keep={{'id': int}}"
                )
            kept = []
        else:
            types = dict(columns)
            names = list(types) if keep is None or keep == "all" else list(keep)
            check_kept(dict.fromkeys(names, Any), types)
            kept = [(name, types[name]) for name in names]
        taken = {self._generating.output_field, *(["index"] if self._generating.stream else [])}
        twice = [name for name, _ in kept if name in taken]
        if twice:
            raise ConfigurationError(
                f"two columns have the name {', '.join(map(repr, twice))}: name those to keep by keep=[…]"
            )
        return kept


def generate_options(
    endpoint: str | Sequence[str] | WorkerTriton, options: Mapping[str, Any]
) -> InferenceOptions:
    """The options of requests.

    Raises:
        ConfigurationError: one cannot work, or has no meaning for generated text.
    """
    for name in options:
        if name in _NO_MEANING:
            raise ConfigurationError(f"TritonGenerate takes no {name}: {_NO_MEANING[name]}")
    checked = InferenceOptions.from_options(
        {"timeout_seconds": _TIMEOUT_SECONDS, **options, "endpoint": endpoint}
    )
    for url in checked.urls:
        if url.door is not None:
            raise ConfigurationError(f"{url} is {url.door.name}, which has no /generate: see docs/llm.md")
    return checked


def _error_event(message: str, about: str) -> TritonError:
    """The error that a server says with the status 200, which it had sent before it knew."""
    if message.startswith("generate expects model to produce exactly 1 response"):
        return InferenceError(
            f'{about}: {message}. Leave api="generate" out', status=200, server_message=message
        )
    return ModelExecutionError(f"{about}: {message}", status=200, server_message=message)


def _first_event(body: memoryview) -> bytes | memoryview:
    """What an error's body says that comes as an event."""
    stream = EventStream(StreamLimits(), 0.0)
    stream.feed(bytes(body), 0.0)
    return stream.events[0].encode() if stream.events else body


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain).encode()


def _plain(value: Any) -> Any:
    """What JSON has for a value of NumPy, or for bytes of text."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"a {type(value).__name__} is no JSON")
