"""Installs what the engines need into the ignored folder ``.engines``: ``python -m engines install``.

Each part has a folder that is named after its version. An installation fills a temporary folder and renames
it at the end, so a folder with its final name is complete, and an interrupted installation leaves none.

The functions at the end return where a part is and never install it: a download in the middle of a test
would run under the test's time limit.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from engines import tools

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
ENGINES = REPOSITORY / ".engines"

BEAM = version("apache-beam")
"""Prism and the boot program are built from the release of the installed SDK, which ``requirements.txt``
pins: Beam does not promise that a runner and an SDK of different releases work together."""

FLINK = "1.19.3"
"""``apache-flink-libraries`` of this version contains the whole Flink distribution."""

BEAM_JAVA = "2.62.0"
"""The newest Beam release whose job server for Flink 1.19 has all its parts on Maven Central, and of the Java
pipeline, too. The job API is stable across releases; ``tests/engines`` proves that it works with the
installed SDK."""

SPARK = "3.5.0"
"""The newest Spark that Beam's job server of that release is tested with."""

FLINK_FUNCTION = "2.3.0"
"""The release of Flink whose own Triton function is a peer of the benchmarks; Flink's SQL comes with it."""

_FLINK_MINOR = FLINK.rpartition(".")[0]

_POM = HERE / "pom.xml"
_SPARK_POM = HERE / "spark_pom.xml"
_GO_PIPELINE = REPOSITORY / "pipelines" / "score_rows.go"
_FLINK_FUNCTION_SOURCE = REPOSITORY / "benchmarks" / "peers" / "flink_triton"

_WORKER_CONSTRAINTS = HERE / "worker_constraints.txt"
_WORKER_REQUIREMENTS = (f"apache-beam=={BEAM}", "setuptools", "wheel", "pip")

_MEGABYTE = 1_000_000


class InstallError(RuntimeError):
    """A part could not be installed; the message ends with the last lines of the failed tool's output."""


class NotInstalledError(RuntimeError):
    """A part is not there; the message is one line that names the make target which installs it."""


@dataclass(frozen=True)
class Command:
    """A command that downloads or builds something, and variables to add to its environment."""

    words: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One thing to install: ``folder`` below ``.engines``, which ``commands`` fill.

    Whatever the commands leave in the subfolder ``cache`` is deleted. The commands run in sequence, each
    with a few attempts.
    """

    title: str
    folder: str
    commands: Callable[[Path], Iterable[Command]]
    make_target: str = "engines"

    def path(self) -> Path:
        """The part's folder. NotInstalledError if it is not there."""
        path = ENGINES / self.folder
        if not path.is_dir():
            raise NotInstalledError(f"not installed: {self.title}; run `make {self.make_target}` first")
        return path


@dataclass(frozen=True)
class Patience:
    """How long an installation may take, how often it is repeated, and how often it reports progress."""

    attempts: int = 3
    attempt_limit_seconds: float = 900.0
    pause_seconds: float = 10.0
    report_interval_seconds: float = 60.0


def _go_commands(target: Path) -> Iterator[Command]:
    cache = target / "cache"
    environment = {
        "GOPATH": str(cache),
        "GOCACHE": str(cache / "build"),
        "GOBIN": str(target),
        # Go's module cache is read-only by default, and could not be deleted.
        "GOFLAGS": f"{os.environ.get('GOFLAGS', '')} -modcacherw".strip(),
    }
    for package in ("go/cmd/prism", "python/container"):
        module = f"github.com/apache/beam/sdks/v2/{package}@v{BEAM}"
        yield Command([tools.go(), "install", module], environment)
    source = target / "cache" / "pipeline"
    source.mkdir(parents=True)
    shutil.copy(_GO_PIPELINE, source)
    (source / "go.mod").write_text(
        f"module score_rows\n\ngo 1.25\n\nrequire github.com/apache/beam/sdks/v2 v{BEAM}\n"
    )
    output = target / "score_rows"
    yield Command([tools.go(), "build", "-C", source, "-mod=mod", "-o", output, "."], environment)


def _maven_command(*words: str) -> Command:
    return Command(
        [
            *(tools.maven(), "--batch-mode"),
            # Maven caches failed downloads and would not repeat them for a day.
            "--update-snapshots",
            # Give up on a silent server after a minute; Maven 3.8 reads the first name, 3.9 the second.
            *("-Dmaven.wagon.rto=60000", "-Daether.connector.requestTimeout=60000"),
            *words,
        ]
    )


def _dependencies_command(target: Path, pom: Path, *versions: str) -> Command:
    copy = ("dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={target}")
    return _maven_command(f"--file={pom}", *versions, *copy)


