"""Score the rows of files on a model of a Triton Inference Server: ``python -m beam_triton score``.

Exit codes: 0 when every row has a result or is among the failures, 1 when the job failed, more rows failed
than ``--max_failures`` or every row failed, 2 for wrong use, 130 when interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import apache_beam as beam
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError, TransportError, TritonError
from beam_triton.score import pipeline_steps
from beam_triton.score.column_arrays import ColumnArrays
from beam_triton.score.input_columns import list_columns
from beam_triton.score.job_options import ScoreJob, parse_options, replay_arguments, runner_of, runs_here
from beam_triton.score.job_report import complaint, counts_of, summary, summary_rows, watched
from beam_triton.score.result_writing import ColumnSink, check_fields, failure_columns, result_columns
from beam_triton.score.row_reading import CorruptFileError, FileSource, Piece, RowBlock, match_files
from beam_triton.testing import LocalTriton
from beam_triton.transforms.explanation import explain, write_metrics

_logger = logging.getLogger(__name__)


def build(pipeline: beam.Pipeline, job: ScoreJob, model: pipeline_steps.ServedModel) -> None:
    """Add the job's steps to a pipeline."""
    rows = pipeline | "Read" >> pipeline_steps.ReadRows(job.given.files, job.source, job.selection, model)
    scoring = beam.ParDo(pipeline_steps.ScoreBlocks(model, job.selection))
    results, failed = rows[pipeline_steps.BLOCKS] | "Score" >> scoring.with_outputs(
        pipeline_steps.FAILURES, main=pipeline_steps.RESULTS
    )
    failures = (rows[pipeline_steps.FAILURES], failed) | "AllFailures" >> beam.Flatten()
    if job.given.max_failures is not None:
        failures |= "LimitFailures" >> beam.ParDo(pipeline_steps.LimitFailures(job.given.max_failures))
        # An empty input of the results: without it they could be in place before the limit ends the job.
        after = failures | "AfterFailures" >> beam.FlatMap(lambda failure: ())
        results = (results, after) | "Results" >> beam.Flatten()
    to_columns = partial(result_columns, keep=job.keep, with_origin=job.given.with_origin)
    replays = job.given.replay
    sink = ColumnSink(job.output, to_columns, "results", joins=replays)
    written = results | "WriteResults" >> beam.io.Write(sink)
    if replays:
        # A row leaves the failures once its result is in place: a job that ends in between loses none.
        after = written | "AfterResults" >> beam.FlatMap(lambda name: ())
        failures = (failures, after) | "Failures" >> beam.Flatten()
    _ = failures | "WriteFailures" >> beam.io.Write(ColumnSink(job.failures, failure_columns, "failures"))


