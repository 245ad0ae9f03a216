"""The virtual environment that the server runs in: its wheel and NumPy 1.

It is separate from the library's own environment because the Python backend needs ``numpy<2``: with NumPy 2
in the interpreter that its stub loads, the server starts, answers 200, and every output tensor is silently
empty.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from beam_triton.errors import ConfigurationError
from beam_triton.server.platform_check import (
    ADVICE,
    PythonInterpreter,
    examine,
    find_python,
    unsupported_reason,
)

_LOGGER = logging.getLogger("beam_triton.testing")

SERVER_ENVIRONMENT_VARIABLE = "BEAM_TRITON_SERVER_ENVIRONMENT"

# The wheel's other requirements serve pytriton's own Python classes; the server and its stubs need none.
REQUIREMENTS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")

_INSTALLED_PROBE = """
import importlib.metadata, json, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({
    "site_packages": sysconfig.get_path("purelib"),
    "numpy": version("numpy"),
    "nvidia-pytriton": version("nvidia-pytriton"),
}))
"""


@dataclass(frozen=True)
class ServerEnvironment:
    """A virtual environment that holds the server, checked.

    ``folder`` is the environment's root, ``interpreter`` its Python, and ``site_packages`` where the wheel
    is installed.
    """

    folder: Path
    interpreter: PythonInterpreter
    site_packages: Path

    @property
    def tritonserver(self) -> Path:
        """The server's binary."""
        return self.site_packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"

    @property
    def python_backend(self) -> Path:
        """The folder of the Python backend, without its stub."""
        return self.site_packages / "pytriton" / "tritonserver" / "backends" / "python"

    @property
    def python_backend_stub(self) -> Path:
        """The process that runs a ``model.py``, built for this environment's Python."""
        stubs = self.site_packages / "pytriton" / "tritonserver" / "python_backend_stubs"
        return stubs / self.interpreter.version / "triton_python_backend_stub"

    @property
    def library_path(self) -> str:
        """``LD_LIBRARY_PATH`` of the server.

        Without the interpreter's own library folder the stub links the system's libpython against this
        environment's standard library, and fails in ways that do not show the cause.
        """
        return os.pathsep.join(
            [str(self.site_packages / "nvidia_pytriton.libs"), str(self.interpreter.library_folder)]
        )


def find_or_make_server_environment(folder: str | os.PathLike[str] | None = None) -> ServerEnvironment:
    """The environment in ``folder``, made there if the folder does not exist.

    Without ``folder`` the variable ``BEAM_TRITON_SERVER_ENVIRONMENT`` names it; without that it is in the
    user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``), where all that need the same versions share it.
    Making it downloads about 75 MB, once. An existing folder that is given by name is never changed.

    Raises `ConfigurationError` where the server cannot run, the environment cannot be made, or the given
    folder holds something else.
    """
    reason = unsupported_reason()
    if reason is not None:
        raise ConfigurationError(reason)
    given = folder or os.environ.get(SERVER_ENVIRONMENT_VARIABLE)
    if given:
        path = Path(given).expanduser().absolute()
        if not path.exists():
            _make(path)
        return _read(path)
    path = _default_folder()
    if path.exists():
        try:
            return _read(path)
        except ConfigurationError as error:
            # The interpreter that it was made with may have been upgraded or uninstalled.
            _LOGGER.warning("Making the server environment %s again: %s", path, error)
            _make(path, replace=True)
            return _read(path)
    _make(path)
    return _read(path)


def find_or_make_packages(environment: ServerEnvironment, packages: Sequence[str]) -> Path:
    """A folder of Python packages for models of the server, made in the user's cache folder if need be.

    ``packages`` are requirements as pip takes them. Their dependencies are installed too, with NumPy 1: with
    NumPy 2 the server's outputs would silently be empty.

    Raises `ConfigurationError` where they cannot be installed, with pip's last lines.
    """
    version = environment.interpreter.version
    digest = hashlib.sha256("\n".join(sorted(packages)).encode()).hexdigest()[:12]
    folder = cache_folder() / f"packages-{version}-{digest}"

    def fill(partial: Path) -> None:
        _LOGGER.warning("Installing %s for the models of the local Triton server, once.", ", ".join(packages))
        constraints = partial / "constraints.txt"
        constraints.write_text("numpy<2\n")
        python = environment.folder / "bin" / "python3"
        _pip(python, "--target", str(partial), "--constraint", str(constraints), "--", *packages)

    if not folder.exists():
        make_folder(folder, fill, is_usable=Path.exists)
    return folder


