"""A pipeline whose command line says everything about the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_triton import TritonInference, TritonModelHandler, TritonOptions
from beam_triton.cli.main import main
from beam_triton.testing import LocalTriton


def test_a_pipeline_is_built_of_its_options(triton: LocalTriton, tmp_path: Path) -> None:
    """Its lock file among them; the transform and the handler take the same arguments."""
    lock = str(tmp_path / "sum_and_difference.lock.json")
    assert main(["lock", triton.endpoint, "sum_and_difference", "--output", lock]) == 0
    words = [
        "--runner=FnApiRunner",
        f"--triton_endpoint={triton.endpoint}",
        "--triton_model=sum_and_difference",
    ]
    words += [
        "--triton_outputs=difference",
        "--triton_batching_max_batch_size=2",
        f"--triton_model_spec={lock}",
    ]
    options = PipelineOptions(words)
    arguments = options.view_as(TritonOptions).triton_arguments()
    element = {"a": np.full(16, 5, np.int32), "b": np.full(16, 3, np.int32)}
    with beam.Pipeline(options=options) as pipeline:
        elements = pipeline | beam.Create([element] * 5)
        for name, transform in (
            ("Transform", TritonInference(**arguments)),
            ("Handler", RunInference(TritonModelHandler(**arguments))),
        ):
            values = elements | name >> transform | f"Values of {name}" >> beam.Map(_values)
            assert_that(values, equal_to([{"difference": [2] * 16}] * 5), label=f"Check {name}")


def _values(result: Any) -> dict[str, Any]:
    return {name: array.tolist() for name, array in result.inference.items()}
