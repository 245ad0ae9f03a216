"""What is looked at before a job starts: the files, the model, and whether they fit each other."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from apache_beam.io.filesystems import FileSystems

from beam_triton import ConfigurationError, TransportError, TritonError
from beam_triton.credentials import redact_url
from beam_triton.score import (
    Columns,
    CorruptFileError,
    ElementMaker,
    ServedModel,
    check_fields,
    list_columns,
    match_files,
)
from pipelines.score_options import ScoreJob

_logger = logging.getLogger(__name__)


def find_files(job: ScoreJob) -> list[tuple[str, int]]:
    """Path and size of each input file. Raises ConfigurationError when there is none, or no format."""
    try:
        found = match_files(job.files)
    except ValueError as error:
        if isinstance(error, ConfigurationError):
            raise
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
    for path in files:
        for option, target in (("--output", job.output), ("--failures", job.failures)):
            if target.writes(path):
                raise ConfigurationError(
                    f"{option} {target.path} would overwrite {path}, which --files reads; "
                    f"give {option} another path"
                )
    for target in (job.output, job.failures):
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


def only_model(repository: Path) -> str | None:
    """The name of the repository's model if it holds just one."""
    models = [entry.name for entry in repository.iterdir() if (entry / "config.pbtxt").exists()]
    return models[0] if len(models) == 1 else None


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
    except ConfigurationError:
        raise
    except TritonError as error:
        raise ConfigurationError(error.message) from error


def check_job(job: ScoreJob, model: ServedModel, files: Sequence[str]) -> None:
    """Compare what the options say with the model and with the columns of the files.

    One file that fits is enough: what others lack or have wrong goes to the failures. ``files`` empty: none
    is in reach. Raises ConfigurationError, with the model's inputs and the first file's columns.
    """
    spec = model.spec
    names = [output.name for output in spec.outputs] if spec is not None else []
    check_fields(job.keep, with_origin=job.with_origin, outputs=names)
    unknown = [name for name in job.outputs or () if spec is not None and names and name not in names]
    if spec is not None and unknown:
        raise ConfigurationError(f"model {spec.name!r} has no output {unknown[0]!r}; {spec.describe()}")
    maker = _maker(job, model, files)
    first_error: ConfigurationError | None = None
    for path in files:
        try:
            columns = job.source.columns_of(path)
        except CorruptFileError as error:
            first_error = first_error or ConfigurationError(error.message)
            continue
        try:
            _check_file(job, model, maker, path, columns)
        except ConfigurationError as error:
            first_error = first_error or error
            continue
        # JSON Lines without an object speak neither for the options nor against them.
        if columns.names:
            return
    if first_error is not None:
        raise first_error


def _maker(job: ScoreJob, model: ServedModel, files: Sequence[str]) -> ElementMaker | None:
    if model.spec is None:
        return None
    try:
        return ElementMaker(model.spec, job.selection.inputs)
    except ConfigurationError as error:
        columns = None
        with contextlib.suppress(CorruptFileError):
            columns = job.source.columns_of(files[0]) if files else None
        if columns is None:
            raise
        raise ConfigurationError(_with_context(error.message, model, files[0], columns)) from error


def _check_file(
    job: ScoreJob, model: ServedModel, maker: ElementMaker | None, path: str, columns: Columns
) -> None:
    is_json = job.source.format_of(path) == "jsonl"
    if maker is not None:
        try:
            if is_json:
                maker.check_keys(columns.names)
            else:
                maker.check(columns)
        except ConfigurationError as error:
            raise ConfigurationError(_with_context(error.message, model, path, columns)) from error
    # What is kept or compared may be missing from an object.
    if not is_json:
        try:
            job.selection.check(columns)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error.message}") from error


def _with_context(message: str, model: ServedModel, path: str, columns: Columns) -> str:
    parts = [message]
    if model.spec is not None and model.spec.describe() not in message:
        parts.append(model.spec.describe())
    if "the file has" not in message:
        parts.append(f"{path} has {list_columns(columns.names)}")
    return "; ".join(parts)
