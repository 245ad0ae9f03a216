"""What a release consists of, as far as it is in the checkout."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SETUP = 'VERSION = "1.2.3"\n'
CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.3] - 2026-01-31

### Added

- a

## [1.2.2] - 2026-01-01

- b
"""


def release_notes(*arguments: str) -> str:
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".github" / "release_notes.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.release_notes(*arguments))


def test_notes_are_the_versions_part_of_the_changelog() -> None:
    assert release_notes("v1.2.3", SETUP, CHANGELOG) == "### Added\n\n- a"


@pytest.mark.parametrize(
    ("tag", "changelog", "message"),
    [
        ("v1.2.4", CHANGELOG, "the tag is v1.2.4, setup.py has version 1.2.3"),
        ("v1.2.3", CHANGELOG.replace("[1.2.3]", "[1.3.0]"), "has no part"),
        ("v1.2.3", CHANGELOG.replace("### Added\n\n- a\n", ""), "has no part"),
    ],
)
def test_a_release_without_its_changelog_is_refused(tag: str, changelog: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        release_notes(tag, SETUP, changelog)


def test_setup_has_a_version_that_the_notes_find() -> None:
    (version,) = re.findall(r'^VERSION = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_valid(path: Path) -> None:
    """By GitHub's schema, as check-jsonschema has it."""
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        str(path),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_use_pinned_actions_and_little_permission(path: Path) -> None:
    """A tag of an action may move; a commit may not."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for step in job.get("steps", ()):
            if "uses" in step:
                assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]


def test_workflows_run_targets_that_make_has() -> None:
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    targets = re.findall(r"target: ([\w-]+)", text) + re.findall(r"run: make ([\w-]+)", text)
    assert len(targets) > 5
    found = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*targets} <= {*found}


def test_links_of_a_release_lead_to_its_repository(tmp_path: Path) -> None:
    """On a package index, relative links of the README lead nowhere."""
    code = "import setuptools; setuptools.setup = lambda **given: print(given['long_description'])\n"
    code += f"import runpy; runpy.run_path({str(ROOT / 'setup.py')!r})"
    url = "https://github.example/someone/beam_triton"
    environment = {"PATH": "", "BEAM_TRITON_REPOSITORY_URL": url}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    links = re.findall(r"\]\(([^)]*)\)", ran.stdout)
    assert len(links) > 10
    assert all(link.startswith(("https://", "#")) for link in links)
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", ran.stdout)
    assert images and all(link.startswith(f"{url}/raw/v") for link in images if link.startswith(url))
