"""Servers of the Open Inference Protocol that are not Triton, as public reports describe them.

`ScriptedServer` is an origin for `tests.support.fault_server.FaultServer`: JSON only, read as strictly as
orjson does (no bare NaN), and answered as MLServer, KServe, OpenVINO Model Server and ModelMesh answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.answers import Answer, Request

Tensor = dict[str, Any]
Predict = Callable[[Sequence[Any], Sequence[int]], list[Tensor]]
"""The first input's values, flat, and its shape; gives the answer's outputs."""


def tensor(name: str, datatype: str, shape: Sequence[int], data: Any = None) -> Tensor:
    """A tensor of the metadata, or with ``data`` of an answer."""
    made: Tensor = {"name": name, "datatype": datatype, "shape": list(shape)}
    return made if data is None else {**made, "data": data}


def row_sums(values: Sequence[Any], shape: Sequence[int]) -> list[Tensor]:
    """``predict`` FP32 [rows, 1]: the sum of each row; null where a value of the row is null."""
    width = math.prod(shape[1:])
    rows = [values[start : start + width] for start in range(0, shape[0] * width, width)]
    sums = [None if None in row else sum(row) for row in rows]
    return [tensor("predict", "FP32", [len(rows), 1], sums)]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"unexpected token {name}")


@dataclass
class ScriptedServer:
    """Answers requests for one model, ``m``.

    Args:
        inputs, outputs: what its metadata name.
        predict: makes the outputs of an answer.
        only_when_asked: outputs that are given only to requests that name them.
        server_metadata: the answer to ``GET /v2``; None is a 404, as ModelMesh's proxy gives.
        versions: what the metadata list; an answer holds no version where there is none.
        index: the answer to ``POST /v2/repository/index`` with a JSON body; None is a 404.
        names: the answer to ``GET /v2/models``; None is a 404.
    """

    inputs: Sequence[Tensor] = (tensor("x", "FP32", [-1, 4]),)
    outputs: Sequence[Tensor] = (tensor("predict", "FP32", [-1, 1]),)
    predict: Predict = row_sums
    only_when_asked: Sequence[str] = ()
    server_metadata: Mapping[str, Any] | None = field(
        default_factory=lambda: {"name": "scripted", "version": "1", "extensions": []}
    )
    versions: Sequence[str] = ()
    index: Any = None
    names: Any = None
    requests: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, request: Request) -> Answer:
        if request.target == "/v2/repository/index" and self.index is not None and request.body:
            return _json(self.index)
        if request.target == "/v2/models" and self.names is not None:
            return _json(self.names)
        if request.target.startswith("/v2/health") or request.target.endswith("/ready"):
            return _json({})
        if request.target == "/v2" and self.server_metadata is not None:
            return _json(self.server_metadata)
        if request.target.endswith("/infer"):
            return self._infer(request)
        allowed = ["/v2/models/m", *(f"/v2/models/m/versions/{version}" for version in self.versions)]
        if request.target in allowed:
            return _json(
                {"name": "m", "versions": [*self.versions], "inputs": self.inputs, "outputs": self.outputs}
            )
        if request.target.startswith("/v2/models/"):
            return _json({"error": f"Model {request.target.split('/')[3]} not found"}, 404)
        return _json({"code": 5, "message": "Not Found"}, 404)

    def _infer(self, request: Request) -> Answer:
        try:
            document = json.loads(request.body, parse_constant=_refuse_constant)
        except ValueError as error:
            return _json({"detail": f"JSON decode error: {error}"}, 422)
        self.requests.append(document)
        given = document["inputs"][0]
        fixed = self.inputs[0]["shape"] if self.inputs else [-1]
        if fixed[0] == 1 and given["shape"] != fixed:
            return _json({"error": f"Invalid shape {given['shape']}, expected {fixed}"}, 400)
        asked = [output["name"] for output in document.get("outputs", ())]
        outputs = self.predict(given["data"], given["shape"])
        outputs = [
            output
            for output in outputs
            if (output["name"] in asked if asked else output["name"] not in self.only_when_asked)
        ]
        answer: dict[str, Any] = {"model_name": "m", "outputs": outputs}
        if self.versions:
            answer["model_version"] = self.versions[0]
        return _json(answer)

    @property
    def batch_sizes(self) -> list[int]:
        """The first dimension of each inference request, in the order in which they came."""
        return [document["inputs"][0]["shape"][0] for document in self.requests]


def _json(document: Any, status: int = 200) -> Answer:
    body = json.dumps(document, allow_nan=False).encode()
    return Answer(status, body, (("Content-Type", "application/json"),))
