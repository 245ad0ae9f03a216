"""``python -m beam_triton.testing.serve [MODEL_REPOSITORY]``: serve a folder of models until interrupted.

Without a folder it only makes the server's environment, and the folder of the packages if there are any, and
prints their paths.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from types import FrameType

from beam_triton.errors import ConfigurationError
from beam_triton.server.environment import find_or_make_packages
from beam_triton.testing import LocalTriton, find_or_make_server_environment


def main() -> int:
    """Exit codes: 0 when interrupted or done, 1 if the server ends by itself, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m beam_triton.testing.serve", description=__doc__)
    parser.add_argument("model_repository", nargs="?", help="a Triton model repository")
    parser.add_argument("--http_port", type=int, help="the port; a free one by default")
    parser.add_argument(
        "--package",
        dest="packages",
        action="append",
        default=[],
        metavar="REQUIREMENT",
        help="a Python package that the models import, such as onnxruntime==1.23.2; may be repeated",
    )
    options = parser.parse_args()
    # SIGTERM would end this process without its exit handlers.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options.model_repository is None:
            environment = find_or_make_server_environment()
            print(environment.folder)
            if options.packages:
                print(find_or_make_packages(environment, options.packages))
            return 0
        with LocalTriton(
            options.model_repository, http_port=options.http_port, packages=options.packages
        ) as triton:
            print(f"serving {options.model_repository} at {triton.endpoint}", flush=True)
            while triton.is_alive:
                time.sleep(0.2)
            print(f"tritonserver ended by itself; its log:\n{triton.log_tail()}", file=sys.stderr)
            return 1
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
