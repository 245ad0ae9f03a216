"""NVIDIA's HTTP client, RunInference around it, and a batched DoFn around it."""

from __future__ import annotations

from typing import Any

import apache_beam as beam

from benchmarks.batch_workload import BatchDoFn
from benchmarks.peers.peer import PipelinePeer
from benchmarks.peers.run_inference import run_inference
from benchmarks.workload import Array, Target, Workload


class _Client:
    def __init__(self, target: Target) -> None:
        # Imported where it is used: it brings gevent, which must not be in the process that is forked.
        import tritonclient.http as tritonclient

        self._tritonclient = tritonclient
        self._client = tritonclient.InferenceServerClient(target.endpoint.removeprefix("http://"))
        self._model_name = target.model_name
        self._outputs = [tritonclient.InferRequestedOutput("y", binary_data=True)]

    def infer(self, batch: Array) -> Array:
        x = self._tritonclient.InferInput("x", list(batch.shape), "FP32")
        x.set_data_from_numpy(batch, binary_data=True)
        answer = self._client.infer(self._model_name, [x], outputs=self._outputs)
        y: Array = answer.as_numpy("y")
        return y

    def close(self) -> None:
        self._client.close()


class _ScoreBatches(BatchDoFn):
    def setup(self) -> None:
        self._client = _Client(self._workload.target)

    def answer(self, batch: Array) -> Array:
        return self._client.infer(batch)


class TritonclientHttp(PipelinePeer):
    name = "tritonclient.http"

    @property
    def name_in_pipelines(self) -> str:
        return f"RunInference + {self.name}"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return run_inference(self.open_client, workload)

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_ScoreBatches(workload))

    def open_client(self, target: Target) -> _Client:
        return _Client(target)
