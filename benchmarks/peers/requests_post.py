"""``requests.post`` for every batch, without a session, in a DoFn behind ``BatchElements``.

Binary both ways, and with ``Accept-Encoding: identity``: with the header that requests sends by itself Triton
compresses every answer, and this peer would be ten times slower for a reason that has nothing to do with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import requests
from apache_beam.ml.inference.base import PredictionResult

from benchmarks.peers.peer import PipelinePeer
from benchmarks.workload import Array, Target, Workload

_HEADER_LENGTH = "Inference-Header-Content-Length"


class _Client:
    def __init__(self, target: Target) -> None:
        self._url = f"{target.endpoint}/v2/models/{target.model_name}/infer"

    def infer(self, batch: Array) -> Array:
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": "x",
                        "shape": batch.shape,
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": batch.nbytes},
                    }
                ],
                "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
            }
        ).encode()
        response = requests.post(
            self._url,
            data=header + batch.tobytes(),
            headers={
                "Content-Type": "application/octet-stream",
                "Accept-Encoding": "identity",
                _HEADER_LENGTH: str(len(header)),
            },
            timeout=60,
        )
        response.raise_for_status()
        length = int(response.headers[_HEADER_LENGTH])
        shape = json.loads(response.content[:length])["outputs"][0]["shape"]
        answer: Array = np.frombuffer(response.content, np.float32, offset=length).reshape(shape)
        return answer

    def close(self) -> None:
        """There is nothing to give back."""


class _Score(beam.DoFn):
    def __init__(self, target: Target) -> None:
        self._target = target

    def setup(self) -> None:
        self._client = _Client(self._target)

    def process(self, batch: Sequence[Array]) -> Iterator[PredictionResult]:
        answers = self._client.infer(np.stack(batch))
        for example, answer in zip(batch, answers, strict=True):
            yield PredictionResult(example, answer, self._target.model_name)


class _Transform(beam.PTransform[Any, Any]):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self._workload = workload

    def expand(self, elements: Any) -> Any:
        size = self._workload.batch_size or 64
        return elements | beam.BatchElements(size, size) | beam.ParDo(_Score(self._workload.target))


class RequestsPost(PipelinePeer):
    name = "requests.post"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return _Transform(workload)

    def open_client(self, target: Target) -> _Client:
        return _Client(target)
