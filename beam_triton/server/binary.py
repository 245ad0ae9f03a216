"""Which tritonserver is started, with which backends and libraries, and the command that all starts share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from beam_triton.errors import ConfigurationError
from beam_triton.server.environment import ServerEnvironment, find_or_make_server_environment
from beam_triton.server.process import server_variables

_IMAGE_BINARY = Path("/opt/tritonserver/bin/tritonserver")


@dataclass(frozen=True)
class ServerBinary:
    """A tritonserver that can be started.

    ``path`` and ``library_path`` are folders that come first in ``PATH`` and ``LD_LIBRARY_PATH``. A server of
    the ``nvidia-pytriton`` wheel has its ``environment``, out of which `lay_out_backends` makes the folder of
    backends; ``backends`` is that of another one, None where it finds its own.
    """

    executable: Path
    path: tuple[str, ...] = ()
    library_path: tuple[str, ...] = ()
    environment: ServerEnvironment | None = None
    backends: Path | None = None

    @classmethod
    def of_wheel(cls, environment: ServerEnvironment) -> ServerBinary:
        """The server of the ``nvidia-pytriton`` wheel."""
        return cls(
            environment.tritonserver,
            path=(str(environment.folder / "bin"),),
            library_path=tuple(environment.library_path.split(os.pathsep)),
            environment=environment,
        )

    @classmethod
    def at(cls, executable: Path) -> ServerBinary:
        """The server of an image of NVIDIA's, or of a copy of its folder: ``bin``, ``lib``, ``backends``."""
        home = executable.resolve().parent.parent
        libraries = (str(home / "lib"),) if (home / "lib").is_dir() else ()
        return cls(
            executable,
            library_path=libraries,
            backends=home / "backends" if (home / "backends").is_dir() else None,
        )

    def variables(self, added: Mapping[str, str]) -> dict[str, str]:
        """The server's environment variables, with ``added``."""
        return server_variables(self.path, self.library_path, added)

    def takes(self, argument: str) -> bool:
        """Whether this version of tritonserver knows the argument."""
        # It prints its help as an error.
        ran = subprocess.run(
            [str(self.executable), "--help"],
            env=self.variables({}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return argument.encode() in ran.stdout

    def lay_out_backends(self, folder: Path, packages: Path | None = None) -> Path | None:
        """The folder of backends, None for the server's own.

        For the server of the wheel it is made at ``folder``: Triton looks for the Python backend and its stub
        in one place. The stub's Python ignores ``PYTHONPATH`` and finds ``packages`` there, after those of
        its environment.
        """
        if self.environment is None:
            return self.backends
        python = folder / "python"
        python.mkdir(parents=True)
        for file in self.environment.python_backend.iterdir():
            if file.is_file():
                (python / file.name).symlink_to(file)
        stub = self.environment.python_backend_stub
        (python / stub.name).symlink_to(stub)
        for package in packages.iterdir() if packages is not None else ():
            (python / package.name).symlink_to(package)
        return folder


def find_server_binary(given: str | os.PathLike[str] | None) -> ServerBinary:
    """The tritonserver at ``given``; without it the first of: the one on ``PATH``, that of NVIDIA's images
    (``/opt/tritonserver``), that of the ``nvidia-pytriton`` wheel, which is installed in an environment of
    its own if need be.

    Raises:
        ConfigurationError: there is none.
    """
    if given is not None:
        path = Path(given)
        if not os.access(path, os.X_OK) or path.is_dir():
            raise ConfigurationError(f"binary={os.fspath(given)!r}: this machine has no such program")
        return ServerBinary.at(path)
    found = shutil.which("tritonserver")
    if found is not None:
        return ServerBinary.at(Path(found))
    if os.access(_IMAGE_BINARY, os.X_OK):
        return ServerBinary.at(_IMAGE_BINARY)
    try:
        return ServerBinary.of_wheel(find_or_make_server_environment())
    except ConfigurationError as error:
        raise ConfigurationError(
            f"this machine has no tritonserver: none is on PATH or at {_IMAGE_BINARY}, and that of the "
            f"nvidia-pytriton wheel cannot be used: {error} Run the workers in an image that has Triton (see "
            f"docs/worker-triton.md), or name its program: "
            f'WorkerTriton(…, binary="/path/to/bin/tritonserver")'
        ) from error


def server_command(
    binary: ServerBinary,
    model_repository: Path,
    *,
    backends: Path | None,
    shared_memory_prefix: str,
    exit_timeout_seconds: float,
    services: Mapping[str, tuple[str, int] | None],
    more: Iterable[str] = (),
) -> list[str]:
    """The command that starts the server.

    ``services`` are ``http``, ``grpc`` and ``metrics``, each with its address and port, or None for a service
    that is off. ``more`` comes last, and so counts where it contradicts.
    """
    arguments = [str(binary.executable), f"--model-repository={model_repository}"]
    if backends is not None:
        arguments.append(f"--backend-directory={backends}")
    arguments += [
        # Servers with one prefix take each other's regions for their own.
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
        f"--exit-timeout-secs={max(1, round(exit_timeout_seconds))}",
        "--log-info=0",
    ]
    for service, place in services.items():
        if place is None:
            arguments.append(f"--allow-{service}=0")
        else:
            address, port = place
            arguments += [f"--{service}-address={address}", f"--{service}-port={port}"]
    return [*arguments, *more]