def _beam_java_commands(target: Path) -> Iterator[Command]:
    yield _dependencies_command(target, _POM, f"-Dflink.minor={_FLINK_MINOR}", f"-Dbeam.version={BEAM_JAVA}")


def _beam_spark_commands(target: Path) -> Iterator[Command]:
    versions = (f"-Dspark.version={SPARK}", f"-Dbeam.version={BEAM_JAVA}")
    yield _dependencies_command(target, _SPARK_POM, *versions)


def _flink_function_commands(target: Path) -> Iterator[Command]:
    pom = _FLINK_FUNCTION_SOURCE / "pom.xml"
    yield _dependencies_command(target, pom, f"-Dflink.version={FLINK_FUNCTION}")
    jar = f"org.apache.flink:flink-model-triton:{FLINK_FUNCTION}"
    yield _maven_command("dependency:copy", f"-Dartifact={jar}", f"-DoutputDirectory={target}")
    shutil.copytree(_FLINK_FUNCTION_SOURCE / "META-INF", target / "META-INF")
    compiler = (tools.java(), "--module", "jdk.compiler/com.sun.tools.javac.Main")
    jars = os.pathsep.join(map(str, sorted(target.glob("*.jar"))))
    sources = sorted(_FLINK_FUNCTION_SOURCE.glob("*.java"))
    yield Command([*compiler, "-d", target, "--class-path", jars, *sources])


def _pip_command(target: Path, *requirements: str) -> Command:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    return Command([*pip, "--progress-bar=off", "--upgrade", "--target", target, *requirements])


def _flink_commands(target: Path) -> Iterator[Command]:
    yield _pip_command(target, "--no-deps", f"apache-flink-libraries=={FLINK}")


def _worker_commands(target: Path) -> Iterator[Command]:
    yield _pip_command(target, "--constraint", str(_WORKER_CONSTRAINTS), *_WORKER_REQUIREMENTS)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _worker_folder() -> str:
    digest = _digest(_WORKER_CONSTRAINTS.read_bytes() + " ".join(_WORKER_REQUIREMENTS).encode())
    return f"worker-{BEAM}-py{sys.version_info.major}.{sys.version_info.minor}-{digest}"


_GO_PROGRAMS = Part(
    "Prism, Beam's boot program and a Go pipeline (go)",
    f"beam-go-{BEAM}-{_digest(_GO_PIPELINE.read_bytes())}",
    _go_commands,
)
_BEAM_JAVA = Part(
    "Beam's Flink job server and Java SDK (Maven)",
    f"beam-java-{BEAM_JAVA}-flink-{_FLINK_MINOR}-{_digest(_POM.read_bytes())}",
    _beam_java_commands,
)
_BEAM_SPARK = Part(
    f"Beam's Spark job server with Spark {SPARK} (Maven)",
    f"beam-java-{BEAM_JAVA}-spark-{SPARK}-{_digest(_SPARK_POM.read_bytes())}",
    _beam_spark_commands,
)
_FLINK = Part(f"Flink {FLINK} (pip)", f"flink-{FLINK}", _flink_commands)
_WORKER_PACKAGES = Part(
    "the Python packages of a bare worker (pip)", _worker_folder(), _worker_commands, "worker-packages"
)
_FLINK_FUNCTION = Part(
    f"Flink {FLINK_FUNCTION} with its own Triton function (Maven)",
    f"flink-function-{FLINK_FUNCTION}-"
    + _digest(b"".join(file.read_bytes() for file in sorted(_FLINK_FUNCTION_SOURCE.glob("*.*")))),
    _flink_function_commands,
    "flink-function",
)


def install_flink_function() -> None:
    """Install Flink's own Triton function if it is not there: 150 MB, half a minute. Needs Java and Maven.

    Raises:
        MissingToolsError: Java or Maven is missing.
        InstallError: it failed in every attempt.
    """
    install(_FLINK_FUNCTION)


def install_worker_packages() -> None:
    """Install the Python packages of a bare worker if they are not there: 300 MB, half a minute."""
    install(_WORKER_PACKAGES)


def install_all() -> None:
    """Install every part that is not there: about 1.1 GB of downloads, seven minutes.

    Raises:
        MissingToolsError: Java, Maven or Go is missing; nothing was downloaded.
        InstallError: a part failed in every attempt.
    """
    tools.require_all()
    for part in (_GO_PROGRAMS, _BEAM_JAVA, _BEAM_SPARK, _FLINK, _WORKER_PACKAGES):
        install(part)


