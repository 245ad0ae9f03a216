"""A sequence model: the sum of x since the sequence's start, and the number of elements.

A negative x is refused, and one of a million or more makes the model raise. With an x of 999,999 it waits.
"""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x, start, end, ready, sequence = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy().item()
            for name in ("x", "START", "END", "READY", "CORRID")
        )
        if not ready:
            # The direct strategy fills a batch with requests of no sequence.
            return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.zeros((1, 1), np.int32))])
        if x < 0:
            refusal = pb_utils.TritonError(f"{x} is negative", pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)
        if x == 999_999:
            time.sleep(0.5)
        if x > 999_999:
            raise ValueError(f"{x} is too large")
        total = x if start else self.sums[sequence] + x
        self.sums[sequence] = total
        if end:
            del self.sums[sequence]
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([[total]], np.int32))])
