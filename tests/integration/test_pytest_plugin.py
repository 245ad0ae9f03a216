"""The pytest plugin in runs of pytest of their own, found by the entry point that setup.py declares."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import CATALOGUE, Tensor, write_models

pytest_plugins = ["pytester"]

_ROOT = Path(__file__).parents[2]

_MODEL = """
import sys

def test_nothing_is_imported_at_start():
    assert "apache_beam" not in sys.modules
    assert "beam_triton" not in sys.modules

def test_a_fake_server(fake_triton):
    from beam_triton import TritonClient
    from beam_triton.testing import FakeModel

    double = FakeModel(
        lambda inputs: {"y": 2 * inputs["x"]}, inputs={"x": ("FP32", [2])}, outputs={"y": ("FP32", [2])}
    )
    first, second = fake_triton({"double": double}), fake_triton({"double": double}, delay_seconds=0.01)
    for server in (first, second):
        with TritonClient(server.endpoint) as client:
            assert client.infer("double", {"x": [[1, 2]]}).outputs["y"].tolist() == [[2, 4]]
    with open("endpoints.txt", "w") as file:
        print(first.endpoint, second.endpoint, file=file)

def test_the_servers_of_another_test_have_ended():
    import http.client, pytest

    with open("endpoints.txt") as file:
        endpoints = file.read().split()
    assert len(endpoints) == 2
    for endpoint in endpoints:
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection(endpoint.removeprefix("http://")).request("GET", "/v2")
"""


@pytest.fixture
def installed(pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder for tests, with the package and its metadata on the path of a new Python."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)],
        cwd=_ROOT,
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(_ROOT)]))
    return pytester


def test_fake_triton_serves_a_test(installed: pytest.Pytester) -> None:
    """The fixture starts servers that end with their test, and pytest's start imports neither Beam nor us."""
    installed.makepyfile(_MODEL)
    installed.runpytest_subprocess("-q").assert_outcomes(passed=3)


def test_a_run_without_our_fixtures_sees_no_plugin(installed: pytest.Pytester) -> None:
    """Warnings as errors, strict markers: the plugin adds none, and can be left out."""
    installed.makepyfile("def test_something(): pass")
    strict = ("-W", "error", "--strict-markers", "--strict-config")
    installed.runpytest_subprocess(*strict).assert_outcomes(passed=1)
    installed.makepyfile("def test_a_fixture(fake_triton): pass")
    installed.runpytest_subprocess("-p", "no:beam_triton").assert_outcomes(errors=1)
    listed = installed.runpytest_subprocess("--fixtures")
    listed.stdout.fnmatch_lines(["fake_triton -- *", "local_triton [[]session scope[]] -- *"])


def test_local_triton_is_one_server_for_a_session(installed: pytest.Pytester, tmp_path: Path) -> None:
    """Tests with the same arguments share a server; a killed one is started again for the next test."""
    repository = write_models(tmp_path / "models", ["double"], instances=1)
    installed.makepyfile(
        f"""
        import os, pytest

        OPTIONS = {{"stop_timeout_seconds": 0.1}}
        pids = []

        @pytest.fixture
        def triton(local_triton):
            return local_triton({str(repository)!r}, **OPTIONS)

        def test_first(triton):
            assert triton.is_ready
            pids.append(triton.pid)

        def test_second(triton):
            assert [triton.pid] == pids
            triton.kill()

        def test_third(triton):
            assert triton.is_ready
            assert triton.pid not in pids
            with open("pid.txt", "w") as file:
                file.write(str(triton.pid))
        """
    )
    installed.runpytest_subprocess("-q").assert_outcomes(passed=3)
    pid = int((installed.path / "pid.txt").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_local_triton_skips_where_it_cannot_run(installed: pytest.Pytester) -> None:
    """On another operating system the test is skipped with the reason; a wrong folder is an error here."""
    installed.makepyfile(
        """
        def test_on_a_mac(local_triton, monkeypatch):
            monkeypatch.setattr("platform.system", lambda: "Darwin")
            local_triton("nowhere")

        def test_a_wrong_folder(local_triton):
            local_triton("nowhere")
        """
    )
    result = installed.runpytest_subprocess("-q", "-rs")
    result.assert_outcomes(skipped=1, failed=1)
    result.stdout.fnmatch_lines(["*SKIPPED*runs on Linux only, and this is Darwin: *FakeTriton*"])
    result.stdout.fnmatch_lines(["*ConfigurationError: model_repository 'nowhere' is not a folder*"])


def test_the_examples_of_the_documentation_pass(installed: pytest.Pytester, tmp_path: Path) -> None:
    """The code of docs/testing.md, as one file of tests beside a model repository."""
    examples = re.findall(r"```python\n(.*?)```", (_ROOT / "docs" / "testing.md").read_text(), re.DOTALL)
    assert len(examples) == 3
    model = dataclasses.replace(
        CATALOGUE["double"], inputs=(Tensor("x", "FP32", (2,)),), outputs=(Tensor("y", "FP32", (2,)),)
    )
    model.write(installed.path / "model_repository")
    installed.makepyfile("\n\n".join(examples))
    installed.runpytest_subprocess("-q").assert_outcomes(passed=3)