def require_all() -> None:
    """Raise MissingToolsError or NotInstalledError unless every engine can be started."""
    tools.require_all()
    for part in (_GO_PROGRAMS, _BEAM_JAVA, _BEAM_SPARK, _FLINK, _WORKER_PACKAGES):
        part.path()


def install(part: Part, patience: Patience | None = None) -> None:
    """Install a part if it is not there. InstallError if that fails in every attempt."""
    folder = ENGINES / part.folder
    if folder.is_dir():
        return
    ENGINES.mkdir(exist_ok=True)
    with _locked(ENGINES / f"{part.folder}.lock", part.title):
        if folder.is_dir():
            return
        _say(f"Installing {part.title} into {folder}")
        started = time.monotonic()
        unfinished = Path(tempfile.mkdtemp(prefix=f"{part.folder}.", dir=ENGINES))
        try:
            for command in part.commands(unfinished):
                run_with_retries(command, unfinished, patience or Patience())
            shutil.rmtree(unfinished / "cache", ignore_errors=True)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _say(f"  installed after {time.monotonic() - started:.0f} s, {_megabytes(folder):,} MB")


def run_with_retries(command: Command, target: Path, patience: Patience) -> None:
    """Run a command that fills ``target``, and report its progress. InstallError if every attempt fails."""
    for attempt in range(1, patience.attempts + 1):
        try:
            _run(command, target, patience)
            return
        except InstallError as error:
            if attempt == patience.attempts:
                raise
            pause_seconds = patience.pause_seconds * attempt
            _say(f"  attempt {attempt} of {patience.attempts} failed: {error}")
            _say(f"  next attempt in {pause_seconds:g} s")
            time.sleep(pause_seconds)


def _run(command: Command, target: Path, patience: Patience) -> None:
    words = [str(word) for word in command.words]
    with tempfile.TemporaryDirectory(prefix="beam_triton_install_") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # In a process group of its own, so that the end of an attempt ends its children too.
                start_new_session=True,
            )
        try:
            exit_code = _wait(process, log, target, patience)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if exit_code != 0:
            outcome = "took too long" if exit_code is None else f"exit code {exit_code}"
            raise InstallError("\n".join([f"{' '.join(words)}: {outcome}", *_last_lines(log, 15)]))


def _wait(process: subprocess.Popen[bytes], log: Path, target: Path, patience: Patience) -> int | None:
    """The exit code, or None where the process still runs at the end of the limit."""
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < patience.attempt_limit_seconds:
        try:
            return process.wait(
                min(patience.report_interval_seconds, patience.attempt_limit_seconds - elapsed)
            )
        except subprocess.TimeoutExpired:
            last_line = "".join(_last_lines(log, 1))[:100] or "no output yet"
            seconds = time.monotonic() - started
            _say(f"  {seconds:4.0f} s, {_megabytes(target):,} MB: {last_line}")
    return None


def _last_lines(log: Path, count: int) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines()[-count:]


def _megabytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # tools delete their temporary files meanwhile
                total += os.lstat(os.path.join(parent, name)).st_size
    return round(total / _MEGABYTE)


@contextmanager
def _locked(path: Path, title: str) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"Waiting for another process that installs {title}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class GoPrograms:
    """Programs built from Go source, Beam's own and this project's."""

    prism: Path
    boot: Path
    score_rows: Path


def go_programs() -> GoPrograms:
    """Prism, the boot program of Beam's Python image, and ``pipelines/score_rows.go``.

    NotInstalledError if they are not there.
    """
    folder = _GO_PROGRAMS.path()
    return GoPrograms(prism=folder / "prism", boot=folder / "container", score_rows=folder / "score_rows")


def beam_java() -> Path:
    """The folder of the 160 jars of Beam's Flink job server and Java SDK. NotInstalledError if not there."""
    return _BEAM_JAVA.path()


def beam_spark() -> Path:
    """The folder of the jars of Beam's Spark job server and of Spark. NotInstalledError if not there."""
    return _BEAM_SPARK.path()


def flink() -> Path:
    """The folder of the jars of a Flink job manager and task manager. NotInstalledError if not there."""
    return _FLINK.path() / "pyflink" / "lib"


def worker_packages() -> Path:
    """The folder of the packages of a bare worker: apache-beam and its build tools, and nothing of ours.

    Their versions are those of Beam's Docker image (``worker_constraints.txt``), for the running Python.
    NotInstalledError if the folder is not there.
    """
    return _WORKER_PACKAGES.path()


def flink_function() -> Path:
    """The folder of the jars of Flink's own Triton function, and of the classes that run it.

    NotInstalledError if the folder is not there.
    """
    return _FLINK_FUNCTION.path()
