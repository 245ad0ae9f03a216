"""Score the rows of files on a model of a Triton Inference Server.

::

    python -m beam_triton score --files 'data/*.csv' --endpoint http://triton:8000 --model digits \\
        --input image=p0:p63 --keep id --output out/results.jsonl

``--help`` lists all options; Beam's own, ``--runner`` first of all, work beside them. Exit codes: 0 when
every row has a result or is among the failures, 1 when the job failed or ``--max_failures`` was passed, 2 for
wrong use.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import apache_beam as beam
from apache_beam.io.filesystem import BeamIOError
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.score.job_options import ScoreJob, counts_here, parse_options, runs_here
from beam_triton.score.job_report import ProgressLine, Summary
from beam_triton.score.launch_checks import ask_model, check_endpoint, check_job, check_outputs, find_files
from beam_triton.score.result_writing import (
    TableSink,
    discard_temporary_files,
    empty_results,
    failure_table,
    result_table,
)
from beam_triton.score.row_steps import (
    BLOCKS,
    FAILURES,
    RESULTS,
    LimitFailures,
    ReadRows,
    ScoreBlocks,
    ServedModel,
)
from beam_triton.testing import LocalTriton

_INTERRUPTED = "interrupted; no result was written"


def build(pipeline: beam.Pipeline, job: ScoreJob, model: ServedModel) -> None:
    """Add the job's steps to a pipeline."""
    rows = pipeline | "Read" >> ReadRows(job.given.files, job.source, job.selection, model)
    scoring = beam.ParDo(ScoreBlocks(model, job.selection))
    scored = rows[BLOCKS] | "Score" >> scoring.with_outputs(FAILURES, main=RESULTS)
    failures = (rows[FAILURES], scored[FAILURES]) | "AllFailures" >> beam.Flatten()
    results = scored[RESULTS]
    if job.given.max_failures is not None:
        failures |= "LimitFailures" >> beam.ParDo(LimitFailures(job.given.max_failures))
        # Nothing comes of it, and results are put in place when all of it has come.
        after = failures | "AfterFailures" >> beam.FlatMap(lambda failure: ())
        results = (results, after) | "Results" >> beam.Flatten()
    to_table = partial(result_table, keep=job.keep, with_origin=job.given.with_origin)
    empty = partial(empty_results, model, outputs=job.outputs, with_origin=job.given.with_origin)
    sink = TableSink(job.output, to_table, counter="results_written", empty=empty)
    _ = results | "WriteResults" >> beam.io.Write(sink)
    sink = TableSink(job.failures, failure_table, counter="failures_written")
    _ = failures | "WriteFailures" >> beam.io.Write(sink)


def run(options: PipelineOptions, job: ScoreJob) -> Summary | None:
    """Check the job against its files and its model, run it and wait for its end.

    The summary is None when there is nothing to wait for: a template was written, or the runner does not
    wait. Raises ConfigurationError for wrong use, and what the runner raises for a job that fails.
    """
    is_local = runs_here(options)
    try:
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError) as error:
        # Beam's options contradict each other, or name a runner that is not there.
        raise ConfigurationError(str(error)) from error
    if not is_local:
        check_endpoint(job)
    files = find_files(job) if _can_look(options) else []
    check_outputs(job, [path for path, _ in files] or job.given.files)
    with _served(job, is_local) as model:
        model = ask_model(model, must_answer=is_local) if _can_look(options) else model
        check_job(job, model, [path for path, _ in files])
        build(pipeline, job, model)
        return _run(pipeline, job, options, sum(size for _, size in files))


