"""The image for workers with a Triton, as far as it can be checked without Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton.server.environment import ServerEnvironment, find_or_make_server_environment
from engines.install import BEAM, REPOSITORY
from engines.workers import bare_environment
from tests.integration.test_dataflow_template import copy_as_docker_does
from tests.support.server_users import processes_of, wait_until

_DOCKERFILE = (REPOSITORY / "pipelines" / "dataflow" / "worker-triton.Dockerfile").read_text()
_LINES = _DOCKERFILE.replace("\\\n", " ")


def words_of(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} (.*)$", _LINES, re.M)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with what the image copies from the repository."""
    for line in words_of("COPY"):
        if not line.startswith("--from"):
            copy_as_docker_does(line.split(), tmp_path / "template")
    return tmp_path / "template"


def test_the_release_of_beam_is_the_pinned_one() -> None:
    """Workers and the machine that submits run the same Beam; its boot program is what the image starts."""
    assert re.findall(r"^FROM apache/beam_python3\.12_sdk:(\S+) AS beam$", _LINES, re.M) == [BEAM]
    assert f"'apache-beam[gcp]=={BEAM}'" in _LINES
    assert "--from=beam /opt/apache/beam /opt/apache/beam" in words_of("COPY")
    assert words_of("ENTRYPOINT") == ['["/opt/apache/beam/boot"]']
    assert "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1" in words_of("ENV")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder with a short name, for a socket; no server is left in it."""
    folder = Path(tempfile.mkdtemp(prefix="wt-", dir="/tmp"))
    yield folder
    wait_until(lambda: not processes_of(folder))
    shutil.rmtree(folder)


def test_its_package_runs_a_triton_of_the_images_layout(image: Path, temporary: Path) -> None:
    """What is copied is installed by the Dockerfile's own line, and starts a server laid out as NVIDIA's.

    The pipeline's environment has NumPy 2, with which the outputs of Triton's Python models would be empty:
    the server takes the Python that the image has without it.
    """
    python = bare_environment(temporary / "pipeline")
    (line,) = [words for words in words_of("RUN") if words.endswith(" .")]
    program, *arguments = shlex.split(line)
    assert program == "pip"
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [str(python), "-m", "pip", *arguments],
        cwd=image,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    server = find_or_make_server_environment()
    home = lay_out_as_in_the_image(server, temporary / "tritonserver")
    environment |= {
        "PATH": os.pathsep.join(
            [str(python.parent), str(home / "bin"), str(server.folder / "bin"), "/usr/bin", "/bin"]
        ),
        "LD_LIBRARY_PATH": server.library_path,
        "TMPDIR": str(temporary),
    }
    pipeline = shutil.copy(REPOSITORY / "pipelines" / "worker_triton.py", temporary / "pipeline.py")
    shutil.copytree(REPOSITORY / "pipelines" / "data", temporary / "data")
    command = [str(python), str(pipeline), f"--output={temporary / 'digits'}", "--runner=FnApiRunner"]
    command.append(f"--model_repository={REPOSITORY / 'pipelines' / 'model_repository'}")
    subprocess.run(command, cwd=temporary, env=environment, check=True)
    (scored,) = temporary.glob("digits*.csv")
    labels = dict(row.split(",") for row in scored.read_text().split())
    truth = dict(row.split(",")[:3:2] for row in (temporary / "data" / "digits.csv").read_text().split()[1:])
    assert sum(labels[name] == digit for name, digit in truth.items()) > 0.95 * len(truth)


def lay_out_as_in_the_image(server: ServerEnvironment, home: Path) -> Path:
    """``bin``, ``lib`` and ``backends`` with the parts of the wheel."""
    (home / "bin").mkdir(parents=True)
    (home / "backends").mkdir()
    shutil.copy(server.tritonserver, home / "bin")
    (home / "lib").symlink_to(server.site_packages / "nvidia_pytriton.libs")
    shutil.copytree(server.python_backend, home / "backends" / "python")
    shutil.copy(server.python_backend_stub, home / "backends" / "python")
    return home
