"""The options of ``python -m beam_triton score``, beside Beam's own, and the job that they describe."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from apache_beam.options import pipeline_options
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.score.file_reading import FileSource
from beam_triton.score.input_columns import InputColumns
from beam_triton.score.result_writing import Target
from beam_triton.score.row_steps import RowSelection, ServedModel

# Runners whose workers are this process or its children.
_LOCAL_RUNNERS = frozenset(
    {"directrunner", "fnapirunner", "bundlebaseddirectrunner", "switchingdirectrunner", "prismrunner"}
)
# Their job servers have options that Beam's Python does not know.
_JOB_SERVER_RUNNERS = frozenset({"portablerunner", "flinkrunner", "sparkrunner"})


class ScoreOptions(PipelineOptions):
    """What scoring files takes beside Beam's own options."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        add = parser.add_argument
        add("--files", nargs="+", action="extend", metavar="PATH", help="files and globs to read; repeatable")
        add("--input_format", help="csv, jsonl or parquet; by default what the file's suffix says")
        add("--delimiter", help="between the fields of a CSV; default: a comma, or a tab for .tsv")
        add("--columns", help="a,b,c: names of the columns of CSV files without a header")
        add("--where", action="append", metavar="COLUMN=TEXT", help="read only such rows; repeatable")
        size = {"type": int, "default": FileSource().piece_bytes}
        add(
            "--piece_bytes",
            **size,
            help="larger Parquet files are read in pieces by several workers; 0: never",
        )
        add("--endpoint", action="append", metavar="URL", help="of the server; repeat or a,b for fail-over")
        add("--model", help="name of the model; may be left out for a repository that holds one")
        add("--model_version", help="default: the server's choice")
        add("--model_repository", help="served by a Triton on this machine when there is no --endpoint")
        add("--auth_token", help="env:NAME or file:PATH of a bearer token, read on the workers")
        says = (
            "feed an input: image=pixels, image=p0:p63, image=a,b; repeatable; default: of the input's name"
        )
        add("--input", action="append", metavar="NAME=COLUMNS", help=f"columns that {says}")
        add("--outputs", help="a,b: outputs to ask for; default: all")
        add("--keep", help="columns that travel with the result: id,expected=label")
        add("--with_origin", action="store_true", help="write each result's file and row")
        add(
            "--output", metavar="PATH", help="results.jsonl, .parquet or .csv; results-*.jsonl for many files"
        )
        add("--output_format", help="jsonl, parquet or csv; by default what the suffix says")
        add("--failures", metavar="PATH", help="default: beside the output, as NAME-failures.jsonl")
        add("--max_failures", type=int, help="more failed rows than this end the job; default: no limit")
        add("--batch_size", type=int, help="rows a request, at most; default: the model's own limit")
        add("--max_concurrent_requests", type=int, default=32, help="requests in flight a process")
        add("--timeout_seconds", type=float, default=30.0, help="for a request, its retries included")
        add("--progress_seconds", type=float, default=2.0, help="between lines of progress; 0: none")


class ScoreJob:
    """A job of checked options: everything that can be known wrong without looking at files or server.

    ``given`` are the options as they came, ``keep`` maps a result's field to its column, and
    ``model_repository`` stands in where no option gives one. Raises ConfigurationError, naming the option.
    """

    def __init__(self, options: PipelineOptions, model_repository: Path | None = None) -> None:
        self.given = given = options.view_as(ScoreOptions)
        for name in ("files", "output"):
            if not getattr(given, name):
                raise ConfigurationError(f"--{name} is needed; --help lists all options")
        if given.max_failures is not None and given.max_failures < 0:
            raise ConfigurationError(f"--max_failures must be 0 or more, not {given.max_failures}")
        # Options that the library checks again, here only for messages that name the flag.
        for name in ("batch_size", "max_concurrent_requests", "timeout_seconds"):
            value = getattr(given, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"--{name} must be positive, not {value}")
        if given.auth_token is not None and not given.auth_token.startswith(("env:", "file:")):
            raise ConfigurationError(
                "--auth_token must be env:NAME or file:PATH: a token on the command line would be seen in "
                "the list of processes and on the job's page"
            )
        self.keep = _keep(given.keep)
        self.endpoint = tuple(url for text in given.endpoint or () for url in _names("--endpoint", text))
        self.outputs = tuple(_names("--outputs", given.outputs)) or None
        self.model_repository = Path(given.model_repository) if given.model_repository else model_repository
        self.source = FileSource(
            format=given.input_format,
            delimiter=given.delimiter,
            columns=tuple(_names("--columns", given.columns)) or None,
            piece_bytes=given.piece_bytes,
        )
        self.selection = RowSelection(
            inputs=tuple(InputColumns.parse(text) for text in given.input or ()),
            keep=tuple(self.keep.values()),
            where=tuple(_where(text) for text in given.where or ()),
        )
        self.output = Target(path=given.output, format=given.output_format)
        self.failures = Target(path=given.failures or _failures_beside(given.output), format="jsonl")

    def served(self, endpoint: Sequence[str], name: str) -> ServedModel:
        """The model, where it is served."""
        options = InferenceOptions(
            endpoint=tuple(endpoint),
            outputs=self.outputs,
            batching=BatchingPolicy(max_batch_size=self.given.batch_size),
            model_version=self.given.model_version,
            auth_token=self.given.auth_token,
            timeout_seconds=self.given.timeout_seconds,
            max_concurrent_requests=self.given.max_concurrent_requests,
        )
        return ServedModel(name=name, options=options)


