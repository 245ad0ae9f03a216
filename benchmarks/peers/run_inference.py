"""RunInference with a model handler made by hand around some client, as a careful engineer would.

The client is made once, in ``load_model``; batches have the size that is asked for; tensors are binary both
ways; and ``get_num_bytes`` adds up sizes where Beam's own would pickle every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference

from benchmarks.peers.peer import Client
from benchmarks.workload import Array, Target, Workload


class ClientModelHandler(ModelHandler[Array, PredictionResult, Client]):
    """``open_client`` makes the client; it has to pickle."""

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
    """The transform."""
    return RunInference(ClientModelHandler(open_client, workload.target, workload.batch_size or 64))
