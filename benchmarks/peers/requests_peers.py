"""Two peers on ``requests``: a POST for each batch, and Flink's way, a JSON request for each row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import requests
from apache_beam.ml.inference.base import PredictionResult

from benchmarks.peers.peer import ClientPerInstance, PipelinePeer
from benchmarks.workload import Array, Target, Workload

_HEADER_LENGTH = "Inference-Header-Content-Length"
_TIMEOUT_SECONDS = 60

# With the header that requests sends by default Triton compresses every answer, ten times slower: the figures
# would be Triton's compression instead of the peer.
_IDENTITY = {"Accept-Encoding": "identity"}


class _PostClient:
    """Binary tensors both ways, and no session."""

    def __init__(self, target: Target) -> None:
        self._url = target.infer_url

    def infer(self, batch: Array) -> Array:
        x = {
            "name": "x",
            "shape": batch.shape,
            "datatype": "FP32",
            "parameters": {"binary_data_size": batch.nbytes},
        }
        y = {"name": "y", "parameters": {"binary_data": True}}
        header = json.dumps({"inputs": [x], "outputs": [y]}).encode()
        response = requests.post(
            self._url,
            data=header + batch.tobytes(),
            headers={
                "Content-Type": "application/octet-stream",
                _HEADER_LENGTH: str(len(header)),
                **_IDENTITY,
            },
            timeout=_TIMEOUT_SECONDS,
        )
        response.raise_for_status()
        length = int(response.headers[_HEADER_LENGTH])
        shape = json.loads(response.content[:length])["outputs"][0]["shape"]
        answer: Array = np.frombuffer(response.content, np.float32, offset=length).reshape(shape)
        return answer

    def close(self) -> None:
        """Nothing stays open."""


class RequestsPost(PipelinePeer):
    """``requests.post`` for every batch, in a DoFn behind ``BatchElements``."""

    name = "requests.post"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return ClientPerInstance(self).transform(workload)

    def open_client(self, target: Target) -> _PostClient:
        return _PostClient(target)


class _JsonRowClient:
    def __init__(self, target: Target) -> None:
        self._url = target.infer_url
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.update(_IDENTITY)

    def infer(self, batch: Array) -> Array:
        return np.concatenate([self._infer_row(row) for row in batch])

    def _infer_row(self, row: Array) -> Array:
        x = {"name": "x", "shape": [1, *row.shape], "datatype": "FP32", "data": row.tolist()}
        response = self._session.post(self._url, json={"inputs": [x]}, timeout=_TIMEOUT_SECONDS)
        response.raise_for_status()
        y = response.json()["outputs"][0]
        answer: Array = np.array(y["data"], np.float32).reshape(y["shape"])
        return answer

    def close(self) -> None:
        self._session.close()


class _ScoreRow(beam.DoFn):
    def __init__(self, target: Target) -> None:
        self._target = target

    def setup(self) -> None:
        self._client = _JsonRowClient(self._target)

    def process(self, element: Array) -> Iterator[PredictionResult]:
        yield PredictionResult(element, self._client.infer(element[None])[0], self._target.model_name)

    def teardown(self) -> None:
        self._client.close()


class JsonRows(PipelinePeer):
    """One JSON request a row, as Flink's Triton function sends them, on connections that are kept open."""

    name = "JSON, one row a request"

    def transform(self, workload: Workload) -> beam.PTransform[Any, Any]:
        return beam.ParDo(_ScoreRow(workload.target))

    def open_client(self, target: Target) -> _JsonRowClient:
        return _JsonRowClient(target)
