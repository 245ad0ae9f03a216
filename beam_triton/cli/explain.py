"""``explain``: where a job's time went, from its metrics and the server's configuration."""

from __future__ import annotations

import argparse
from typing import Any

from beam_triton.cli import EXIT_OK
from beam_triton.cli.arguments import FLAGS, add_options, add_server, options_of
from beam_triton.client import TritonClient
from beam_triton.errors import ConfigurationError
from beam_triton.policy.diagnosis import ServerSettings, diagnose
from beam_triton.transforms.explanation import read_metrics


def add_arguments(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="say where a job's time went, and which setting to change",
        description="Read the metrics of a job that has run, on any runner, and say where its time went and "
        "the one setting to change, if any. FILE is what beam_triton.write_metrics(result.metrics(), FILE) "
        "or score --metrics FILE has written, or what gcloud dataflow metrics list JOB --source=user "
        "--format=json prints.",
    )
    parser.add_argument("file", metavar="FILE", help="the metrics, on this machine or as gs://…")
    add_server(parser, as_option=True)
    parser.add_argument(
        "--model", metavar="NAME", help="the model, whose configuration the server is asked for"
    )
    FLAGS.add_to(parser, "model_version")
    add_options(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print where the time of a job went, and what to change.

    Raises:
        ConfigurationError: an argument makes no sense, or the file holds no metrics.
        TritonError: the server does not answer, or does not have the model.
    """
    if (given.endpoint is None) != (given.model is None):
        raise ConfigurationError("--endpoint and --model belong together: give both, or neither")
    metrics = read_metrics(given.file)
    print(diagnose(metrics, None if given.endpoint is None else settings_of(given)))
    return EXIT_OK


def settings_of(given: argparse.Namespace) -> ServerSettings:
    """What the server says of the model's configuration."""
    with TritonClient(given.endpoint, **options_of(given)) as client:
        config = client.model_config(given.model)
        return ServerSettings("dynamic_batching" in config)
