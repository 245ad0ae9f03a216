"""Returns x plus its own version as y, after a pause where the parameter ``sleep_seconds`` says so."""

import json
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.version = int(args["model_version"])
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.sleep_seconds = float(parameters.get("sleep_seconds", {}).get("string_value", 0))

    def execute(self, requests):
        time.sleep(self.sleep_seconds)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + x.dtype.type(self.version))])
