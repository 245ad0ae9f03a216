"""Which tritonserver is started, and what is said where there is none."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_triton import ConfigurationError, WorkerTriton
from beam_triton.server.binary import find_server_binary, server_command
from beam_triton.server.environment import SERVER_ENVIRONMENT_VARIABLE
from beam_triton.server.lease import lease_server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The folders of NVIDIA's image, with a program that lists what it takes."""
    for name in ("bin", "lib", "backends"):
        (tmp_path / "tritonserver" / name).mkdir(parents=True)
    program = tmp_path / "tritonserver" / "bin" / "tritonserver"
    program.write_text("#!/bin/sh\necho '  --allow-client-shm <boolean>' >&2\nexit 1\n")
    program.chmod(0o755)
    return program


def test_the_programs_own_folders_come_with_it(image: Path) -> None:
    """Libraries and backends are beside it, as in the image."""
    binary = find_server_binary(image)
    home = image.parent.parent
    assert binary.lay_out_backends(Path("/unused")) == home / "backends"
    assert binary.variables({})["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(home / "lib")
    assert binary.takes("--allow-client-shm")
    assert not binary.takes("--allow-anything")


def test_the_program_on_path_comes_before_the_wheel(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed where there is one."""
    monkeypatch.setenv("PATH", f"{image.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(SERVER_ENVIRONMENT_VARIABLE, "/dev/null/nowhere")
    assert find_server_binary(None).executable == image


def test_a_virtual_environment_of_the_pipeline_is_not_the_servers(image: Path) -> None:
    """The Python backend takes its standard library and NumPy from the first python3 on PATH."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("these tests do not run in a virtual environment")
    own = str(Path(sys.prefix) / "bin")
    assert own not in find_server_binary(image).variables({"PATH_OF": own})["PATH"].split(os.pathsep)


def test_no_server_at_all_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither PATH nor the image's folder nor the wheel has one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "environment").mkdir()
    monkeypatch.setenv(SERVER_ENVIRONMENT_VARIABLE, str(tmp_path / "environment"))
    with pytest.raises(ConfigurationError) as raised:
        find_server_binary(None)
    message = str(raised.value)
    assert "none is on PATH or at /opt/tritonserver/bin/tritonserver" in message
    assert "has no bin/python3" in message
    assert 'WorkerTriton(…, binary="/path/to/bin/tritonserver")' in message


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="wt-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_a_program_that_is_not_there_is_named_at_setup(temporary: Path, tmp_path: Path) -> None:
    """As is a repository that the worker does not have. Nothing keeps running."""
    with pytest.raises(ConfigurationError, match="binary='/no/such': this machine has no such program"):
        lease_server(WorkerTriton(str(tmp_path), binary="/no/such"))
    with pytest.raises(ConfigurationError, match=r"models' is no folder on this machine"):
        lease_server(WorkerTriton(str(tmp_path / "models")))


def test_a_folder_that_others_can_write_is_refused(temporary: Path, tmp_path: Path) -> None:
    """Somebody else could lay models or a socket there."""
    config = WorkerTriton(str(tmp_path))
    config.folder.parent.mkdir()
    config.folder.parent.chmod(0o777)
    with pytest.raises(ConfigurationError, match="for this user alone: remove what is there"):
        lease_server(config)


def test_what_the_user_gives_comes_last(image: Path) -> None:
    """The last one of two arguments counts."""
    command = server_command(
        find_server_binary(image),
        Path("/models"),
        backends=None,
        shared_memory_prefix="p",
        exit_timeout_seconds=10,
        services={"http": ("unix:/s", 1), "grpc": None},
        more=["--log-info=1"],
    )
    assert command[0] == str(image)
    assert command[-1] == "--log-info=1"
    assert "--allow-grpc=0" in command
    assert "--http-address=unix:/s" in command


def test_a_supervisor_that_ends_at_once_is_not_started_for_ever(
    image: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose Python does not run: the error has what it says."""
    python = temporary / "python"
    python.write_text("#!/bin/sh\necho no Python here\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConfigurationError, match="its supervisor ends at once, and says 'no Python here'"):
        lease_server(WorkerTriton(str(temporary), binary=str(image)))
