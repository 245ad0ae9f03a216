"""The options of scoring files: what they mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from beam_triton import ConfigurationError, ConnectionPoolConfig
from beam_triton.score.input_columns import InputColumns
from beam_triton.score.job_options import ScoreJob, ScoreOptions, parse_options, runs_here


def job(*arguments: str) -> ScoreJob:
    return ScoreJob(parse_options(["--files", "a.csv", "--output", "out/r.jsonl", *arguments]))


def test_every_option_reaches_the_job() -> None:
    """Repeated options and lists with commas are put together."""
    found = job(
        *("--files", "b.csv", "c.csv", "--where", "split=a=b", "--columns", "x,y", "--delimiter", ";"),
        *("--endpoint", "http://a:1,http://b:2", "--endpoint", "http://c:3", "--model", "m"),
        *("--input", "i=x,y", "--input", "j=z", "--keep", "id,expected=label", "--outputs", "p,q"),
        *("--batch_size", "16", "--max_failures", "0", "--failures", "f.jsonl", "--auth_token", "env:TOKEN"),
    )
    assert found.given.files == ["a.csv", "b.csv", "c.csv"]
    assert found.endpoint == ("http://a:1", "http://b:2", "http://c:3")
    assert found.keep == {"id": "id", "expected": "label"}
    assert found.selection.keep == ("id", "label")
    assert found.selection.where == (("split", "a=b"),)
    assert found.selection.inputs == (InputColumns("i", ("x", "y")), InputColumns("j", ("z",)))
    assert found.source.columns == ("x", "y")
    assert (found.outputs, found.given.max_failures, found.failures.path) == (("p", "q"), 0, "f.jsonl")
    options = found.served(found.endpoint, "m").options
    assert [str(url) for url in options.urls] == ["http://a:1", "http://b:2", "http://c:3"]
    assert (options.outputs, options.batching.max_batch_size) == (("p", "q"), 16)
    assert options.auth_token == "env:TOKEN"


def test_the_pool_follows_the_other_options() -> None:
    """More requests in flight than the default pool allows, or less time than it takes to connect."""
    large = job("--max_concurrent_requests", "500", "--timeout_seconds", "4")
    pool = large.served(["http://a:1"], "m").options.pool
    assert (pool.max_total, pool.max_idle, pool.connect_timeout_seconds) == (500, 500, 2.0)
    assert job().served(["http://a:1"], "m").options.pool == ConnectionPoolConfig(max_idle=32)


@pytest.mark.parametrize(
    ("output", "failures"),
    [
        ("out/r.jsonl", "out/r-failures.jsonl"),
        ("r.parquet", "r-failures.jsonl"),
        ("gs://b/r.v2-*.jsonl.gz", "gs://b/r-failures.jsonl"),
        ("out/r-*.jsonl", "out/r-failures-*.jsonl"),
    ],
)
def test_failures_go_beside_the_output(output: str, failures: str) -> None:
    """Unless another place is given, nothing of them is lost."""
    assert job("--output", output).failures.path == failures


def test_options_are_restored_from_a_dictionary() -> None:
    """Runners hand options on as a dictionary."""
    given = ["--files", "a.csv", "b.csv", "--output", "r.jsonl", "--input", "i=x", "--with_origin"]
    from_dictionary: Any = ScoreOptions.from_dictionary
    copied = from_dictionary(parse_options(given).get_all_options(drop_default=True))
    assert copied.files == ["a.csv", "b.csv"]
    assert copied.input == ["i=x"]
    assert copied.with_origin


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "--batch_size must be positive, not 0"),
        (["--max_concurrent_requests", "-1"], "--max_concurrent_requests must be positive"),
        (["--timeout_seconds", "0"], "--timeout_seconds must be positive"),
        (["--max_failures", "-1"], "--max_failures must be 0 or more"),
        (["--keep", "a,,b"], "--keep 'a,,b'"),
        (["--keep", "a=x,a=y"], "names 'a' twice"),
        (["--where", "split"], "COLUMN=TEXT"),
        (["--input", "image"], "NAME=COLUMNS"),
        (["--output", "out.txt"], "does not tell the format"),
        (["--input_format", "xml"], "'xml' is none of"),
    ],
)
def test_impossible_values_are_refused(arguments: list[str], message: str) -> None:
    """The message names the option and the value."""
    with pytest.raises(ConfigurationError, match=message):
        job(*arguments)


def test_padding_is_refused() -> None:
    """Rows go in columns, and nothing would be padded."""
    padded = job("--triton_batching_bucket_boundaries", "[8, 16]", "--triton_batching_pad", "0")
    with pytest.raises(ConfigurationError, match="score pads nothing"):
        padded.served(["http://a:1"], "m")


def test_a_token_on_the_command_line_is_refused_and_not_repeated() -> None:
    """It would be seen in the list of processes; the message must not show it either."""
    with pytest.raises(ConfigurationError, match="env:NAME or file:PATH") as caught:
        job("--auth_token", "hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("missing", ["--files", "--output"])
def test_missing_files_or_output_are_named(missing: str) -> None:
    """Without files or output there is no job."""
    arguments = {"--files": "a.csv", "--output": "r.jsonl"}
    del arguments[missing]
    with pytest.raises(ConfigurationError, match=f"{missing} is needed"):
        ScoreJob(parse_options([part for pair in arguments.items() for part in pair]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--ouput=x", "has an option --ouput\n"),
        ("--direct_num_worker=2", "has an option --direct_num_worker\n"),
        ("--frobnicate", "has an option --frobnicate\n"),
        ("--batch_size=many", "invalid int value: 'many'"),
    ],
)
def test_unknown_options_end_the_program(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beam would drop them with a warning; here the message is one line."""
    with pytest.raises(SystemExit) as caught:
        parse_options([argument])
    assert caught.value.code == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1


def test_options_of_a_job_server_are_let_through() -> None:
    """Flink's job server has options that Beam's Python does not know."""
    options = parse_options(["--runner=FlinkRunner", "--operator_chaining=true"])
    assert not runs_here(options)


@pytest.mark.parametrize(
    ("arguments", "here"),
    [
        ([], True),
        (["--runner=DirectRunner"], True),
        (["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"], True),
        (["--runner=DataflowRunner"], False),
        (["--runner=PortableRunner"], False),
    ],
)
def test_where_the_workers_are(arguments: list[str], here: bool) -> None:
    """A local server is of use to workers here only."""
    assert runs_here(parse_options(arguments)) == here


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, without the screens of Beam's."""
    with pytest.raises(SystemExit) as caught:
        parse_options(["--help"])
    assert caught.value.code == 0
    written = capsys.readouterr().out
    assert "--input NAME=COLUMNS" in written
    assert "--worker_machine_type" not in written
