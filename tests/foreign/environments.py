"""The virtual environments of the other servers, one for each, in the user's cache folder.

``python -m tests.foreign.environments`` makes those that are missing. It takes minutes, which are no test's:
nothing is installed while tests run. A file of ``requirements`` pins everything that a server needs, as pip
resolved it for Python 3.10 (but ``xgboost-cpu`` for ``xgboost``, which adds a hundred megabytes for GPUs);
where it changes, a new environment is made.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

from beam_triton.errors import ConfigurationError
from beam_triton.server.environment import cache_folder, install, make_folder
from beam_triton.server.platform_check import find_python

_REQUIREMENTS = Path(__file__).parent / "requirements"

SERVERS = tuple(sorted(file.stem for file in _REQUIREMENTS.glob("*.txt")))

_logger = logging.getLogger("beam_triton.testing")


def folder_of(server: str) -> Path:
    """Where the environment of this server is, or will be."""
    digest = hashlib.sha256(_requirements(server).read_bytes()).hexdigest()
    return cache_folder() / f"foreign-{server}-{digest[:12]}"


def python_of(server: str) -> Path:
    """The interpreter of this server's environment.

    Raises `ConfigurationError` if it has not been made.
    """
    python = folder_of(server) / "bin" / "python3"
    if not _runs(folder_of(server)):
        raise ConfigurationError(
            f"the environment of {server} is not installed: run make foreign-servers, or "
            f"python -m tests.foreign.environments"
        )
    return python


def make(server: str) -> None:
    """Makes the environment of this server, unless it is there."""
    folder = folder_of(server)

    def fill(partial: Path) -> None:
        _logger.warning("Making the environment of %s in %s, once.", server, folder)
        # A server imports a small part of what is installed: compiling all of it takes longer than it saves.
        install(find_python(), partial, ["--no-compile", "--requirement", str(_requirements(server))])

    make_folder(folder, fill, is_usable=_runs)


def _requirements(server: str) -> Path:
    return _REQUIREMENTS / f"{server}.txt"


def _runs(folder: Path) -> bool:
    # The link is dangling where the interpreter that it was made with has been uninstalled.
    return (folder / "bin" / "python3").exists()


def main() -> int:
    try:
        for server in SERVERS:
            make(server)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
