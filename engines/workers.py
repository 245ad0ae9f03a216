"""Worker processes as Beam's Docker image starts them: its own boot program, in a bare environment.

The runner starts a command with ``--id`` and ``--provision_endpoint``; the boot program fetches what was
staged, pip-installs the ``workflow.tar.gz`` of ``--setup_file``, and starts Python. Each worker gets
an environment made for it, holding what Beam's image holds and nothing of this repository, so that a file
missing from the package is missing here as it would be on Dataflow.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from engines import install

LOOPBACK = ["--environment_type=LOOPBACK"]
"""Pipeline options for workers that are threads of the process that submits."""

_BOOT = """\
#!/bin/sh
# The workers of the engines in engines; each one's output goes to a file of its own.
set -eu
exec >>{logs}/worker-$$.log 2>&1
environment={environments}/$$
PYTHONPATH={repository} {python} -m engines.bare_environment "$environment"
# Prism quotes the id as for a shell but starts none; the boot program would take the quotes as part of it.
for argument; do
  shift
  set -- "$@" "$(printf %s "$argument" | tr -d "'")"
done
unset PYTHONPATH VIRTUAL_ENV
PATH="$environment/bin:$PATH"
# Without this the boot program makes its environments under /opt/apache, by worker id: those of two task
# managers have the same ids, and race.
RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
export PATH RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT
cd "$environment"
exec {boot} --semi_persist_dir="$environment" "$@"
"""


def process_environment_options(folder: Path) -> list[str]:
    """Pipeline options for worker processes of this kind; logs and environments go below ``folder``.

    The workers get the library by way of ``--setup_file``, as anywhere.
    """
    command = _write_boot_script(folder)
    return [
        f"--setup_file={install.REPOSITORY / 'setup.py'}",
        "--environment_type=PROCESS",
        f"--environment_config={json.dumps({'command': str(command)})}",
    ]


def worker_logs(folder: Path) -> list[Path]:
    """What the workers below ``folder`` have written, one file each."""
    return sorted((folder / "workers").glob("worker-*.log"))


def _write_boot_script(folder: Path) -> Path:
    # Here rather than by two workers at once, which would wait for each other's lock.
    install.worker_packages()
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
