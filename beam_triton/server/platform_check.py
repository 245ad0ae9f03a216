"""Which machines and interpreters can run the server of the ``nvidia-pytriton`` wheel."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from beam_triton.errors import ConfigurationError

# NumPy 1.26, the last release line that the Python backend's stub works with, has wheels up to CPython 3.12.
SUPPORTED_PYTHON_VERSIONS = ("3.10", "3.11", "3.12")
OLDEST_GLIBC = (2, 35)  # the wheel is tagged manylinux_2_35_x86_64

ADVICE = "use a Triton server that runs elsewhere, or beam_triton.testing.FakeTriton in tests"

# Runs in a candidate interpreter. The server's stub links libpython dynamically, and has to get the library
# of the interpreter whose standard library it loads: a build without a shared library cannot be used.
_PROBE = """
import ensurepip, json, os, platform, sys, sysconfig, venv
version = "%d.%d" % sys.version_info[:2]
name = "libpython" + version + ".so.1.0"
folders = [sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib")]
folders = [folder for folder in folders if folder and os.path.exists(os.path.join(folder, name))]
print(json.dumps({
    "implementation": platform.python_implementation(),
    "version": version,
    "executable": sys.executable,
    "library_folder": folders[0] if folders else None,
}))
"""


@dataclass(frozen=True)
class PythonInterpreter:
    """A CPython that the server's environment can be made of.

    ``version`` is "3.11"; ``library_folder`` holds its shared libpython.
    """

    executable: Path
    version: str
    library_folder: Path


def why_unsupported(system: str, machine: str, libc: str | None) -> str | None:
    """Why the server cannot run on such a machine, as one sentence; None where it can.

    ``libc`` is ``os.confstr("CS_GNU_LIBC_VERSION")``, for example "glibc 2.36", and None for another C
    library.
    """
    if system != "Linux":
        return f"the local Triton server runs on Linux only, and this is {system}: {ADVICE}."
    if machine not in ("x86_64", "AMD64", "amd64"):
        return f"the local Triton server runs on x86-64 only, and this is {machine}: {ADVICE}."
    name, _, version = (libc or "").partition(" ")
    if name != "glibc":
        return f"the local Triton server needs glibc, and this system has another C library: {ADVICE}."
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_GLIBC:
        return f"the local Triton server needs glibc 2.35 or newer, and this system has {version}: {ADVICE}."
    return None


def unsupported_reason() -> str | None:
    """Why the server cannot run on this machine, as one sentence; None where it can."""
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        libc = None
    return why_unsupported(platform.system(), platform.machine(), libc)


def find_python() -> PythonInterpreter:
    """The first CPython 3.10 to 3.12 that the server can run with; this interpreter is tried first.

    Raises `ConfigurationError`, which names each interpreter that was tried and what it lacks.
    """
    refusals: list[str] = []
    seen: set[str] = set()
    for candidate in candidate_executables():
        identity = os.path.realpath(candidate)
        # One shim stands for several versions: the file that it resolves to does not identify what it runs.
        key = identity if os.path.basename(identity).startswith("python") else str(candidate)
        if key in seen:
            continue
        seen.add(key)
        answer = examine(candidate)
        if isinstance(answer, PythonInterpreter):
            return answer
        refusals.append(f"{candidate}: {answer}")
    found = "; ".join(refusals) or "no Python was found on PATH"
    raise ConfigurationError(
        f"the local Triton server needs a CPython {SUPPORTED_PYTHON_VERSIONS[0]} to "
        f"{SUPPORTED_PYTHON_VERSIONS[-1]} with a shared libpython and the venv module: put one on PATH, or "
        f"{ADVICE}. Tried: {found}."
    )


def candidate_executables() -> Iterator[Path]:
    """Interpreters to try: this one, every one on PATH, those that pyenv has installed."""
    if sys.executable:
        yield Path(sys.executable)
    # All matches on PATH, not only the first: a version manager's shim exists even where its version is not
    # selected, and hides a working interpreter in a later folder.
    names = [f"python{version}" for version in reversed(SUPPORTED_PYTHON_VERSIONS)] + ["python3", "python"]
    folders = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    for name in names:
        for folder in folders:
            if os.access(folder / name, os.X_OK):
                yield folder / name
    versions = Path(os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))) / "versions"
    for version in reversed(SUPPORTED_PYTHON_VERSIONS):
        yield from sorted(versions.glob(f"{version}.*/bin/python{version}"), reverse=True)


def examine(executable: Path) -> PythonInterpreter | str:
    """The interpreter behind ``executable``, or what it lacks in a few words."""
    try:
        # -E: a PYTHONHOME or PYTHONPATH meant for this process would mislead another version.
        ran = subprocess.run(
            [str(executable), "-E", "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines()
        missing = lines[-1] if lines and "ModuleNotFoundError" in lines[-1] else "does not run"
        hint = " (on Debian and Ubuntu: install python3-venv)" if "ensurepip" in missing else ""
        return missing + hint
    try:
        facts = json.loads(ran.stdout)
    except ValueError:
        return "does not run"
    if facts["implementation"] != "CPython":
        return f"is {facts['implementation']}"
    if facts["version"] not in SUPPORTED_PYTHON_VERSIONS:
        return f"is Python {facts['version']}"
    if facts["library_folder"] is None:
        return f"has no shared libpython{facts['version']}.so.1.0"
    return PythonInterpreter(Path(facts["executable"]), facts["version"], Path(facts["library_folder"]))