def cache_folder() -> Path:
    """Where the environments of local servers are kept: in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache).absolute() / "beam_triton"


def _default_folder() -> Path:
    return cache_folder() / (
        "server-" + "-".join(requirement.replace("==", "-") for requirement in REQUIREMENTS)
    )


def _read(folder: Path) -> ServerEnvironment:
    """Checks that ``folder`` is an environment that the server runs in."""
    python = folder / "bin" / "python3"
    if not python.exists():
        raise ConfigurationError(f"{folder} is not a server environment: it has no bin/python3.")
    interpreter = examine(python)
    if not isinstance(interpreter, PythonInterpreter):
        raise ConfigurationError(f"{folder} is not a server environment: its Python {interpreter}.")
    ran = subprocess.run(
        [str(python), "-E", "-c", _INSTALLED_PROBE], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if ran.returncode != 0:
        raise ConfigurationError(f"{folder} is not a server environment: its Python does not run.")
    facts = json.loads(ran.stdout)
    if facts["nvidia-pytriton"] is None:
        raise ConfigurationError(f"{folder} is not a server environment: it has no nvidia-pytriton.")
    if facts["numpy"] is None or int(facts["numpy"].split(".")[0]) >= 2:
        raise ConfigurationError(
            f"{folder} cannot serve: its NumPy is {facts['numpy']}, and the server needs numpy<2 "
            f"(with NumPy 2 every output tensor would silently be empty)."
        )
    environment = ServerEnvironment(folder, interpreter, Path(facts["site_packages"]))
    for file in (environment.tritonserver, environment.python_backend_stub):
        if not os.access(file, os.X_OK):
            raise ConfigurationError(f"{folder} is not a server environment: {file} is missing.")
    return environment


def _make(folder: Path, *, replace: bool = False) -> None:
    def fill(partial: Path) -> None:
        interpreter = find_python()
        _LOGGER.warning(
            "Making the environment of the local Triton server in %s with Python %s (%s): "
            "about 75 MB to download, once.",
            folder,
            interpreter.version,
            ", ".join(REQUIREMENTS),
        )
        install(interpreter, partial, REQUIREMENTS)
        _read(partial)

    try:
        make_folder(folder, fill, is_usable=_is_usable if replace else Path.exists)
    except OSError as error:
        raise ConfigurationError(
            f"the environment of the local Triton server cannot be made in {folder}: {error}. Set "
            f"{SERVER_ENVIRONMENT_VARIABLE} to a folder that can be written, or {ADVICE}."
        ) from error


def make_folder(folder: Path, fill: Callable[[Path], None], *, is_usable: Callable[[Path], bool]) -> None:
    """Has ``fill`` make ``folder``, unless it ``is_usable``; one process at a time, the others wait.

    ``fill`` gets a folder beside it, which is renamed when it is complete: nobody sees a partial one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one_process(folder.with_name(folder.name + ".lock"), folder):
        if is_usable(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)
        for leftover in folder.parent.glob(folder.name + ".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
        try:
            fill(partial)
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_usable(folder: Path) -> bool:
    try:
        _read(folder)
    except ConfigurationError:
        return False
    return True


def install(interpreter: PythonInterpreter, folder: Path, arguments: Sequence[str]) -> None:
    """Makes a virtual environment in ``folder`` with the wheels that pip's ``arguments`` name, and no others.

    Raises `ConfigurationError` with the last lines of what failed.
    """
    _run([str(interpreter.executable), "-E", "-m", "venv", str(folder)])
    _pip(folder / "bin" / "python3", "--no-deps", *arguments)


def _pip(python: Path, *arguments: str) -> None:
    pip = [str(python), "-E", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    _run([*pip, "install", "--quiet", "--only-binary=:all:", *arguments])


def _run(command: list[str]) -> None:
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ran.returncode != 0:
        tail = "\n".join(ran.stdout.strip().splitlines()[-15:])
        raise ConfigurationError(
            f"the environment of a local server could not be made: `{' '.join(command)}` failed. "
            f"Remove the cause, or {ADVICE}. Its last lines:\n{tail}"
        )


@contextmanager
def _only_one_process(lock: Path, folder: Path) -> Iterator[None]:
    import fcntl  # Windows has none, and has been refused before

    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOGGER.warning("Waiting for another process that is making the server environment %s.", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
