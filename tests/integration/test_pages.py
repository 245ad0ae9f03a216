"""The examples of the documentation's pages run, in the order in which a reader meets them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest

import beam_triton
from beam_triton import TritonInference
from beam_triton.testing import LocalTriton
from beam_triton.testing.ports import free_port
from tests.support.models import throwaway_triton, write_models
from tests.support.pages import ROOT, run_page
from tests.support.pipelines import score

RunPage = Callable[[str], list[str]]

DOCS = ROOT / "docs"
MODELS = ROOT / "pipelines" / "model_repository"


@pytest.fixture(scope="module")
def digits() -> Iterator[LocalTriton]:
    with LocalTriton(MODELS, stop_timeout_seconds=0.1) as triton:
        yield triton


@pytest.fixture(scope="module")
def images() -> Any:
    """Twenty digits, FP32 [20, 64]."""
    with (ROOT / "pipelines" / "data" / "digits.csv").open() as file:
        rows = [json.loads(row["image"]) for row in csv.DictReader(file) if row["split"] == "test"]
    return np.array(rows[:20], np.float32)


def test_getting_started(tmp_path: Path) -> None:
    """From nothing to dead letters, with a server that the page starts."""
    port = free_port()
    own_port = {"127.0.0.1:8000": f"127.0.0.1:{port}", "--http_port 8000": f"--http_port {port}"}
    assert len(run_page(DOCS / "getting-started.md", tmp_path, replacements=own_port)) == 9


@pytest.fixture
def run(digits: LocalTriton, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPage:
    """Runs a page that has images of digits, on a Triton that has the model."""
    monkeypatch.chdir(tmp_path)
    port = digits.endpoint.rpartition(":")[2]
    replacements = {"http://triton:8000": digits.endpoint, "triton:8000": f"127.0.0.1:{port}"}
    return lambda page: run_page(DOCS / page, tmp_path, replacements=replacements, names={"images": images})


@pytest.mark.parametrize(("page", "blocks"), [("client.md", 5), ("failures.md", 4)])
def test_examples_print_what_the_page_says(page: str, blocks: int, run: RunPage) -> None:
    assert len(run(page)) == blocks


def test_both_sides_of_a_comparison_give_the_same(run: RunPage) -> None:
    """Each example of docs/coming-from.md prints the labels of the same digits."""
    printed = run("coming-from.md")
    assert len(printed) == 4
    assert {"".join(sorted(labels.split())) for labels in printed} == {"00112233344567888999"}


def shown(names: dict[str, Any]) -> dict[str, Any]:
    """The names that pages take for granted."""
    return {**{name: getattr(beam_triton, name) for name in beam_triton.__all__}, "beam": beam, **names}


OF_OPTIONS = (
    *("doors", "index", "lock-file", "network", "options", "security", "sequences", "shared-memory"),
    *("tuning", "watching"),
)


@pytest.mark.parametrize("page", OF_OPTIONS)
def test_examples_of_options_are_taken(
    page: str, digits: LocalTriton, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shows options only is constructed, which checks them; what shows a pipeline is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_repository").symlink_to(MODELS)
    chunks = beam.Pipeline("FnApiRunner") | beam.Create([("a call", images[0])])
    names = shown({"endpoint": digits.endpoint, "model": "digits", "images": images, "chunks": chunks})
    own = {"http://triton:8000": digits.endpoint, "beam.Pipeline()": "beam.Pipeline('FnApiRunner')"}
    assert run_page(DOCS / f"{page}.md", tmp_path, replacements=own, names=names)


def test_a_server_with_restricted_apis_works_as_well(tmp_path: Path) -> None:
    """As docs/security.md says: without index, statistics and shared memory, or with the header."""
    repository = write_models(tmp_path / "models", ["echo_variable"])
    restricted = "--http-restricted-api=model-repository,shared-memory,statistics:key=s3cret"
    elements = [np.full(100_000, number, np.float32) for number in range(8)]
    with throwaway_triton(repository, extra_args=[restricted]) as triton:
        for headers in (None, {"key": "s3cret"}):
            results = score(
                elements, TritonInference(triton.endpoint, "echo_variable", headers=headers)
            ).results
            assert sorted(result.inference["y"][0] for result in results) == list(range(8))
