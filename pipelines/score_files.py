"""Score the rows of files on a model of a Triton Inference Server.

::

    python -m pipelines.score_files --files 'data/*.csv' --endpoint http://triton:8000 --model digits \\
        --input image=p0:p63 --keep id --output out/results.jsonl

``--help`` tells all options; Beam's own, ``--runner`` first of all, work beside them. Exit codes: 0 when
every row has a result or is among the failures, 1 when the job failed or ``--max_failures`` was passed, 2 for
wrong use.

Nothing of this file or its folder is imported on workers: what runs there is `beam_triton.score`, part of
the package that ``--setup_file=./setup.py`` stages.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import apache_beam as beam
from apache_beam.io.filesystem import BeamIOError
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

if not __package__:
    # Run as a file: what stands beside it is found from the folder above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from beam_triton import ConfigurationError, TritonError, TritonInference
from beam_triton.score import (
    ELEMENTS,
    FAILURES,
    FailureSink,
    LimitFailures,
    ReadElements,
    ResultSink,
    ServedModel,
    WriteFiles,
    discard_temporary_files,
    failure_of_element,
)
from beam_triton.testing import LocalTriton
from pipelines.launch_checks import (
    ask_model,
    check_endpoint,
    check_job,
    check_outputs,
    find_files,
    only_model,
)
from pipelines.progress_line import ProgressLine
from pipelines.score_options import ScoreJob, counts_here, parse_options, runs_here
from pipelines.summary import Summary

_INTERRUPTED = "interrupted; no result was written"


def build(pipeline: beam.Pipeline, job: ScoreJob, model: ServedModel) -> None:
    """Add the job's steps to a pipeline."""
    rows = pipeline | "Read" >> ReadElements(job.files, job.source, job.selection, model)
    results, failed = (
        rows[ELEMENTS]
        | "Score"
        >> TritonInference(
            list(model.endpoint),
            model.name,
            model_version=model.version,
            auth_token=model.auth_token,
            timeout_seconds=job.timeout_seconds,
            pool=job.pool,
            max_concurrent_requests=job.max_concurrent_requests,
            batching=job.batching,
            outputs=list(job.outputs) if job.outputs is not None else None,
        ).with_exception_handling()
    )
    sink = ResultSink(
        model,
        format=str(job.output.format),
        keep=job.keep,
        with_origin=job.with_origin,
        outputs=job.outputs,
    )
    failures = (
        rows[FAILURES],
        failed | "DescribeFailures" >> beam.Map(failure_of_element),
    ) | "AllFailures" >> beam.Flatten()
    failure_count = None
    if job.max_failures is not None:
        failures |= "LimitFailures" >> beam.ParDo(LimitFailures(job.max_failures))
        failure_count = failures | "CountFailures" >> beam.combiners.Count.Globally()
    _ = results | "WriteResults" >> WriteFiles(
        job.output, sink, counter="results_written", after=failure_count
    )
    _ = failures | "WriteFailures" >> WriteFiles(job.failures, FailureSink(), counter="failures_written")


def run(options: PipelineOptions, job: ScoreJob) -> Summary | None:
    """Check the job against its files and its model, run it and wait for its end.

    The summary is None when there is nothing to wait for: a template was written, or the runner does not
    wait. Raises ConfigurationError for wrong use, and what the runner raises for a job that fails.
    """
    is_local = runs_here(options)
    pipeline = _pipeline(options)
    if not is_local:
        check_endpoint(job)
    files = find_files(job) if _can_look(options) else []
    check_outputs(job, [path for path, _ in files] or job.files)
    with _served(job, is_local) as model:
        model = ask_model(model, must_answer=is_local) if _can_look(options) else model
        check_job(job, model, [path for path, _ in files])
        build(pipeline, job, model)
        return _run(pipeline, job, options, sum(size for _, size in files))


def _pipeline(options: PipelineOptions) -> beam.Pipeline:
    try:
        return beam.Pipeline(options=options)
    except (ValueError, ImportError) as error:
        # Beam's options contradict each other, or name a runner that is not there.
        raise ConfigurationError(str(error)) from error


