"""NVIDIA's clients: alone, in ``RunInference`` as a careful engineer would write it, and in a batched DoFn.

Tensors are binary both ways, ``RunInference`` opens the client once, in ``load_model``, and ``get_num_bytes``
adds up sizes where Beam's default would pickle every batch.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference

from benchmarks.numpy_workload import BatchDoFn
from benchmarks.peers.peer import Client, PipelinePeer
from benchmarks.workload import Array, Target, Workload

Protocol = Literal["http", "grpc"]


class _Client:
    def __init__(self, target: Target, protocol: Protocol) -> None:
        # Imported here, not above: gevent and gRPC's threads must not start in the process that is forked.
        self._library: Any = importlib.import_module(f"tritonclient.{protocol}")
        address = target.grpc_endpoint if protocol == "grpc" else target.endpoint.removeprefix("http://")
        self._client = self._library.InferenceServerClient(address)
        self._model_name = target.model_name
        self._outputs = [self._library.InferRequestedOutput("y")]

    def infer(self, batch: Array) -> Array:
        x = self._library.InferInput("x", list(batch.shape), "FP32")
        x.set_data_from_numpy(batch)
        y: Array = self._client.infer(self._model_name, [x], outputs=self._outputs).as_numpy("y")
        return y

    def close(self) -> None:
        self._client.close()


class _SharingClient(_Client):
    """Inputs and outputs in two regions that are made once; the answer is a view of the second one."""

    def __init__(self, target: Target, protocol: Protocol) -> None:
        super().__init__(target, protocol)
        self._memory: Any = importlib.import_module("tritonclient.utils.shared_memory")
        self._regions: list[tuple[str, Any]] = []
        self._nbytes = 0

    def infer(self, batch: Array) -> Array:
        if batch.nbytes > self._nbytes:
            self._make_regions(batch.nbytes)
        (name_in, region_in), (name_out, region_out) = self._regions
        self._memory.set_shared_memory_region(region_in, [batch])
        x = self._library.InferInput("x", list(batch.shape), "FP32")
        x.set_shared_memory(name_in, batch.nbytes)
        self._outputs[0].set_shared_memory(name_out, batch.nbytes)
        self._client.infer(self._model_name, [x], outputs=self._outputs)
        y: Array = self._memory.get_contents_as_numpy(region_out, np.float32, list(batch.shape))
        return y

    def close(self) -> None:
        self._drop_regions()
        super().close()

    def _make_regions(self, nbytes: int) -> None:
        self._drop_regions()
        self._nbytes = nbytes
        for _ in range(2):
            name = f"benchmark_{uuid.uuid4().hex}"
            region = self._memory.create_shared_memory_region(name, f"/{name}", nbytes)
            self._client.register_system_shared_memory(name, f"/{name}", nbytes)
            self._regions.append((name, region))

    def _drop_regions(self) -> None:
        for name, region in self._regions:
            self._client.unregister_system_shared_memory(name)
            self._memory.destroy_shared_memory_region(region)
        self._regions.clear()


class Tritonclient(PipelinePeer):
    def __init__(self, protocol: Protocol, *, shares_memory: bool = False) -> None:
        self._protocol: Protocol = protocol
        self._shares_memory = shares_memory
        self.name = f"tritonclient.{protocol}{', shared memory' if shares_memory else ''}"

    @property
    def name_in_pipelines(self) -> str:
        return f"RunInference + {self.name}"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return run_inference(self.open_client, workload)

    def batch_transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_ScoreBatches(self, workload))

    def open_client(self, target: Target) -> _Client:
        return (_SharingClient if self._shares_memory else _Client)(target, self._protocol)


class _ScoreBatches(BatchDoFn):
    def __init__(self, peer: Tritonclient, workload: Workload) -> None:
        super().__init__(workload)
        self._peer = peer

    def setup(self) -> None:
        self._client = self._peer.open_client(self._workload.target)

    def infer(self, batch: Array) -> Array:
        return self._client.infer(batch)


class ClientModelHandler(ModelHandler[Array, PredictionResult, Client]):
    """``open_client`` opens the client; it has to pickle."""

    def __init__(self, open_client: Callable[[Target], Client], target: Target, batch_size: int) -> None:
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self._open_client = open_client
        self._target = target

    def load_model(self) -> Client:
        return self._open_client(self._target)

    def run_inference(
        self, batch: Sequence[Array], model: Client, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        answers = model.infer(np.stack(batch))
        model_id = self._target.model_name
        return [
            PredictionResult(example, answer, model_id)
            for example, answer in zip(batch, answers, strict=True)
        ]

    def get_num_bytes(self, batch: Sequence[Array]) -> int:
        return sum(element.nbytes for element in batch)


def run_inference(open_client: Callable[[Target], Client], workload: Workload) -> beam.PTransform[Any, Any]:
    """``RunInference`` on the client that ``open_client`` opens."""
    return RunInference(ClientModelHandler(open_client, workload.target, workload.request_elements))
