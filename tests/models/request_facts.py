"""Returns what came with the request besides its tensors, as JSON: its id, its parameters, its rows."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.version = args["model_version"]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        rows = len(pb_utils.get_input_tensor_by_name(request, "x").as_numpy())
        facts = {
            "id": request.request_id(),
            "parameters": json.loads(request.parameters()),
            "rows": rows,
            "version": self.version,
        }
        text = json.dumps(facts, sort_keys=True).encode()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("facts", np.array([[text]] * rows, dtype=np.object_))]
        )