def parse_options(arguments: Sequence[str], program: str = "score_files") -> PipelineOptions:
    """All of Beam's options and ours.

    Ends the program with exit code 2 for an unknown option, which Beam itself would drop with a warning, and
    with 0 after ``--help``.
    """
    # Importing the module is what makes Beam's options known, this program's among them.
    parser = _Parser(prog=program, allow_abbrev=False, add_help=False)
    if "--help" in arguments or "-h" in arguments:
        # Without the screens of Beam's own.
        own = argparse.ArgumentParser(
            program,
            description="Score the rows of CSV, JSON Lines or Parquet files on a model of a Triton server.",
            epilog="All of Beam's options, such as --runner, work as well.",
        )
        ScoreOptions._add_argparse_args(own)
        own.parse_args(["--help"])
    for options_class in PipelineOptions.__subclasses__():
        options_class._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(arguments))
    options = PipelineOptions(list(arguments))
    if unknown and _runner_name(options) not in _JOB_SERVER_RUNNERS:
        known = [flag for action in parser._actions for flag in action.option_strings]
        name = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"neither {program} nor Beam has an option {name}{hint}")
    standard = options.view_as(StandardOptions)
    if standard.runner is None:
        # DirectRunner would look for Prism first and may download it.
        standard.runner = "FnApiRunner"
    return options


def runs_here(options: PipelineOptions) -> bool:
    """Whether the workers are on this machine, started by this process."""
    return _runner_name(options) in _LOCAL_RUNNERS


def counts_here(options: PipelineOptions) -> bool:
    """Whether the workers are threads of this process, so that its counts say how far they are."""
    mode = options.view_as(pipeline_options.DirectOptions).direct_running_mode
    return runs_here(options) and mode != "multi_processing"


def _runner_name(options: PipelineOptions) -> str:
    name = str(options.view_as(StandardOptions).runner or "FnApiRunner").rpartition(".")[2].lower()
    return name if name.endswith("runner") else f"{name}runner"


class _Parser(pipeline_options._BeamArgumentParser):
    """Says what is wrong in one line; the usage of all of Beam's options fills screens."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _names(option: str, text: str | None) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text is not None else []
    if not all(names):
        raise ConfigurationError(f"{option} {text!r} must be names with commas between them")
    return names


def _keep(text: str | None) -> dict[str, str]:
    keep: dict[str, str] = {}
    for name in _names("--keep", text):
        field, _, column = name.partition("=")
        if field in keep:
            raise ConfigurationError(f"--keep {text!r} names {field!r} twice")
        keep[field] = column or field
    return keep


def _where(text: str) -> tuple[str, str]:
    column, equals, wanted = text.partition("=")
    if not equals or not column:
        raise ConfigurationError(f"--where {text!r} must be COLUMN=TEXT")
    return column, wanted


def _failures_beside(output: str) -> str:
    folder, slash, name = output.rpartition("/")
    stem = name.partition(".")[0]
    star = "" if "*" not in stem else "-*"
    return f"{folder}{slash}{stem.replace('*', '').rstrip('-_')}-failures{star}.jsonl"