def _run(
    pipeline: beam.Pipeline, job: ScoreJob, options: PipelineOptions, total_bytes: int
) -> Summary | None:
    is_local = runs_here(options)
    interval = job.progress_seconds if is_local else 0
    started_at = time.monotonic()
    try:
        with ProgressLine(interval, total_bytes, counts_here=counts_here(options)):
            result = pipeline.run()
            if options.view_as(GoogleCloudOptions).template_location:
                # A template is written, not run: its result has no job, and cannot even be printed.
                return None
            if not is_local:
                print(f"the job runs; its runner's page tells how far it is ({result})", file=sys.stderr)
            result.wait_until_finish()
    except BaseException:
        if is_local:
            discard_temporary_files(job.output)
            discard_temporary_files(job.failures)
        raise
    return Summary.of(result.metrics(), time.monotonic() - started_at)


def _can_look(options: PipelineOptions) -> bool:
    # Dataflow's workers stand in another network and read files that this machine may not have a key to.
    cloud = options.view_as(GoogleCloudOptions)
    name = str(options.get_all_options(drop_default=True).get("runner", "")).lower()
    return "dataflow" not in name and not cloud.template_location


@contextlib.contextmanager
def _served(job: ScoreJob, is_local: bool) -> Iterator[ServedModel]:
    def model(endpoint: tuple[str, ...], name: str) -> ServedModel:
        return ServedModel(
            endpoint=endpoint,
            name=name,
            version=job.model_version,
            auth_token=job.auth_token,
            timeout_seconds=job.timeout_seconds,
            pool=job.pool,
        )

    if job.endpoint:
        if not job.model:
            raise ConfigurationError("--model is needed: the name of the model that the server has")
        yield model(job.endpoint, job.model)
        return
    if not is_local:
        raise ConfigurationError("--endpoint is needed: other machines cannot reach a server on this one")
    repository = job.model_repository
    if not repository.is_dir():
        raise ConfigurationError(f"--model_repository {repository} is no folder")
    name = job.model or only_model(repository)
    if not name:
        raise ConfigurationError(f"--model is needed: {repository} does not hold exactly one model")
    print(f"starting a Triton server on this machine, with the models of {repository}", file=sys.stderr)
    with LocalTriton(repository) as triton:
        try:
            yield model((triton.endpoint,), name)
        finally:
            # Nothing is in flight any more, and an orderly end takes seconds.
            triton.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # It shows a failed step's traceback, which ends in what is said here in one line.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        job = ScoreJob.from_options(options)
        summary = run(options, job)
    except ConfigurationError as error:
        return _say(error.message, 2)
    except BeamIOError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say(_INTERRUPTED, 130)
    except Exception as error:
        logging.getLogger(__name__).debug("the job failed", exc_info=True)
        reason = reason_of(error)
        # The interrupt reaches a worker's thread, and comes back as the runner's error.
        if reason.startswith("KeyboardInterrupt"):
            return _say(_INTERRUPTED, 130)
        return _say(f"the job failed: {reason}", 1)
    if summary is None:
        return 0
    print(summary.table(job.output.path, job.failures.path))
    if runs_here(options) and summary.elements != summary.results + summary.failures:
        return _say("rows in are not results plus failures; please report this, with the lines above", 1)
    if job.max_failures is not None and summary.failures > job.max_failures:
        return _say(f"{summary.failures} rows failed, more than --max_failures={job.max_failures}", 1)
    return 0


def reason_of(error: BaseException) -> str:
    """One line that says why a job failed: runners wrap the worker's error in pages of traceback."""
    text = error.message if isinstance(error, TritonError) else str(error)
    # "beam_triton.errors.ModelNotFoundError: … [while running 'Score/…']", the last line of a traceback.
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    line = lines[-1] if lines else (text.splitlines() or [type(error).__name__])[0]
    return re.sub(r"\s*\[while running '.*", "", line).strip()


def _say(message: str, exit_code: int) -> int:
    print(f"score_files: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
