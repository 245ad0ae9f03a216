"""What is looked at before a job starts: the files, the model, and whether they fit each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from apache_beam.io.filesystems import FileSystems

from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError, TransportError, TritonError
from beam_triton.score.column_arrays import ColumnArrays
from beam_triton.score.file_reading import CorruptFileError, Failure, Piece, RowBlock, match_files
from beam_triton.score.input_columns import list_columns
from beam_triton.score.job_options import ScoreJob
from beam_triton.score.result_writing import check_fields
from beam_triton.score.row_steps import ServedModel

_logger = logging.getLogger(__name__)


def find_files(job: ScoreJob) -> list[tuple[str, int]]:
    """Path and size of each input file. Raises ConfigurationError when there is none, or no format."""
    try:
        found = match_files(job.given.files)
    except ValueError as error:
        # FileSystems says so of a scheme whose package is not installed.
        raise ConfigurationError(str(error)) from error
    for path, _ in found:
        job.source.format_of(path)
    return found


def check_outputs(job: ScoreJob, files: Iterable[str]) -> None:
    """Raise ConfigurationError for a path that cannot be written to, or where something would be lost.

    That is a path of a FileSystem that is not installed here, one that results and failures would share, and
    one of the input ``files``.
    """
    if job.output.writes(job.failures.path) or job.failures.writes(job.output.path):
        raise ConfigurationError(
            f"--output {job.output.path} and --failures {job.failures.path} are the same file; "
            f"one would overwrite the other"
        )
    for option, target in (("--output", job.output), ("--failures", job.failures)):
        for path in filter(target.writes, files):
            raise ConfigurationError(
                f"{option} {target.path} would overwrite {path}, which --files reads; "
                f"give {option} another path"
            )
        try:
            FileSystems.get_filesystem(target.path)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error


def check_endpoint(job: ScoreJob) -> None:
    """Raise ConfigurationError for a password in an endpoint: options are shown on the job's page."""
    for url in job.endpoint:
        if "@" in url:
            raise ConfigurationError(
                f"--endpoint {redact_url(url)} holds a password, which the job's page would show; "
                f"give a token by reference (--auth_token env:NAME or file:PATH), read on the workers"
            )


def ask_model(model: ServedModel, *, must_answer: bool) -> ServedModel:
    """The model with the server's description of it.

    Where the server cannot be reached and need not be from here, the model comes back as it was, and the
    workers will ask. Raises ConfigurationError with the server's words otherwise.
    """
    try:
        return replace(model, spec=model.describe())
    except TransportError as error:
        if must_answer:
            raise ConfigurationError(f"no server answers: {error.message}") from error
        _logger.warning("not checked from here, the workers will ask the server: %s", error.message)
        return model
    except TritonError as error:
        raise ConfigurationError(error.message) from error


def check_job(job: ScoreJob, model: ServedModel, files: Sequence[str]) -> None:
    """Compare what the options say with the model and with the first rows of the files.

    One file that fits is enough: what others lack or have wrong goes to the failures. ``files`` empty: none
    is in reach. Raises ConfigurationError, with the model's inputs and the first file's columns.
    """
    spec = model.spec
    names = [output.name for output in spec.outputs] if spec is not None else []
    check_fields(job.keep, with_origin=job.given.with_origin, outputs=names)
    unknown = [name for name in job.outputs or () if names and name not in names]
    if spec is not None and unknown:
        raise ConfigurationError(f"model {spec.name!r} has no output {unknown[0]!r}; {spec.describe()}")
    errors: list[str] = []
    for path in files:
        block: RowBlock | None = None
        try:
            block = _first_block(job, path)
            if block is None:
                # A file without rows speaks neither for the options nor against them.
                continue
            if spec is not None:
                ColumnArrays(spec, job.selection.inputs).check(block)
            if block.names is not None:
                job.selection.check(block.names)
            return
        except (CorruptFileError, ConfigurationError) as error:
            parts = [error.message]
            if spec is not None and block is not None and spec.describe() not in error.message:
                parts.append(spec.describe())
            if block is not None and "the file has" not in error.message:
                parts.append(f"{path} has {list_columns(block.keys)}")
            errors.append("; ".join(parts))
    if errors:
        raise ConfigurationError(errors[0])
    if spec is not None:
        ColumnArrays(spec, job.selection.inputs)


def _first_block(job: ScoreJob, path: str) -> RowBlock | None:
    for item in job.source.read(Piece(path), lambda names: names):
        if isinstance(item, RowBlock):
            return item
        if isinstance(item, Failure) and item.error == CorruptFileError.__name__:
            raise CorruptFileError(item.message)
    return None
