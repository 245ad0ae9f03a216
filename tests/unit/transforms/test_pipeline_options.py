"""`TritonOptions`: a pipeline's options, and what job pages and graphs show of a step."""

from __future__ import annotations

import pickle
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.display import DisplayData
from apache_beam.typehints.batch import NumpyArray

from beam_triton import (
    BatchingPolicy,
    ConfigurationError,
    ModelSpec,
    TensorSpec,
    TritonBatchInference,
    TritonInference,
    TritonModelHandler,
    TritonOptions,
)
from beam_triton.options import InferenceOptions
from beam_triton.score.job_options import ScoreJob, parse_options

FLAGS = ["--triton_endpoint=http://t:8000", "--triton_model=m", "--runner=FnApiRunner"]
SPEC = ModelSpec("m", "1", (TensorSpec("x", "FP32", (2,)),), (TensorSpec("y", "FP32", (3,)),), 16)


def arguments(*flags: str, **defaults: Any) -> dict[str, Any]:
    return PipelineOptions([*FLAGS, *flags]).view_as(TritonOptions).triton_arguments(**defaults)


def test_a_transform_is_made_of_the_pipelines_options() -> None:
    """Endpoint, model, options and fields of policies."""
    given = arguments(
        "--triton_pool_max_total=50", "--triton_timeout_seconds=20", "--triton_tls_verify=false"
    )
    assert given == {
        "endpoint": ("http://t:8000",),
        "model_name": "m",
        "pool": {"max_total": 50},
        "timeout_seconds": 20.0,
        "tls": {"verify": False},
    }
    for kind in (TritonInference, TritonModelHandler):
        assert kind(**given)._options.pool.max_total == 50


def test_defaults_are_for_what_is_not_said() -> None:
    """The command line comes before them, field by field."""
    given = arguments(
        "--triton_batching_max_batch_size=8", model_name="n", batching=BatchingPolicy(linger_seconds=1)
    )
    assert given["model_name"] == "m"
    assert given["batching"] == BatchingPolicy(max_batch_size=8, linger_seconds=1)
    none = PipelineOptions([]).view_as(TritonOptions)
    assert none.triton_arguments(endpoint="http://a:1", model_name="n") == {
        "endpoint": "http://a:1",
        "model_name": "n",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--triton_model=m"], "--triton_endpoint is needed"),
        (["--triton_endpoint=http://t:8000"], "--triton_model is needed"),
        (
            [*FLAGS, "--triton_timeout_second=9"],
            "no option --triton_timeout_second .did you mean --triton_t.*s",
        ),
        ([*FLAGS, "--triton_auth_token=s3cret"], "--triton_auth_token must be env:NAME or file:PATH"),
        (
            [*FLAGS, "--triton_endpoint=http://u:s3cret@t:1"],
            r"--triton_endpoint http://\*\*\*@t:1 holds a password",
        ),
    ],
)
def test_missing_and_secret_options_are_named(flags: list[str], message: str) -> None:
    """By their flags."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        PipelineOptions(flags).view_as(TritonOptions).triton_arguments()
    assert "s3cret" not in str(caught.value)


def test_options_are_the_same_after_a_runner_has_handed_them_on() -> None:
    """As a dictionary, and pickled."""
    flags = [*FLAGS, "--triton_outputs=a,b", "--triton_pool_reuse_enabled=false", "--triton_trust_env"]
    options = PipelineOptions([*flags, "--triton_classification", '{"a": 2}'])
    expected = options.view_as(TritonOptions).triton_arguments()
    assert (expected["pool"], expected["trust_env"]) == ({"reuse_enabled": False}, True)
    from_dictionary: Any = PipelineOptions.from_dictionary
    for copy in (
        from_dictionary(options.get_all_options(drop_default=True)),
        pickle.loads(pickle.dumps(options)),
    ):
        assert copy.view_as(TritonOptions).triton_arguments() == expected


def test_score_takes_them_beside_its_own() -> None:
    """Its own are shorter, and come first; --option comes before both."""
    flags = ["--files=a.csv", "--output=r.jsonl", *FLAGS, "--triton_retry_max_retries=2", "--batch_size=4"]
    flags += ["--triton_batching_linger_seconds=1", "--triton_timeout_seconds=9", "--timeout_seconds=20"]
    job = ScoreJob(parse_options([*flags, "--option", 'retry={"budget_ratio": 1}', "--option", "priority=1"]))
    assert (job.endpoint, job.model) == (("http://t:8000",), "m")
    options: InferenceOptions = job.served(job.endpoint, job.model).options
    assert options.batching == BatchingPolicy(max_batch_size=4, linger_seconds=1)
    assert (options.retry.max_retries, options.retry.budget_ratio) == (2, 1)
    assert (options.timeout_seconds, options.priority) == (20, 1)


def annotations_of(transform: Any) -> dict[str, str]:
    pipeline = beam.Pipeline(runner="FnApiRunner")
    rows = pipeline | beam.Create([np.zeros(2, np.float32)]).with_output_types(NumpyArray[np.float32, (2,)])
    _ = rows | "Step" >> transform
    proto = pipeline.to_runner_api()
    (step,) = (each for each in proto.components.transforms.values() if each.unique_name == "Step")
    assert "s3cret" not in str(step.annotations)
    return {name: value.decode() for name, value in step.annotations.items()}


SECRET: dict[str, Any] = {"endpoint": "http://u:s3cret@t:8000", "model_name": "m", "model_spec": SPEC}


@pytest.mark.parametrize("kind", [TritonInference, TritonBatchInference])
def test_steps_are_annotated_as_those_of_run_inference(kind: Any) -> None:
    """A runner finds the model by them; no secret is among them."""
    found = annotations_of(kind(**SECRET, model_version=3))
    assert found["model_handler_type"] == f"{kind.__module__}.{kind.__name__}" == found["python_type"]
    assert found["model_identifier"] == "m:3"
    assert found["model_handler"] == f"{kind.__name__}(http://t:8000, 'm')"
    shown = {item.key: item.value for item in DisplayData.create_from(kind(**SECRET)).items}
    assert (shown["model_name"], shown["endpoint"]) == ("m", "http://***@t:8000")


def test_run_inference_annotates_the_handler() -> None:
    """Beam itself, by the handler's name of itself."""
    found = annotations_of(RunInference(TritonModelHandler(**SECRET), model_identifier="mine"))
    assert found["model_handler"] == "TritonModelHandler(http://t:8000, 'm')"
    assert found["model_handler_type"] == "beam_triton.transforms.run_inference.TritonModelHandler"
    # Beam 2.70 does not say it.
    assert found.get("model_identifier", "mine") == "mine"
