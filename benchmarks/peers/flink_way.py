"""One JSON request a row, as Flink's Triton function sends them, on connections that are kept open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import requests
from apache_beam.ml.inference.base import PredictionResult

from benchmarks.peers.peer import PipelinePeer
from benchmarks.workload import Array, Target, Workload


class _Client:
    def __init__(self, target: Target) -> None:
        self._url = f"{target.endpoint}/v2/models/{target.model_name}/infer"
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Accept-Encoding"] = "identity"

    def infer(self, batch: Array) -> Array:
        return np.concatenate([self._infer_row(row) for row in batch])

    def _infer_row(self, row: Array) -> Array:
        x = {"name": "x", "shape": [1, *row.shape], "datatype": "FP32", "data": row.tolist()}
        response = self._session.post(self._url, json={"inputs": [x]}, timeout=60)
        response.raise_for_status()
        y = response.json()["outputs"][0]
        answer: Array = np.array(y["data"], np.float32).reshape(y["shape"])
        return answer

    def close(self) -> None:
        self._session.close()


class _Score(beam.DoFn):
    def __init__(self, target: Target) -> None:
        self._target = target

    def setup(self) -> None:
        self._client = _Client(self._target)

    def process(self, element: Array) -> Iterator[PredictionResult]:
        yield PredictionResult(element, self._client.infer(element[None])[0], self._target.model_name)

    def teardown(self) -> None:
        self._client.close()


class OneRowOneRequest(PipelinePeer):
    name = "JSON, one row a request"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_Score(workload.target))

    def open_client(self, target: Target) -> _Client:
        return _Client(target)
