"""What real Tritons have executed, by their own statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton


def port(server: LocalTriton) -> int:
    """Where it listens on 127.0.0.1."""
    return int(server.endpoint.rpartition(":")[2])


def executed(server: LocalTriton, model_name: str) -> int:
    """How many requests the model has executed since the server started."""
    count: int = _statistics(server, model_name)["execution_count"]
    return count


def inferred(server: LocalTriton, model_name: str) -> int:
    """How many elements the model has answered since the server started."""
    count: int = _statistics(server, model_name)["inference_count"]
    return count


def failed(server: LocalTriton, model_name: str) -> int:
    """How many requests have failed since the server started."""
    count: int = _statistics(server, model_name)["inference_stats"]["fail"]["count"]
    return count


def _statistics(server: LocalTriton, model_name: str) -> Any:
    with TritonClient(server.endpoint) as client:
        return client.statistics(model_name)["model_stats"][0]


class Shares:
    """The second server's share of all requests since `start`."""

    def __init__(self, fleet: Sequence[LocalTriton], model_name: str) -> None:
        self._fleet = fleet
        self._model_name = model_name
        self.start()

    def start(self) -> None:
        self._before = self._executed()

    def second(self) -> float:
        first, second = (now - before for now, before in zip(self._executed(), self._before, strict=True))
        return second / (first + second)

    def _executed(self) -> list[int]:
        return [executed(server, self._model_name) for server in self._fleet]
