"""`TritonInference`, the transform that users compose, and the DoFn under it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import apache_beam as beam
from apache_beam.pvalue import AsIter, AsList, PCollection
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import Tuple, Union

from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.remote_model import RemoteModel
from beam_triton.server.worker_triton import WorkerTriton
from beam_triton.transforms.bundle import BundleScorer, with_own_windows
from beam_triton.transforms.exception_handling import (
    DeadLetters,
    ExceptionHandling,
    FailureThreshold,
    Scored,
    dead_letter_type,
)
from beam_triton.transforms.many_models import (
    FromSideInput,
    ManyModelsScorer,
    ModelChoice,
    ModelName,
    ModelVersion,
    OpenModels,
    shown,
    side_inputs_of,
)
from beam_triton.transforms.metrics import InferenceMetrics
from beam_triton.transforms.model_dofn import (
    ModelDoFn,
    annotations_of,
    default_of,
    display_data_of,
    open_described,
)
from beam_triton.transforms.results import PredictionResults, failure_of
from beam_triton.transforms.row_inputs import Columns, checked_inputs
from beam_triton.transforms.row_results import RowFailures, RowResults, row_type
from beam_triton.transforms.row_schema import Keep, RowSchema

_PREDICTION_RESULTS = PredictionResults()


class TritonInferenceDoFn(ModelDoFn):
    """Scores elements in batches, many requests in flight, on connections that the process shares.

    The arguments are those of `InferenceOptions`; ``results``, which says what elements and results are; and
    ``with_exception_handling``: elements that fail leave as outputs tagged ``failures`` (see
    `beam_triton.transforms.results.Failure`), otherwise the first one fails the bundle.

    Elements and results are those of `TritonInference`. ``inference`` of a PredictionResult
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
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: ModelName,
        *,
        model_version: ModelVersion = None,
        with_exception_handling: bool | DeadLetters = False,
        results: PredictionResults | RowResults = _PREDICTION_RESULTS,
        **options: Any,
    ) -> None:
        choice = ModelChoice(model_name, model_version)
        if choice.has_one_version:
            options["model_version"] = model_version
        super().__init__(
            InferenceOptions.from_options({"endpoint": endpoint, **options}, owner=type(self)),
            shown(model_name),
        )
        self._shown_version = {} if choice.has_one_version else {"model_version": shown(model_version)}
        if not choice.has_one_version:
            self._options.of_model(self._model_name, "1")  # Refuses doors that choose the version themselves.
        if choice.has_one_name:
            self._options.spec_of(self._model_name)
        # None: all elements are scored on one model.
        self._choice = None if choice.has_one_name and choice.has_one_version else choice
        self._models: OpenModels | None = None
        self._dead_letters = DeadLetters.of_option(with_exception_handling)
        self._results = results
        # Pickled with it: a process's copies of one DoFn, which have equal options, may share requests.
        self._name = uuid4().hex
        self._scorer: BundleScorer | ManyModelsScorer | None = None
        self._failure = ""

    def display_data(self) -> dict[str, Any]:
        return display_data_of(self._options, self._model_name, **self._shown_version)

    def setup(self) -> None:
        """Open the model and take a reference to the shared session; elements' own models as they come."""
        if self._choice is None:
            super().setup()
        else:
            self._models = OpenModels(self._options)

    def teardown(self) -> None:
        """Release the references to the shared session. Never raises; may be called twice."""
        super().teardown()
        if self._models is not None:
            self._models.close()

    def start_bundle(self) -> None:
        """Start with nothing buffered and nothing in flight."""
        self._cancel()
        if self._choice is None:
            assert self._model is not None, "setup has not been called"
            self._scorer = self._new_scorer(self._model)
        else:
            assert self._models is not None, "setup has not been called"
            self._models.close_unused()
            self._scorer = ManyModelsScorer(self._choice, self._models, self._new_scorer, self._dead_letters)

    def _new_scorer(self, model: RemoteModel) -> BundleScorer:
        return BundleScorer(
            model,
            self._options.batching,
            InferenceMetrics(model.channel, times_bundle=self._choice is None),
            results=self._results,
            dead_letters=self._dead_letters,
            make_default=partial(default_of, self._options),
            shared_by=self._name,
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


class SwitchedInferenceDoFn(TritonInferenceDoFn):
    """Scores each element on the model, or the version, that side inputs name for its window.

    Use it through `TritonInference`. An option that is a side input is `FromSideInput` here.
    """

    def process(
        self,
        element: Any,
        windowed_value: Any = beam.DoFn.WindowedValueParam,
        model_name: Any = None,
        model_version: Any = None,
    ) -> Iterable[Any]:
        """As `TritonInferenceDoFn.process`, with what the side inputs say for this element."""
        assert self._choice is not None
        self._choice.switch(model_name, model_version)
        return super().process(element, windowed_value)


Transform = TypeVar("Transform", bound="TritonInference")


class TritonInference(beam.PTransform[Any, Any]):
    """Scores a PCollection on a model of an NVIDIA Triton Inference Server.

    ::

        scored = images | TritonInference("http://triton:8000", "digits")
        results, failures = images | TritonInference(...).with_exception_handling()
        scored = rows | TritonInference(..., inputs={"image": "pixels"}, output="row")

    An element is an array-like (a model with one input), a mapping or row of column name to array-like, or
    ``(key, element)``; shapes have no batch dimension. A row is a ``beam.Row``, a NamedTuple, an instance of
    a dataclass or a pandas Series: its columns feed the inputs of the same name, and columns that feed none
    are no error. A result is ``PredictionResult(example, inference, model_id)`` or, with ``output="row"``, a
    ``beam.Row``; keyed as the element was, with its timestamp, windows and pane.

    Nothing is sent to the server here: options are checked, and the rest happens on the workers. Only
    ``output="row"`` asks the server for the model when the transform is applied, unless ``model_spec``
    describes it, as its results have a schema: kept columns, then outputs. An output of shape [1] is one
    value, any other a list, or lists in lists. Values are Python's: FP16, BF16 and FP32 as float32, unsigned
    integers as the next larger signed ones (UINT64 as int64), BYTES as bytes. An output that
    ``classification`` names has three columns: ``NAME_label``, ``NAME_score`` and ``NAME_index``. A character
    that a column's name cannot have becomes ``_``. The columns of the input, where its type has a schema, are
    compared with the model's inputs when the transform is applied.

    Args:
        endpoint: URL of the server, a list of them for fail-over, or a `WorkerTriton`.
        model_name: the model; or a callable that takes an element, with its key if it has one, and gives its
            model; or ``{"column": name}`` of the column that names it; or a side input, which names that of a
            window: ``AsSingleton(names)``, or ``AsIter(names)`` of equal ones. What gives a name may give
            ``(name, version)``. Requests are then made for each model and version, for each of which
            ``max_concurrent_requests`` is, and an element whose model or version is not there is a failure,
            whatever ``default_value`` is.
        model_version: as `InferenceOptions` describes it; or a callable, a column or a side input, as for
            ``model_name``; or ``AsDict(versions)``, the versions of models by their names. None, an empty
            side input and a name that is not in it leave the choice to the server.
        inputs: input name to the column that feeds it, where that has another name; or to a list of columns
            of one value each, which make up the tensor.
        output: ``"row"`` makes results rows; ``None`` makes them PredictionResults.
        keep: columns of the element that its row keeps: a list, ``"all"``, or column name to type where the
            elements' type has no schema. By default all that feed no input.
        prefix: of the names of the outputs' columns.
        text_outputs: outputs whose BYTES are UTF-8 text and become ``str``: ``True`` for all, or some names.
        version_column: the name of a last column, with the version that answered: a string; None where
            ``default_value`` stands in, or the server does not say.
        keep_example: ``False`` leaves ``example`` of a PredictionResult None, which lets go of large inputs.
        options: the keyword arguments that `InferenceOptions` describes. With ``output="row"``, ``outputs``
            may map names of outputs to those of their columns.

    Raises:
        ConfigurationError: an option cannot work; or, when the transform is applied with ``output="row"``,
            elements of the input's type cannot be scored on the model, or results have no schema.
        TritonError: ``output="row"``, and the server cannot be asked.
    """

    _of_sequences = False
    _chooses_by_element = True

    def __init__(
        self,
        endpoint: str | Sequence[str] | WorkerTriton,
        model_name: ModelName,
        *,
        model_version: ModelVersion = None,
        inputs: Mapping[str, Columns] | None = None,
        output: str | None = None,
        keep: Keep = None,
        prefix: str = "",
        text_outputs: bool | Sequence[str] = False,
        version_column: str | None = None,
        keep_example: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if output not in (None, "row"):
            raise ConfigurationError(f'output must be "row" or None, not {output!r}')
        inputs = checked_inputs(inputs)
        outputs = options.get("outputs")
        names = outputs if isinstance(outputs, Mapping) else None
        self._row_schema: RowSchema | None = None
        if output == "row":
            if names is not None:
                options["outputs"] = list(names)
            self._row_schema = RowSchema(inputs, keep, prefix, names, text_outputs, version_column)
            if not keep_example:
                raise ConfigurationError('keep_example is for results without output="row": give keep=[…]')
        elif keep is not None or prefix or text_outputs or names is not None or version_column is not None:
            raise ConfigurationError(
                'keep, prefix, text_outputs, version_column and names for outputs\' columns need output="row"'
            )
        self._model_name = model_name
        given: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
        self._side_inputs = side_inputs_of(given)
        for option, side_input in self._side_inputs.items():
            given[option] = FromSideInput(has_many=isinstance(side_input, AsIter | AsList))
        choice = ModelChoice(**given)
        if not (self._chooses_by_element or (choice.has_one_name and choice.has_one_version)):
            raise ConfigurationError(
                f"{type(self).__name__} scores all elements on one model: model_name and model_version are a "
                f"name, and a version or the server's choice; TritonInference chooses them for each element"
            )
        version = model_version if choice.has_one_version else None
        self._options = InferenceOptions.from_options(
            {"endpoint": endpoint, "model_version": version, **options}, owner=type(self)
        )
        if options.get("model_spec") is not None:
            # A lock file is read once.
            options["model_spec"] = self._options.model_spec
        results = PredictionResults(inputs, keep_example)
        self._new_dofn: Callable[..., beam.DoFn] = partial(
            self._dofn, endpoint, **given | {"results": results} | options
        )
        self._new_dofn()
        self._handling: ExceptionHandling | None = None
        self._timeout: dict[str, Any] = {}

    def with_exception_handling(
        self: Transform,
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
    ) -> Transform:
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

    def with_error_handler(self: Transform, error_handler: Any, **exception_handling: Any) -> Transform:
        """Failed elements go to one of Beam's error handlers; ``None`` changes nothing.

        ``exception_handling`` are further arguments of `with_exception_handling`.
        """
        if error_handler is None:
            return self
        return self.with_exception_handling(error_handler=error_handler, **exception_handling)

    def default_label(self) -> str:
        """The step's name where the user does not give one."""
        return f"TritonInference({shown(self._model_name)})"

    def display_data(self) -> dict[str, Any]:
        return self._new_dofn().display_data()

    def annotations(self) -> dict[str, Any]:
        """The model, as ``RunInference`` annotates its own."""
        name = shown(self._model_name)
        return {**annotations_of(self, self._options, name), **super().annotations()}

    def expand(self, pcoll: PCollection[Any]) -> Any:
        """The results, or with exception handling ``(results, failures)``.

        Raises:
            ConfigurationError: with ``output="row"``, the input's type does not fit the model.
        """
        key_type, element_type = key_and_element(pcoll.element_type)
        output_type, failure_type, make_failure = AnyType, dead_letter_type(pcoll.element_type), failure_of
        arguments = dict(self._timeout)
        if self._row_schema is not None:
            results, make_failure = self._rows(self._row_schema, element_type)
            output_type, failure_type = (
                keyed_type(key_type, row_type(made.fields)) for made in (results, make_failure)
            )
            arguments |= {"results": results, "outputs": [column.output.name for column in results.outputs]}
        elif key_type is not None:
            output_type = keyed_type(key_type, AnyType)
        if self._handling is not None:
            arguments["with_exception_handling"] = replace(self._handling.dead_letters, make=make_failure)
        scored, failures = self._score(pcoll, self._new_dofn(**arguments), output_type, failure_type)
        if self._row_schema is not None:
            scored |= "Rows" >> pass_on(output_type)
            if failures is not None:
                failures |= "FailedRows" >> pass_on(failure_type)
        return self._with_failures(pcoll, scored, failures)

    def _dofn(
        self, endpoint: str | Sequence[str] | WorkerTriton, model_name: ModelName, **options: Any
    ) -> beam.DoFn:
        kind = SwitchedInferenceDoFn if self._side_inputs else TritonInferenceDoFn
        return kind(endpoint, model_name, **options)

    def _score(
        self, pcoll: PCollection[Any], dofn: beam.DoFn, output_type: Any, failure_type: Any
    ) -> tuple[Any, Any]:
        """What the DoFn gives, and with exception handling its failures."""
        handling = self._handling
        if handling is None:
            scoring = beam.ParDo(dofn, **self._side_inputs).with_output_types(output_type)
            return pcoll | "Score" >> scoring, None
        # Any: Beam's runtime type checkers compare dead letters with the main output's type.
        scoring = beam.ParDo(dofn, **self._side_inputs).with_output_types(AnyType)
        tagged = scoring.with_outputs(handling.dead_letter_tag, main=handling.main_tag)
        outputs = pcoll | "Score" >> tagged.with_output_types(AnyType)
        results, failures = outputs[handling.main_tag], outputs[handling.dead_letter_tag]
        results.element_type, failures.element_type = output_type, failure_type
        return results, failures

    def _with_failures(self, elements: PCollection[Any], results: Any, failures: Any) -> Any:
        """The results, or with exception handling ``(results, failures)``, within the threshold."""
        handling = self._handling
        if handling is None:
            return results
        if handling.threshold < 1:
            has_default = self._options.default_value is not None
            limit = FailureThreshold(
                handling.threshold, handling.threshold_windowing, has_default=has_default
            )
            _ = (elements, results, failures) | "Threshold" >> limit
        if handling.error_handler is not None:
            handling.error_handler.add_error_pcollection(failures)
            return results
        return Scored(results, failures, handling)

    def _check_threshold(self, kind: str) -> None:
        """Refuse a threshold where default values cannot be told from results, which are ``kind``."""
        handling = self._handling
        if handling is not None and handling.threshold < 1 and self._options.default_value is not None:
            raise ConfigurationError(
                f"threshold cannot count default values in {kind}, which look like results: leave out "
                f"threshold or default_value"
            )

    def _rows(self, schema: RowSchema, element_type: Any) -> tuple[RowResults, RowFailures]:
        """How results and failures are made, by the model as it is described or served now."""
        self._check_threshold("rows")
        model_name = self._model_name
        if not isinstance(model_name, str):
            if self._options.model_spec is None:
                raise ConfigurationError(
                    f'output="row" with the model of each element ({shown(model_name)}) needs '
                    f"model_spec: one of the models, whose outputs all of them have"
                )
            model_name = self._options.model_spec.name
        model = open_described(self._options, model_name, of_sequences=self._of_sequences)
        try:
            return schema.of_elements(element_type, model.encoder, self._options.classification)
        finally:
            model.close()


def pass_on(element_type: Any) -> Any:
    """A step between rows and what takes them in batches, as DataFrames, WriteToJson and WriteToCsv do.

    Beam (2.77, ``Operation.finish``) hands on what it has collected for such a step before it calls
    ``finish_bundle`` of the one in front of it, and loses what comes from there.
    """
    return beam.Map(_same).with_input_types(element_type).with_output_types(element_type)


def _same(element: Any) -> Any:
    return element


def key_and_element(element_type: Any) -> tuple[Any, Any]:
    """The types of key and element, as far as the input's type shows; None for no key.

    Pairs of many types, as Flatten and Create give them, are a union of pairs.
    """
    pairs = list(getattr(element_type, "union_types", (element_type,)))
    if not all(len(getattr(pair, "tuple_types", ())) == 2 for pair in pairs):
        return None, element_type
    keys, elements = zip(*(pair.tuple_types for pair in pairs), strict=True)
    return Union[keys], Union[elements]


def keyed_type(key_type: Any, result_type: Any) -> Any:
    return result_type if key_type is None else Tuple[key_type, result_type]