def _run(
    pipeline: beam.Pipeline, job: ScoreJob, options: PipelineOptions, total_bytes: int
) -> Summary | None:
    is_local = runs_here(options)
    interval = job.given.progress_seconds if is_local else 0
    started_at = time.monotonic()
    try:
        with ProgressLine(interval, total_bytes, counts_here=counts_here(options)):
            result = pipeline.run()
            if options.view_as(GoogleCloudOptions).template_location:
                # A template is written, not run: its result has no job, and cannot even be printed.
                return None
            if not is_local:
                print(f"the job runs; its runner's page says how far it is ({result})", file=sys.stderr)
            result.wait_until_finish()
    except BaseException:
        if is_local:
            discard_temporary_files(job.output)
            discard_temporary_files(job.failures)
        raise
    return Summary.of(result.metrics(), time.monotonic() - started_at)


def _can_look(options: PipelineOptions) -> bool:
    # Dataflow's workers stand in another network and read files that this machine may not have a key to.
    name = str(options.get_all_options(drop_default=True).get("runner", "")).lower()
    return "dataflow" not in name and not options.view_as(GoogleCloudOptions).template_location


@contextlib.contextmanager
def _served(job: ScoreJob, is_local: bool) -> Iterator[ServedModel]:
    if job.endpoint:
        if not job.given.model:
            raise ConfigurationError("--model is needed: the name of the model that the server has")
        yield job.served(job.endpoint, job.given.model)
        return
    repository = job.model_repository
    if not is_local:
        raise ConfigurationError("--endpoint is needed: other machines cannot reach a server on this one")
    if repository is None:
        raise ConfigurationError("--endpoint is needed, or --model_repository for a server on this machine")
    if not repository.is_dir():
        raise ConfigurationError(f"--model_repository {repository} is no folder")
    models = [entry.name for entry in repository.iterdir() if (entry / "config.pbtxt").exists()]
    if not job.given.model and len(models) != 1:
        raise ConfigurationError(f"--model is needed: {repository} does not hold exactly one model")
    print(f"starting a Triton server on this machine, with the models of {repository}", file=sys.stderr)
    with LocalTriton(repository) as triton:
        try:
            yield job.served([triton.endpoint], job.given.model or models[0])
        finally:
            # Nothing is in flight any more, and an orderly end takes seconds.
            triton.kill()


def main(
    arguments: Sequence[str],
    *,
    program: str = "python -m beam_triton score",
    model_repository: Path | None = None,
) -> int:
    """Run from the command line; the exit code. ``model_repository`` is served where there is no endpoint."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # It shows a failed step's traceback, which ends in what is said here in one line.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    # It warns of every earlier output that is replaced.
    logging.getLogger("apache_beam.io.filebasedsink").setLevel(logging.ERROR)

    def say(message: str, exit_code: int) -> int:
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
        return exit_code

    try:
        options = parse_options(arguments, program)
        job = ScoreJob(options, model_repository)
        summary = run(options, job)
    except ConfigurationError as error:
        return say(error.message, 2)
    except BeamIOError as error:
        return say(str(error), 2)
    except KeyboardInterrupt:
        return say(_INTERRUPTED, 130)
    except Exception as error:
        logging.getLogger(__name__).debug("the job failed", exc_info=True)
        reason = reason_of(error)
        # The interrupt reaches a worker's thread, and comes back as the runner's error.
        if reason.startswith("KeyboardInterrupt"):
            return say(_INTERRUPTED, 130)
        return say(f"the job failed: {reason}", 1)
    if summary is None:
        return 0
    print(summary.table(job.output.path, job.failures.path))
    if runs_here(options) and summary.elements != summary.results + summary.failures:
        return say("rows in are not results plus failures; please report this, with the lines above", 1)
    if job.given.max_failures is not None and summary.failures > job.given.max_failures:
        return say(f"{summary.failures} rows failed, more than --max_failures={job.given.max_failures}", 1)
    return 0


def reason_of(error: BaseException) -> str:
    """One line that says why a job failed: runners wrap the worker's error in pages of traceback."""
    text = error.message if isinstance(error, TritonError) else str(error)
    # "beam_triton.errors.ModelNotFoundError: … [while running 'Score/…']", the last line of a traceback.
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    line = lines[-1] if lines else (text.splitlines() or [type(error).__name__])[0]
    return re.sub(r"\s*\[while running '.*", "", line).strip()
