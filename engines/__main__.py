"""Commands that the Makefile and the workers' boot script run: ``python -m engines COMMAND``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engines import install, tools, workers

parser = argparse.ArgumentParser(prog="python -m engines", description=__doc__)
commands = parser.add_subparsers(dest="command", required=True)
commands.add_parser("install", help="install every engine that is not there yet into .engines")
commands.add_parser("install-worker-packages", help="install only the Python packages of a bare worker")
commands.add_parser("install-flink-function", help="install only Flink's own Triton function")
commands.add_parser("check-tools", help="check that Java, Maven and Go are there; install nothing")
environment = commands.add_parser("worker-environment", help="make the Python environment of one worker")
environment.add_argument("folder", type=Path)
arguments = parser.parse_args()
try:
    if arguments.command == "install":
        install.install_all()
    elif arguments.command == "install-worker-packages":
        install.install_worker_packages()
    elif arguments.command == "install-flink-function":
        install.install_flink_function()
    elif arguments.command == "check-tools":
        tools.require_all()
    else:
        workers.bare_environment(arguments.folder)
except (tools.MissingToolsError, install.InstallError, install.NotInstalledError) as error:
    sys.exit(f"error: {error}")
