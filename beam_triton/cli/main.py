"""The command line: arguments in, exit code out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from beam_triton.cli import arguments, check, tune
from beam_triton.errors import ConfigurationError, TritonError

EXIT_OK = 0
EXIT_PROBLEM = 1
EXIT_WRONG_USE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 all is well, 1 something is wrong with the server, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m beam_triton",
        description="Look at a server of the Open Inference Protocol (Triton), and measure it.",
        epilog="Exit codes: 0 all is well, 1 something is wrong with the server or model, 2 wrong use.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (check, tune):
        command.add_arguments(commands)
    given = parser.parse_args(argv)
    try:
        well: bool = given.run(given)
    except ConfigurationError as error:
        print(f"{parser.prog}: {error.message}", file=sys.stderr)
        return EXIT_WRONG_USE
    except TritonError as error:
        print(arguments.explained(error), file=sys.stderr)
        return EXIT_PROBLEM
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_PROBLEM
    return EXIT_OK if well else EXIT_PROBLEM
