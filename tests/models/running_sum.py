"""A sequence model: the sum of x since the sequence's start."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x, start, end, sequence = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy().item()
            for name in ("x", "START", "END", "CORRID")
        )
        total = x if start else self.sums[sequence] + x
        self.sums[sequence] = total
        if end:
            del self.sums[sequence]
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([[total]], np.int32))])
