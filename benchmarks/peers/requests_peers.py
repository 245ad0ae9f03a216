"""A peer on ``requests``: a POST for each batch."""

from __future__ import annotations

import json
from typing import Any

import apache_beam as beam
import numpy as np
import requests

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
