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
from apache_beam.ml.inference.base import KeyedModelHandler, KeyModelMapping, KeyModelPathMapping, RunInference

from beam_triton import ModelNotFoundError, TritonModelHandler
from beam_triton.dispatch.channel import ENDPOINT_SETS
from beam_triton.testing import LocalTriton
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


class Report(beam.DoFn):
    """What a worker process sees of each result."""

    def process(self, keyed_result: Any) -> Any:
        key, result = keyed_result
        yield json.dumps(
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


def reports_of(folder: Path, handler: Any, elements: list[Any], *options: str, updates: Any = None) -> Any:
    pipeline = beam.Pipeline(runner=RUNNER, argv=[f"--direct_running_mode=multi_processing", *options])
    transform = RunInference(handler)
    if updates is not None:
        side = pipeline | "Updates" >> beam.Create([updates])
        transform = RunInference(handler, model_metadata_pcoll=side)
    reports = pipeline | beam.Create(elements) | transform | beam.ParDo(Report())
    _ = reports | beam.io.WriteToText(str(folder / "reports"))
    pipeline.run().wait_until_finish()
    return [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]


@pytest.mark.parametrize("hint", [None, 20])
def test_hundreds_of_models_and_several_processes(endpoint: str, hint: int | None, tmp_path: Path) -> None:
    """Every key's own model answers, in every process, over one session a process; a hint closes models."""
    mappings = [
        KeyModelMapping([n, n + MODELS], TritonModelHandler(endpoint, f"m{n}")) for n in range(MODELS)
    ]
    handler: Any = KeyedModelHandler(mappings, max_models_per_worker_hint=hint)
    elements = [(n % (2 * MODELS), [float(n)] * 4) for n in range(ELEMENTS)]
    reports = reports_of(tmp_path, handler, elements, "--direct_num_workers=2")
    found = sorted((each["x"], each["key"], each["model"], each["y"]) for each in reports)
    assert found == [
        (float(n), n % (2 * MODELS), f"m{n % MODELS}", 4.0 * n) for n in range(ELEMENTS)
    ]
    assert len({each["process"] for each in reports}) == 2
    print(Counter((each["process"], each["sessions"], each["models"]) for each in reports))
    assert {each["sessions"] for each in reports} == {1}