def run(options: PipelineOptions, job: ScoreJob) -> str:
    """Check the job against its files and its model, run it, and print its summary.

    Returns what is wrong with the counts, or an empty text. Raises ConfigurationError for wrong use, and the
    runner's error for a job that fails.
    """
    is_local = runs_here(options)
    is_template = bool(options.view_as(GoogleCloudOptions).template_location)
    # Dataflow's workers are in another network, and read files that this machine may have no key for.
    can_look = not is_template and runner_of(options) != "dataflow"
    try:
        pipeline = beam.Pipeline(options=options)
        files = match_files(job.given.files) if can_look else []
        for path, _ in files:
            job.source.format_of(path)
        check_outputs(job, [path for path, _ in files] or job.given.files)
    except (ValueError, ImportError) as error:
        # Contradictory options, or a runner or a FileSystem that is not installed.
        raise ConfigurationError(str(error)) from error
    if job.given.report is not None and not is_local:
        raise ConfigurationError(
            f"--report {job.given.report}: a report shows requests of this process, and the workers are "
            f"elsewhere; leave it out"
        )
    with _served(job, is_local) as model:
        if can_look:
            try:
                model = replace(model, spec=model.describe())
            except TritonError as error:
                if is_local or not isinstance(error, TransportError):
                    raise ConfigurationError(error.message) from error
                _logger.warning("not checked from here, the workers will ask the server: %s", error.message)
        if model.spec is None:
            model = replace(model, spec=model.options.spec_of(model.name))
        check_job(job, model, [path for path, _ in files])
        build(pipeline, job, model)
        started_at, total_bytes = time.monotonic(), sum(size for _, size in files)
        try:
            progress_seconds = job.given.progress_seconds if is_local else 0
            with watched(progress_seconds, total_bytes, job.given.report) as watch:
                result = pipeline.run()
                if is_template:
                    return ""
                if not is_local:
                    print(f"the job is running, see its runner's page ({result})", file=sys.stderr)
                result.wait_until_finish()
                seconds = time.monotonic() - started_at
                counts = counts_of(result.metrics())
                rows = summary_rows(counts, seconds, job.output.path, job.failures.path)
                # Of what the rows further down say, the report has more.
                watch.facts = rows[:3]
        except BaseException:
            # A runner that fails does not delete the temporary files.
            for target in (job.output, job.failures) if is_local else ():
                with contextlib.suppress(BeamIOError):
                    FileSystems.delete([f"{target.temporary_folder}*/*", f"{target.temporary_folder}*"])
            raise
    print(summary(counts, seconds, job.output.path, job.failures.path))
    print(f"\n{explain(result.metrics())}")
    if job.given.metrics:
        write_metrics(result.metrics(), job.given.metrics)
    if is_local and counts["rows_read"] != counts["results_written"] + counts["failures_written"]:
        return "rows in are not results plus failures; please report this table"
    return complaint(counts, job.given.max_failures, job.failures.path)


def check_outputs(job: ScoreJob, files: Sequence[str]) -> None:
    """Raise ConfigurationError where the results, the failures or an input file would be overwritten.

    Raises ValueError for a path of a FileSystem that is not installed here.
    """
    if job.output.writes(job.failures.path) or job.failures.writes(job.output.path):
        both = f"--output {job.output.path} and --failures {job.failures.path}"
        raise ConfigurationError(f"{both} are the same file; one would overwrite the other")
    for option, target in (("--output", job.output), ("--failures", job.failures)):
        FileSystems.get_filesystem(target.path)
        is_replaced = job.given.replay and target is job.failures
        if is_replaced:
            check_replaced(job, files)
        for path in () if is_replaced else filter(target.writes, files):
            raise ConfigurationError(f"{option} {target.path} would overwrite {path}, which --files reads")


def check_replaced(job: ScoreJob, files: Sequence[str]) -> None:
    """Raise ConfigurationError where files of failures would keep rows that have results, or lose others."""
    given = job.given
    for path in files if not given.failures else ():
        if path not in given.files and not job.failures.writes(path):
            raise ConfigurationError(
                f"--failures is needed: what fails again would be in {job.failures.path}, and {path} would "
                f"stay as it is"
            )
    if given.where and (not given.failures or any(map(job.failures.writes, files))):
        raise ConfigurationError(
            f"--where: the rows that it leaves out would be lost from {job.failures.path}; leave it out, as "
            f"rows that it had left out are no failures, or name another file with --failures"
        )


def check_job(job: ScoreJob, model: pipeline_steps.ServedModel, files: Sequence[str]) -> None:
    """Compare the options with the model and with the first rows of the files, as far as they are known.

    One file that fits is enough: rows of the others that do not fit become failures. Raises
    ConfigurationError, with the model's inputs and the first file's columns.
    """
    spec = model.spec
    names = [output.name for output in spec.outputs] if spec is not None else []
    check_fields(job.keep, with_origin=job.given.with_origin, outputs=names)
    if spec is None:
        return
    for name in job.outputs or ():
        if names and name not in names:
            raise ConfigurationError(f"model {spec.name!r} has no output {name!r}; {spec.describe()}")
    if job.given.replay and files:
        check_joined(job, names)
    arrays = ColumnArrays(spec, job.selection.inputs)
    errors: list[str] = []
    for path in files:
        known: list[str] = []
        try:
            for item in job.source.read(Piece(path), lambda names: names):
                if isinstance(item, RowBlock):
                    known = [spec.describe(), f"{path} has {list_columns(item.keys)}"]
                    arrays.check(item)
                    if item.names is not None:
                        job.selection.check(item.names)
                    return
                if item.error == CorruptFileError.__name__:
                    raise CorruptFileError(item.message)
        except (CorruptFileError, ConfigurationError) as error:
            errors.append("; ".join([error.message, *(text for text in known if text not in error.message)]))
    if errors:
        raise ConfigurationError(errors[0])


