"""The options of ``python -m beam_triton score``, beside Beam's own, and the job that they describe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from apache_beam.options import pipeline_options
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from beam_triton.errors import ConfigurationError
from beam_triton.flags import Spelling, names_of, with_texts, with_values
from beam_triton.options import InferenceOptions
from beam_triton.score.file_reading import AnyFileSource, ImageDecoding
from beam_triton.score.input_columns import InputColumns
from beam_triton.score.pipeline_steps import RowSelection, ServedModel
from beam_triton.score.replay import FailedRows
from beam_triton.score.result_writing import Target
from beam_triton.transforms.pipeline_options import TritonOptions

# Runners whose workers are this process or its children.
_LOCAL_RUNNERS = ("direct", "fnapi", "bundlebaseddirect", "switchingdirect", "prism")

# Short for those of TritonOptions, which are taken as well.
_FLAGS = Spelling(
    {
        "endpoint": "--endpoint",
        "model_version": "--model_version",
        "auth_token": "--auth_token",
        "batching_max_batch_size": "--batch_size",
        "max_concurrent_requests": "--max_concurrent_requests",
        "timeout_seconds": "--timeout_seconds",
        "outputs": "--outputs",
    }
)


class ScoreOptions(PipelineOptions):
    """The options of scoring files."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        add = parser.add_argument_group("files").add_argument
        add("--files", nargs="+", action="extend", metavar="PATH", help="files and globs to read; repeatable")
        add(
            "--replay",
            action="store_true",
            help="the files are failures of an earlier run, whose rows are scored again: results join those "
            "in --output, and --failures, by default the file itself, keeps what fails again",
        )
        add("--input_format", help="csv, jsonl, parquet, image or bytes; default: by the suffix")
        add("--delimiter", help="of CSV fields; default: a comma, or a tab for .tsv")
        add("--columns", help="a,b,c: names of the columns of CSV files without a header")
        image = "of images: size=[224,224], layout=CHW, rescale_factor=0.00392, mean, std, mode=L; repeatable"
        add("--image", action="append", metavar="NAME=JSON", help=image)
        add("--where", action="append", metavar="COLUMN=TEXT", help="read only these rows; repeatable")
        add(
            "--piece_bytes",
            type=int,
            default=64 << 20,
            help="larger Parquet files are read in pieces; 0: never",
        )
        group = parser.add_argument_group(
            "model", "Every other option is a flag --triton_NAME, see docs/options.md"
        )
        add = group.add_argument
        _FLAGS.add_to(group, "endpoint", metavar="URL", help="of the server; repeat, or a,b, for fail-over")
        add("--model", help="name of the model; optional for a repository of one model")
        add("--model_repository", help="without --endpoint: the models of a Triton started on this machine")
        columns = "image=pixels, image=p0:p63 or image=a,b; repeatable; default: the input's name"
        add("--input", action="append", metavar="NAME=COLUMNS", help=columns)
        _FLAGS.add_to(group, *(name for name in _FLAGS.flags if name not in ("endpoint", "outputs")))
        add(
            "--option",
            action="append",
            metavar="NAME=JSON",
            help="any other keyword argument of TritonInference, such as binary=false, auth=google or "
            "auth=aws:eu-west-1; repeatable",
        )
        group = parser.add_argument_group("results")
        add = group.add_argument
        add("--output", metavar="PATH", help="results.jsonl or .parquet; results-*.jsonl for many files")
        _FLAGS.add_to(group, "outputs", help="the model's outputs to write; default: all")
        add("--keep", help="id,expected=label: columns to copy into the result")
        add("--with_origin", action="store_true", help="write the file and row of each result")
        add("--failures", metavar="PATH", help="default: beside the output, as NAME-failures.jsonl")
        add("--max_failures", type=int, help="more failed rows end the job; default: no limit")
        add("--metrics", metavar="PATH", help="write the job's metrics, for python -m beam_triton explain")
        add("--progress_seconds", type=float, default=2.0, help="between progress lines; 0: none; default: 2")
        add("--report", metavar="FILE.html", help="charts of the run on this machine, see docs/watching.md")


