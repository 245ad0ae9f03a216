"""The command line: arguments in, exit code out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from beam_triton.cli import EXIT_PROBLEM, EXIT_WRONG_USE, check, explain, lock, tune
from beam_triton.cli.arguments import explained
from beam_triton.errors import ConfigurationError, ModelMismatchError, TritonError

# Each command's module has ``add_arguments``, which adds its parser and sets ``run`` to a function that
# takes the parsed arguments and returns an exit code.
_COMMANDS = (check, tune, explain, lock)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 no problems, 1 a problem with the server or model, 2 wrong use."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in ("score", "replay"):
        # They take Beam's options as well, which argparse's subcommands would refuse.
        from beam_triton.score import score_command

        program = f"python -m beam_triton {words[0]}"
        return score_command.main(words[1:], program, replays=words[0] == "replay")
    parser = argparse.ArgumentParser(
        prog="python -m beam_triton",
        description="Inspect and measure a server of the Open Inference Protocol, such as Triton.",
        epilog="Files are scored by score, and rows that failed again by replay: see their --help. "
        "Exit codes: 0 no problems, 1 a problem with the server or model, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"beam-triton {version('beam-triton')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_arguments(commands)
    given = parser.parse_args(argv)
    try:
        exit_code: int = given.run(given)
    except ConfigurationError as error:
        print(f"{parser.prog}: {error.message}", file=sys.stderr)
        return EXIT_PROBLEM if isinstance(error, ModelMismatchError) else EXIT_WRONG_USE
    except TritonError as error:
        print(explained(error), file=sys.stderr)
        return EXIT_PROBLEM
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_PROBLEM
    return exit_code