def check_joined(job: ScoreJob, outputs: Sequence[str]) -> None:
    """Raise ConfigurationError where results would lack fields of those that they join, or have others.

    ``outputs`` are the model's, of which a result may have any.
    """
    own = {*job.keep, "model", *(("file", "row") if job.given.with_origin else ())}
    for path in job.output.files():
        first = next(FileSource().read(Piece(path), lambda names: names), None)
        if isinstance(first, RowBlock):
            found = {*first.keys} - {*outputs}
            if found != own:
                raise ConfigurationError(
                    f"the results in {path} have {list_columns(sorted(found))} beside the model's outputs, "
                    f"those of this run {list_columns(sorted(own))}; --keep and --with_origin must be alike"
                )
            return


@contextlib.contextmanager
def _served(job: ScoreJob, is_local: bool) -> Iterator[pipeline_steps.ServedModel]:
    if not is_local:
        if not job.endpoint:
            raise ConfigurationError("--endpoint is needed: other machines cannot reach a server on this one")
        for url in filter(lambda url: "@" in url, job.endpoint):
            raise ConfigurationError(
                f"--endpoint {redact_url(url)} holds a password, which the job's page would show; "
                f"give a token by reference, --auth_token env:NAME or file:PATH"
            )
    if job.endpoint:
        if not job.model:
            raise ConfigurationError("--model is needed: the name of the model on the server")
        yield job.served(job.endpoint, job.model)
        return
    repository = job.model_repository
    if repository is None or not repository.is_dir():
        raise ConfigurationError(f"--endpoint is needed, or --model_repository: {repository} is no folder")
    models = [entry.name for entry in repository.iterdir() if (entry / "config.pbtxt").exists()]
    if not job.model and len(models) != 1:
        raise ConfigurationError(f"--model is needed: {repository} does not hold exactly one model")
    print(f"starting a Triton server on this machine, with the models of {repository}", file=sys.stderr)
    # No request is in flight in the end, so that the server need not wait for one.
    with LocalTriton(repository, stop_timeout_seconds=0.1) as triton:
        yield job.served([triton.endpoint], job.model or models[0])


def main(
    arguments: Sequence[str],
    program: str = "python -m beam_triton score",
    model_repository: Path | None = None,
    *,
    replays: bool = False,
) -> int:
    """Run from the command line; the exit code. ``model_repository`` is served where there is no endpoint.

    The arguments are those of ``score``, or with ``replays`` those of ``replay``.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # They log the traceback of an error that is reported below, and each earlier output that is replaced.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    logging.getLogger("apache_beam.io.filebasedsink").setLevel(logging.ERROR)
    try:
        options = parse_options(replay_arguments(arguments) if replays else arguments, program)
        message = run(options, ScoreJob(options, model_repository))
        exit_code = 1 if message else 0
    except (ConfigurationError, BeamIOError) as error:
        exit_code, message = 2, str(error)
    except (Exception, KeyboardInterrupt) as error:
        _logger.debug("the job failed", exc_info=True)
        exit_code, message = 1, f"the job failed: {reason_of(error)}"
        # The interrupt reaches a worker's thread, too, and comes back as the runner's error.
        if isinstance(error, KeyboardInterrupt) or reason_of(error).startswith("KeyboardInterrupt"):
            exit_code, message = 130, "interrupted; no result was written"
    if message:
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def reason_of(error: BaseException) -> str:
    """The line that names a job's error: runners wrap the worker's error in pages of traceback."""
    text = error.message if isinstance(error, TritonError) else str(error)
    # "beam_triton.errors.ModelNotFoundError: … [while running 'Score/…']", the last line of a traceback.
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    line = lines[-1] if lines else (text.splitlines() or [type(error).__name__])[0]
    return re.sub(r"\s*\[while running '.*", "", line).strip()