class ScoreJob:
    """A job of options that are checked as far as that needs neither files nor server.

    ``given`` are the options themselves, ``keep`` maps a result's field to its column. Raises
    ConfigurationError, which names the option.
    """

    def __init__(self, options: PipelineOptions, model_repository: Path | None = None) -> None:
        self.given = given = options.view_as(ScoreOptions)
        for name in ("files", "output"):
            if not getattr(given, name):
                raise ConfigurationError(f"--{name} is needed; --help lists all options")
        if given.max_failures is not None and given.max_failures < 0:
            raise ConfigurationError(f"--max_failures must be 0 or more, not {given.max_failures}")
        # The library checks these again, without naming the flag.
        for name in ("batch_size", "max_concurrent_requests", "timeout_seconds"):
            value = getattr(given, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"--{name} must be positive, not {value}")
        self.keep: dict[str, str] = {}
        for text in _names("--keep", given.keep):
            name, _, column = text.partition("=")
            if name in self.keep:
                raise ConfigurationError(f"--keep {given.keep!r} names {name!r} twice")
            self.keep[name] = column or name
        named = options.view_as(TritonOptions).triton_arguments(endpoint=(), model_name="")
        name = named.pop("model_name")
        self.model: str = given.model or name
        self._options = with_texts(with_values(named, _FLAGS.values(given)), given.option or ())
        self.endpoint: tuple[str, ...] = self._options.pop("endpoint")
        self.outputs: Sequence[str] | None = self._options.get("outputs")
        self.model_repository = Path(given.model_repository) if given.model_repository else model_repository
        columns = _names("--columns", given.columns) or None
        self.source = (FailedRows if given.replay else AnyFileSource)(
            format=given.input_format,
            delimiter=given.delimiter,
            columns=columns,
            piece_bytes=given.piece_bytes,
            images=ImageDecoding.from_texts(given.image or ()),
        )
        inputs = tuple(InputColumns.parse(text) for text in given.input or ())
        where = tuple(_where(text) for text in given.where or ())
        self.selection = RowSelection(inputs=inputs, keep=tuple(self.keep.values()), where=where)
        self.output = Target(given.output)
        if given.replay and not given.failures and len(given.files) > 1:
            raise ConfigurationError("--failures is needed: several files cannot be replaced by one")
        by_default = given.files[0] if given.replay else _failures_beside(given.output)
        self.failures = Target(given.failures or by_default, "jsonl")

    def served(self, endpoint: Sequence[str], name: str) -> ServedModel:
        """The model of that name on a server."""
        options = InferenceOptions.from_options({"endpoint": tuple(endpoint), **self._options})
        if options.batching.bucket_boundaries:
            raise ConfigurationError(
                "bucket_boundaries: score pads nothing, as rows of one length share requests; "
                "TritonInference takes elements one by one, and pads them"
            )
        return ServedModel(name=name, options=options)


def replay_arguments(words: Sequence[str]) -> list[str]:
    """The arguments of `score` for those of ``replay``, which begin with the files.

    Raises ConfigurationError where they do not.
    """
    files = [*takewhile(lambda word: not word.startswith("-"), words)]
    if not files and {"--files", "-h", "--help"}.isdisjoint(word.partition("=")[0] for word in words):
        raise ConfigurationError("the files of failures are needed, before the options; --help lists these")
    return ["--replay", *(["--files", *files] if files else ()), *words[len(files) :]]


def parse_options(arguments: Sequence[str], program: str = "score_files") -> PipelineOptions:
    """All of Beam's options and ours.

    Ends the program after ``--help``, and for an unknown option, which Beam itself would drop with a warning.
    """
    parser = pipeline_options._BeamArgumentParser(
        prog=program,
        # That of all of Beam's options would fill screens at each error.
        usage=argparse.SUPPRESS,
        description="Score rows of CSV, JSON Lines or Parquet files, images, or whole files on a model of a "
        "Triton server; or again the rows that failed.",
        epilog="All of Beam's options, such as --runner, work as well.",
        allow_abbrev=False,
    )
    ScoreOptions._add_argparse_args(parser)
    if {"-h", "--help"}.intersection(arguments):
        files = "FAILURES" if "--replay" in arguments else "--files PATH"
        parser.usage = f"{program} {files} --endpoint URL --model NAME --output PATH [option ...]"
        # Beam's options would fill screens.
        parser.parse_args(["--help"])
    for options_class in PipelineOptions.__subclasses__():
        if options_class is not ScoreOptions:
            options_class._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(arguments))
    options = PipelineOptions(list(arguments))
    # The job servers of other runners have options that Beam's Python does not know.
    if unknown and (runs_here(options) or runner_of(options) == "dataflow"):
        parser.error(f"neither {program} nor Beam has an option {unknown[0].partition('=')[0]}")
    # DirectRunner would look for Prism first and may download it.
    options.view_as(StandardOptions).runner = options.view_as(StandardOptions).runner or "FnApiRunner"
    return options


def runner_of(options: PipelineOptions) -> str:
    """The runner's short name, such as ``dataflow``."""
    name = str(options.view_as(StandardOptions).runner or "FnApiRunner")
    return name.rpartition(".")[2].lower().removesuffix("runner")


def runs_here(options: PipelineOptions) -> bool:
    """Whether the workers are on this machine, started by this process."""
    return runner_of(options) in _LOCAL_RUNNERS


def _names(option: str, text: str | None) -> tuple[str, ...]:
    try:
        return names_of(text) if text is not None else ()
    except ConfigurationError as error:
        raise ConfigurationError(f"{option} {error.message}") from None


def _where(text: str) -> tuple[str, str]:
    column, equals, wanted = text.partition("=")
    if not column or not equals:
        raise ConfigurationError(f"--where {text!r} must be COLUMN=TEXT")
    return column, wanted


def _failures_beside(output: str) -> str:
    folder, name = os.path.split(output)
    stem = name.partition(".")[0]
    star = "-*" if "*" in stem else ""
    return os.path.join(folder, f"{stem.replace('*', '').rstrip('-_')}-failures{star}.jsonl")
