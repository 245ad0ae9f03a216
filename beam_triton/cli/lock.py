"""``lock``: writes a model's contract to a file, or compares such a file with the served model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from beam_triton.cli import EXIT_OK, EXIT_PROBLEM
from beam_triton.cli.arguments import FLAGS, add_options, add_server, options_of
from beam_triton.client import TritonClient
from beam_triton.options import InferenceOptions
from beam_triton.protocol import ModelSpec
from beam_triton.protocol.contract import differences


def add_arguments(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "lock",
        help="write a model's inputs, outputs and limits to a lock file, or check the model against one",
        description="Write a model's contract (inputs, outputs, limits, a hash) to a lock file, which "
        "model_spec= takes: pipelines are built without a server, and workers refuse another model.",
    )
    add_server(parser)
    parser.add_argument("model", metavar="MODEL", help="the model")
    FLAGS.add_to(parser, "model_version", help="pin this version (default: the server's choice)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--output", metavar="FILE", help="where to write (default: MODEL.lock.json)")
    group.add_argument(
        "--check",
        metavar="FILE",
        help="write nothing: print how the model differs from this lock file, and exit with 1 where "
        "that does harm",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Write the file, or print the differences; EXIT_PROBLEM if one of them does harm.

    Raises:
        ConfigurationError: an argument makes no sense, or there is no lock file of the model where one is
            named.
        TritonError: the server does not answer, or does not have the model.
    """
    options = options_of(given)
    locked = None
    if given.check is not None:
        checked = InferenceOptions.from_options({"endpoint": given.endpoint, "model_spec": given.check})
        locked = checked.spec_of(given.model)
    with TritonClient(given.endpoint, **options) as client:
        spec, notes = client.model_findings(given.model)
        for note in notes:
            print(f"note: {note}")
    if locked is not None:
        return _check(locked, spec, options)
    # Which version is served changes with every deployment.
    spec = replace(spec, version=given.model_version or "")
    path = given.output or f"{given.model.replace('/', '_')}.lock.json"
    spec.save(path)
    print(f"{path}: {spec.model_id}, {spec.describe()}")
    return EXIT_OK


def _check(locked: ModelSpec, served: ModelSpec, options: dict[str, Any]) -> int:
    found = differences(locked, served, outputs=options.get("outputs"))
    for difference in found:
        print(f"{'PROBLEM' if difference.is_harmful else 'harmless'}: {difference.text}")
    if not found:
        print(f"The served model is the one that {locked.lock_file} describes.")
    return EXIT_PROBLEM if found and found[0].is_harmful else EXIT_OK
