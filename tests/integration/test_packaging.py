"""Wheel and sdist are built from a copy of the checkout, inspected, and installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built as Beam builds the package of ``--setup_file``."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "__pycache__", "*.egg-info")
    shutil.copytree(_ROOT, source, ignore=ignored)
    ran = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return source / "dist"


def modules() -> set[str]:
    """The files of the package in the checkout, and its pytest plugin."""
    package = _ROOT / "beam_triton"
    files = {str(file.relative_to(_ROOT)) for file in package.rglob("*.py")}
    return files | {"beam_triton/py.typed", "beam_triton/yaml/providers.yaml", "pytest_beam_triton.py"}


def test_wheel_contains_only_the_package(distributions: Path) -> None:
    """Every module, the ``py.typed`` marker and the licence; no test, benchmark, pipeline or data."""
    (wheel,) = distributions.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == modules()
    assert any(name.endswith("/LICENSE") for name in names)


def test_sdist_contains_only_the_package_and_its_build_files(distributions: Path) -> None:
    """The staged archive contains no test, benchmark, pipeline or data either."""
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    others = {name for name in names - modules() if not name.startswith("beam_triton.egg-info/")}
    assert names >= modules()
    assert others == {
        *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"),
        *("pyproject.toml", "setup.cfg", "setup.py"),
    }


def test_runtime_dependencies_are_few(distributions: Path) -> None:
    """Without extras: Beam, NumPy, requests and urllib3, and Python 3.10 or newer."""
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    needed = [line.split(":")[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    plain = [need.split(">=")[0] for need in needed if "extra ==" not in need]
    assert sorted(plain) == ["apache-beam", "numpy", "requests", "urllib3"]
    assert "Requires-Python: >=3.10" in lines


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_distributions_install_without_network(distributions: Path, tmp_path: Path, kind: str) -> None:
    """Both install offline, and the import finds the installed copy."""
    (archive,) = distributions.glob(kind)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([*pip, *options, str(archive)], check=True, cwd=tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", "import beam_triton; print(beam_triton.__file__)"],
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.stdout.strip() == str(target / "beam_triton" / "__init__.py"), ran.stderr
