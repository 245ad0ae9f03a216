"""WorkerTriton as an option: what it refuses, where its server is, and what is shown and pickled of it."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest

from beam_triton import (
    ConfigurationError,
    ModelSpec,
    TensorSpec,
    TritonBatchInference,
    TritonEnrichmentHandler,
    TritonGenerate,
    TritonInference,
    TritonModelHandler,
    TritonSequenceInference,
    TritonTextEmbeddings,
    WorkerTriton,
)
from beam_triton.options import InferenceOptions
from beam_triton.transforms.model_dofn import display_data_of

SPEC = ModelSpec(
    "m", inputs=(TensorSpec("x", "FP32", (1,)),), outputs=(TensorSpec("y", "FP32", (1,)),), max_batch_size=8
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_repository": ""}, "model_repository must be a path, not ''"),
        ({"model_repository": 3}, "model_repository must be a path, not 3"),
        ({"binary": 3}, "binary must be a path"),
        ({"model_names": "resnet"}, "model_names must be a list of texts"),
        ({"model_names": []}, "model_names names no model; None loads all"),
        ({"arguments": "--log-info=1"}, "arguments must be a list of texts"),
        ({"arguments": ["--http-port=8000"]}, "--http-port is set by the library; http_port chooses a port"),
        ({"http_port": 0}, "http_port must be a port between 1 and 65535, got 0"),
        ({"http_port": True}, "http_port must be a port"),
        ({"shared_memory": "auto"}, "shared_memory must be True or False"),
        ({"startup_timeout_seconds": 0}, "startup_timeout_seconds must be a number above 0"),
        ({"linger_seconds": -1}, "linger_seconds must be a number of 0 or more"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    """Each message names the option and its value."""
    with pytest.raises(ConfigurationError) as raised:
        WorkerTriton(**{"model_repository": "/models", **options})
    assert message in str(raised.value)


def test_equal_configurations_meet_in_one_place() -> None:
    """Durations make no other server; everything that tritonserver gets does."""
    config = WorkerTriton("gs://bucket/models", arguments=["--log-info=1"])
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(config)).folder == config.folder
    same = WorkerTriton("gs://bucket/models", arguments=("--log-info=1",), linger_seconds=1)
    assert same.url == config.url
    others = [
        WorkerTriton("gs://bucket/models"),
        WorkerTriton("gs://bucket/models/", arguments=["--log-info=1"]),
        WorkerTriton("gs://bucket/models", arguments=["--log-info=1"], model_names=["m"]),
        WorkerTriton("gs://bucket/models", arguments=["--log-info=1"], shared_memory=False),
        WorkerTriton("gs://bucket/models", arguments=["--log-info=1"], binary="/t"),
    ]
    assert len({each.folder for each in (config, *others)}) == 6


def test_the_socket_is_where_a_path_of_a_socket_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary folder of the machine that asks; /tmp where that one's name is too long for a socket."""
    monkeypatch.setattr(tempfile, "tempdir", "/somewhere")
    config = pickle.loads(pickle.dumps(WorkerTriton("/models")))
    assert str(config.place).startswith("/somewhere/beam_triton-")
    assert config.url.startswith("http+unix://%2Fsomewhere%2Fbeam_triton-")
    monkeypatch.setattr(tempfile, "tempdir", "/somewhere" * 9)
    assert str(config.place).startswith("/tmp/beam_triton-")


def test_a_relative_repository_is_one_of_the_machine_that_builds() -> None:
    """Workers run elsewhere; a URL stays as it is."""
    assert WorkerTriton("models").model_repository == str(Path.cwd() / "models")
    assert WorkerTriton(Path("/models")).model_repository == "/models"  # type: ignore[arg-type]
    assert WorkerTriton("gs://bucket/models").model_repository == "gs://bucket/models"


def test_nothing_secret_is_shown() -> None:
    """Neither a password in the URL nor what the arguments hold."""
    config = WorkerTriton(
        "s3://key:s3cret@bucket/models", arguments=["--http-restricted-api=metrics:key=s3cret"]
    )
    options = InferenceOptions(endpoint=config)
    handler = TritonModelHandler(config, "m")
    for shown in (repr(config), str(config), str(options.shown()), options.servers, repr(handler)):
        assert "s3cret" not in shown
    assert display_data_of(options, "m")["endpoint"].value == "WorkerTriton('s3://***@bucket/models')"


@pytest.mark.parametrize(
    "surface",
    [
        TritonInference,
        lambda endpoint, name: TritonBatchInference(endpoint, name, model_spec=SPEC),
        TritonModelHandler,
        TritonSequenceInference,
        TritonGenerate,
        lambda endpoint, name: TritonTextEmbeddings(endpoint, name, ["text"]),
        lambda endpoint, name: TritonEnrichmentHandler(endpoint, name),
    ],
    ids=["inference", "batch", "handler", "sequence", "generate", "embeddings", "enrichment"],
)
def test_every_surface_takes_one(surface: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built without a server, a program to start one, or a folder for it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    surface(WorkerTriton("gs://bucket/models"), "m")
    assert list(tmp_path.iterdir()) == []


def test_rows_need_the_model_where_the_pipeline_is_built(tmp_path: Path) -> None:
    """Nobody can be asked yet; with model_spec nobody needs to be."""
    config = WorkerTriton(tmp_path)  # type: ignore[arg-type]
    pipeline = beam.Pipeline()
    elements = pipeline | beam.Create([beam.Row(x=np.float32(1.0))])
    with pytest.raises(ConfigurationError, match=r"is started on the workers.*give model_spec=ModelSpec"):
        _ = elements | "without" >> TritonInference(config, "m", output="row")
    with pytest.raises(ConfigurationError, match=r"is started on the workers"):
        TritonBatchInference(config, "m")
    rows = elements | "with" >> TritonInference(config, "m", output="row", model_spec=SPEC)
    assert "y" in dict(beam.typehints.schemas.named_fields_from_element_type(rows.element_type))


def test_names_are_not_looked_up_for_it() -> None:
    """It has no name."""
    with pytest.raises(ConfigurationError, match="discovery looks names up, and a WorkerTriton has none"):
        InferenceOptions(endpoint=WorkerTriton("/models"), discovery="dns")


def test_it_stands_alone() -> None:
    """A list is of URLs."""
    with pytest.raises(ConfigurationError, match="endpoint must be a URL such as http://host:8000"):
        InferenceOptions(endpoint=[WorkerTriton("/models")])  # type: ignore[list-item]
