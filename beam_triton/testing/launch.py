"""What tritonserver is started with: its arguments, environment variables and backend folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from beam_triton.testing.server_environment import ServerEnvironment

ModelsControl = Literal["none", "explicit", "poll"]


def command(
    environment: ServerEnvironment,
    *,
    model_repository: Path,
    backends: Path,
    shared_memory_prefix: str,
    port_numbers: Mapping[str, int | None],
    models_control: ModelsControl,
    load_models: Sequence[str],
    exit_timeout_seconds: float,
    extra_args: Sequence[str],
) -> list[str]:
    """The command line; a service (http, grpc, metrics) whose port is None is switched off."""
    arguments = [
        str(environment.tritonserver),
        f"--model-repository={model_repository}",
        f"--backend-directory={backends}",
        # Servers with one prefix take each other's regions for their own.
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
        f"--model-control-mode={models_control}",
        f"--exit-timeout-secs={max(1, round(exit_timeout_seconds))}",
        "--log-info=0",
    ]
    for service, port in port_numbers.items():
        if port is None:
            arguments.append(f"--allow-{service}=0")
        else:
            arguments += [f"--{service}-address=127.0.0.1", f"--{service}-port={port}"]
    if models_control == "poll":
        arguments.append("--repository-poll-secs=1")
    arguments += [f"--load-model={name}" for name in load_models]
    return [*arguments, *extra_args]


def variables(environment: ServerEnvironment, added: Mapping[str, str]) -> dict[str, str]:
    """The server's environment variables: this process's own without those of its Python, and ``added``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # The stub finds its standard library, and so its NumPy, through the first python3 on PATH.
    path = [str(environment.folder / "bin"), inherited.get("PATH", os.defpath)]
    library_path = [environment.library_path, inherited.get("LD_LIBRARY_PATH", "")]
    return {
        **inherited,
        "PATH": os.pathsep.join(path),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, library_path)),
        "PYTHONNOUSERSITE": "1",
        # A __pycache__ beside model.py would be a change of the model under "poll".
        "PYTHONDONTWRITEBYTECODE": "1",
        **added,
    }


def lay_out_backends(environment: ServerEnvironment, folder: Path) -> None:
    """Links the Python backend and its stub into ``folder/python``: Triton looks for both in one place."""
    python = folder / "python"
    python.mkdir(parents=True)
    for file in environment.python_backend.iterdir():
        if file.is_file():
            (python / file.name).symlink_to(file)
    (python / environment.python_backend_stub.name).symlink_to(environment.python_backend_stub)
