"""NVIDIA's gRPC client, and RunInference around it."""

from __future__ import annotations

from typing import Any

import apache_beam as beam

from benchmarks.peers.peer import PipelinePeer
from benchmarks.peers.run_inference import run_inference
from benchmarks.workload import Array, Target, Workload


class _Client:
    def __init__(self, target: Target) -> None:
        # Imported where it is used: what it starts must not be in the process that is forked.
        import tritonclient.grpc as tritonclient

        self._tritonclient = tritonclient
        self._client = tritonclient.InferenceServerClient(target.grpc_endpoint)
        self._model_name = target.model_name
        self._outputs = [tritonclient.InferRequestedOutput("y")]

    def infer(self, batch: Array) -> Array:
        x = self._tritonclient.InferInput("x", list(batch.shape), "FP32")
        x.set_data_from_numpy(batch)
        answer = self._client.infer(self._model_name, [x], outputs=self._outputs)
        y: Array = answer.as_numpy("y")
        return y

    def close(self) -> None:
        self._client.close()


class TritonclientGrpc(PipelinePeer):
    name = "tritonclient.grpc"

    @property
    def name_in_pipelines(self) -> str:
        return f"RunInference + {self.name}"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return run_inference(self.open_client, workload)

    def open_client(self, target: Target) -> _Client:
        return _Client(target)
