"""KeyedModelHandler with hundreds of models, on a real Triton: ensembles, which need no process each."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import (
    KeyedModelHandler,
    KeyModelMapping,
    KeyModelPathMapping,
    RunInference,
)

from beam_triton import ModelNotFoundError, TritonModelHandler
from beam_triton.dispatch.channel import ENDPOINT_SETS
from beam_triton.transport.session import SESSIONS
from tests.support.models import CATALOGUE, throwaway_triton, write_models
from tests.support.pipelines import RUNNER

MODELS = 200
ELEMENTS = 2_000


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with ensembles m0, m1, … over one model."""
    repository = write_models(tmp_path_factory.mktemp("many"), ["double"])
    for number in range(MODELS):
        dataclasses.replace(CATALOGUE["ensemble"], name=f"m{number}").write(repository)
    with throwaway_triton(repository) as server:
        yield server.endpoint


def report(key: int, result: Any) -> str:
    """What a worker process sees of a result, as a line of JSON."""
    return json.dumps(
        {
            "key": key,
            "x": float(result.example[0]),
            "y": float(result.inference["y"][0]),
            "model": result.model_id.split(":")[0],
            "process": os.getpid(),
            "sessions": len(SESSIONS),
            "models": len(ENDPOINT_SETS),
        }
    )


def reports_of(
    folder: Path, handler: Any, elements: list[Any], *options: str, updates: Any = None, shuffled: bool = True
) -> Any:
    """Run elements through the handler in processes of their own, and return what `report` says."""
    pipeline = beam.Pipeline(runner=RUNNER, argv=["--direct_running_mode=multi_processing", *options])
    transform = RunInference(handler)
    if updates is not None:
        side = pipeline | "Updates" >> beam.Create([updates])
        transform = RunInference(handler, model_metadata_pcoll=side)
    reports = pipeline | beam.Create(elements, reshuffle=updates is None) | transform | beam.MapTuple(report)
    _ = reports | beam.io.WriteToText(str(folder / "reports"))
    pipeline.run().wait_until_finish()
    return [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]


class OneBatch(KeyedModelHandler[Any, Any, Any, Any]):
    """Every bundle is one batch: Beam ignores what the handlers of several models say about batches."""

    def batch_elements_kwargs(self) -> Any:
        return {"min_batch_size": ELEMENTS}


def keyed_elements(models: int) -> list[Any]:
    return [(n % (2 * models), [float(n)] * 4) for n in range(ELEMENTS)]


def mappings_of(endpoint: str, models: int) -> list[Any]:
    """Two keys for each model."""
    return [KeyModelMapping([n, n + models], TritonModelHandler(endpoint, f"m{n}")) for n in range(models)]


def answers(reports: list[Any]) -> list[Any]:
    return sorted((each["x"], each["key"], each["model"], each["y"]) for each in reports)


def expected(models: int) -> list[Any]:
    return [(float(n), n % (2 * models), f"m{n % models}", 4.0 * n) for n in range(ELEMENTS)]


@pytest.mark.parametrize(("hint", "most_open"), [(None, MODELS), (20, 25)])
def test_hundreds_of_models_share_a_session(
    endpoint: str, hint: int | None, most_open: int, tmp_path: Path
) -> None:
    """Every key's own model answers, all over one session; those that a hint evicts are closed."""
    handler = OneBatch(mappings_of(endpoint, MODELS), max_models_per_worker_hint=hint)
    reports = reports_of(tmp_path, handler, keyed_elements(MODELS), "--direct_num_workers=1")
    assert answers(reports) == expected(MODELS)
    assert {each["sessions"] for each in reports} == {1}
    assert max(each["models"] for each in reports) <= most_open


def test_every_process_opens_the_models_that_it_uses(endpoint: str, tmp_path: Path) -> None:
    """Beam keeps the models of one process for all of them; here each has its own, over its own session.

    Few models: Beam itself takes half a second for each one in each batch of another process than that.
    """
    handler = OneBatch(mappings_of(endpoint, 3))
    reports = reports_of(tmp_path, handler, keyed_elements(3), "--direct_num_workers=2")
    assert answers(reports) == expected(3)
    processes = Counter((each["process"], each["sessions"], each["models"]) for each in reports)
    assert len({process for process, _, _ in processes}) == 2
    assert {(sessions, models) for _, sessions, models in processes} == {(1, 3)}


def test_update_by_key_switches_and_splits(endpoint: str, tmp_path: Path) -> None:
    """Keys that shared a model get one each, by name and by version, as KeyModelPathMapping says."""
    updates = [
        KeyModelPathMapping([0], "m10/versions/1", "ten"),
        KeyModelPathMapping([3], "m11", "eleven"),
        KeyModelPathMapping([1, 4], "m12", "twelve"),
        KeyModelPathMapping([2, 5], "m2", "two"),
    ]
    handler = KeyedModelHandler(mappings_of(endpoint, 3))
    elements = [(0, [-1.0] * 4), *keyed_elements(3)[:60]]
    reports = reports_of(
        tmp_path, handler, elements, "--direct_num_workers=1", updates=updates, shuffled=False
    )
    # Beam applies the update after a worker's first batch, which has one element.
    assert [each["model"] for each in reports if each["x"] == -1] == ["m0"]
    assert Counter((each["key"], each["model"]) for each in reports if each["x"] >= 0) == {
        (0, "m10"): 10,
        (3, "m11"): 10,
        (1, "m12"): 10,
        (4, "m12"): 10,
        (2, "m2"): 10,
        (5, "m2"): 10,
    }


def test_unknown_model_of_a_key_fails_with_its_name(endpoint: str) -> None:
    """The error lists the models that there are."""
    mapping: Any = KeyModelMapping(["a"], TritonModelHandler(endpoint, "gone"))
    models: Any = KeyedModelHandler([mapping]).load_model()
    with pytest.raises(ModelNotFoundError, match=r"'gone'.* the server has: double, m0"):
        models.load("a")
