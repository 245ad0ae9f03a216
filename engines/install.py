"""Put the engines into the ignored folder ``.engines``: once, under a lock, each in a folder of its version.

``python -m engines`` installs all of them. A folder that has its final name is
complete: everything is made beside it and renamed at the end, so that an interrupted installation leaves
nothing that looks finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines import tools, versions

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
ENGINES = REPOSITORY / ".engines"


class InstallError(RuntimeError):
    """A download or a build failed; the message ends with the last lines of what the tool said."""


@dataclass(frozen=True)
class GoPrograms:
    """What ``go install`` builds from Beam's own source."""

    prism: Path
    boot: Path


def go_programs() -> GoPrograms:
    """Prism and the boot program of Beam's Python image, of the installed Beam's release.

    Two minutes and 0.5 GB of downloads and build cache the first time; only the programs stay.
    """

    def build(target: Path) -> None:
        modules = target / "modules"
        source = "github.com/apache/beam/sdks/v2"
        environment = {
            "GOPATH": str(modules),
            "GOCACHE": str(modules / "cache"),
            "GOBIN": str(target),
            # Go's module cache is read-only unless asked otherwise, and could not be removed below.
            "GOFLAGS": f"{os.environ.get('GOFLAGS', '')} -modcacherw".strip(),
        }
        for package in ("go/cmd/prism", "python/container"):
            _run([tools.go(), "install", f"{source}/{package}@v{versions.BEAM}"], environment)
        shutil.rmtree(modules)

    folder = _installed(f"beam-go-{versions.BEAM}", "Prism and Beam's boot program (go install)", build)
    return GoPrograms(prism=folder / "prism", boot=folder / "container")


def flink_job_server() -> Path:
    """The folder of jars that Beam's Flink job server runs from: 160 of them, 150 MB."""
    minor = versions.FLINK.rpartition(".")[0]

    def fetch(target: Path) -> None:
        _run(
            [
                *(tools.maven(), "--batch-mode", "--quiet", "--file", HERE / "pom.xml"),
                *(f"-Dflink.minor={minor}", f"-Dbeam.version={versions.FLINK_JOB_SERVER}"),
                *("dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={target}"),
            ]
        )

    return _installed(
        f"flink-job-server-{minor}-{versions.FLINK_JOB_SERVER}", "the Flink job server (Maven)", fetch
    )


def flink() -> Path:
    """The folder of jars that a Flink job manager and its task managers run from: 235 MB."""

    def fetch(target: Path) -> None:
        _pip("--no-deps", "--target", str(target), f"apache-flink-libraries=={versions.FLINK}")

    return _installed(f"flink-{versions.FLINK}", f"Flink {versions.FLINK} (pip)", fetch) / "pyflink" / "lib"


def worker_packages() -> Path:
    """A folder of Python packages as on a bare worker: apache-beam and its build tools, nothing of ours.

    The versions are those of Beam's Docker image (``worker_constraints.txt``), for the running Python.
    """
    constraints = HERE / "worker_constraints.txt"
    wanted = [f"apache-beam=={versions.BEAM}", "setuptools", "wheel", "pip"]
    digest = hashlib.sha256(constraints.read_bytes() + " ".join(wanted).encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"

    def fetch(target: Path) -> None:
        _pip("--target", str(target), "--constraint", str(constraints), *wanted)

    return _installed(f"worker-{versions.BEAM}-{python}-{digest}", "the worker's packages (pip)", fetch)


def all_engines() -> None:
    """Install whatever is not there yet. Raises MissingToolsError before anything is downloaded."""
    tools.require_all()
    go_programs()
    flink_job_server()
    flink()
    worker_packages()


def _installed(name: str, what: str, make: Callable[[Path], None]) -> Path:
    folder = ENGINES / name
    if folder.is_dir():
        return folder
    ENGINES.mkdir(exist_ok=True)
    with _locked(ENGINES / f"{name}.lock"):
        if folder.is_dir():
            return folder
        print(f"installing {what} into {folder.relative_to(REPOSITORY)}", file=sys.stderr, flush=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=ENGINES))
        try:
            make(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pip(*arguments: str) -> None:
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: list[str | Path], environment: Mapping[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last_lines = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise InstallError(f"{' '.join(words)}: exit code {done.returncode}\n{last_lines}")
