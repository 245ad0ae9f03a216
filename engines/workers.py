"""Worker processes as Beam's Docker image starts them: its own boot program, in a bare environment.

The runner starts a command with ``--id`` and ``--provision_endpoint``. The boot program downloads the
staged files, pip-installs the ``workflow.tar.gz`` of ``--setup_file`` and starts Python. Each worker gets
a new environment with the packages of Beam's image and nothing of this repository, so that a file which
is missing from the package is missing here as it would be on Dataflow.
"""

from __future__ import annotations

import json
import shlex
import sys
import venv
from pathlib import Path

from engines import install

LOOPBACK = ["--environment_type=LOOPBACK"]
"""Pipeline options that run the workers as threads of the process that submits."""

_BOOT = """\
#!/bin/sh
# Starts one worker; its output goes to a file of its own.
set -eu
exec >>{logs}/worker-$$.log 2>&1
environment={environments}/$$
PYTHONPATH={repository} {python} -m engines worker-environment "$environment"
# Prism quotes the id for a shell but starts no shell, and the boot program would keep the quotes.
for argument; do
  shift
  set -- "$@" "$(printf %s "$argument" | tr -d "'")"
done
unset PYTHONPATH VIRTUAL_ENV
PATH="$environment/bin:$PATH"
# Otherwise the boot program makes environments under /opt/apache by worker id; workers of two task managers
# have the same ids and would race.
RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
export PATH RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT
cd "$environment"
exec {boot} --semi_persist_dir="$environment" "$@"
"""


def process_environment_options(folder: Path) -> list[str]:
    """Pipeline options for such worker processes, which install the library from ``--setup_file``.

    Their logs and environments go below ``folder``.
    """
    command = _write_boot_script(folder)
    return [
        f"--setup_file={install.REPOSITORY / 'setup.py'}",
        "--environment_type=PROCESS",
        f"--environment_config={json.dumps({'command': str(command)})}",
    ]


def bare_environment(folder: Path) -> Path:
    """Make an environment as on a worker before anything was staged, and return its Python.

    It holds Beam and its build tools, and nothing of this repository. Packages are not copied: they stay
    in the folder where they are installed once.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    line = f"import site; site.addsitedir({str(install.worker_packages())!r})\n"
    (site_packages / "worker_packages.pth").write_text(line)
    return folder / "bin" / "python"


def _write_boot_script(folder: Path) -> Path:
    install.worker_packages()  # raises here, not in a worker, if they are not installed
    logs = folder / "workers"
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / "boot.sh"
    script.write_text(
        _BOOT.format(
            python=shlex.quote(sys.executable),
            repository=shlex.quote(str(install.REPOSITORY)),
            boot=shlex.quote(str(install.go_programs().boot)),
            logs=shlex.quote(str(logs)),
            environments=shlex.quote(str(logs / "environment")),
        )
    )
    script.chmod(0o755)
    return script
