"""Doubles x; a negative value anywhere in a request triggers the fault that the configuration names.

``on_negative`` is one of invalid_argument (400), unavailable (503), raise (500), exit (the model's process
exits) and hang (it does not answer for ``hang_seconds``, an hour by default).
"""

import json
import os
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        self.fault = parameters["on_negative"]["string_value"]
        self.hang_seconds = float(parameters.get("hang_seconds", {}).get("string_value", 3600))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        if (x < 0).any():
            message = f"x is negative: {float(x.min())}"
            if self.fault == "invalid_argument":
                return refusal(pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
            if self.fault == "unavailable":
                return refusal(pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE))
            if self.fault == "exit":
                os._exit(1)
            if self.fault == "hang":
                time.sleep(self.hang_seconds)
            raise ValueError(message)
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * x)])


def refusal(error):
    return pb_utils.InferenceResponse(error=error)
