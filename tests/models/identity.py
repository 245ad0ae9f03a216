"""Returns every input unchanged as the output at the same position in the configuration.

The configuration's parameter ``sleep_seconds`` adds a pause to each call, like a GPU far away, and
``sleep_seconds_a_row`` one for each element of it; with ``max_rows`` a request of more rows raises, as where
a GPU has too little memory for it.
"""

import json
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.tensors = [
            (given["name"], answered["name"], given["data_type"])
            for given, answered in zip(config["input"], config["output"], strict=True)
        ]
        parameters = config.get("parameters", {})
        self.sleep_seconds = float(parameters.get("sleep_seconds", {}).get("string_value", 0))
        self.sleep_seconds_a_row = float(parameters.get("sleep_seconds_a_row", {}).get("string_value", 0))
        self.max_rows = int(parameters.get("max_rows", {}).get("string_value", 0))

    def execute(self, requests):
        seconds = self.sleep_seconds
        if self.sleep_seconds_a_row:
            first, _, _ = self.tensors[0]
            tensors = [pb_utils.get_input_tensor_by_name(request, first) for request in requests]
            seconds += self.sleep_seconds_a_row * sum(tensor.shape()[0] for tensor in tensors)
        if seconds:
            time.sleep(seconds)
        return [pb_utils.InferenceResponse(self.answer(request)) for request in requests]

    def answer(self, request):
        answers = []
        for given, answered, data_type in self.tensors:
            tensor = pb_utils.get_input_tensor_by_name(request, given)
            if self.max_rows and tensor.shape()[0] > self.max_rows:
                raise pb_utils.TritonModelException("out of memory")
            if data_type == "TYPE_BF16":  # NumPy has no such type
                answers.append(pb_utils.Tensor.from_dlpack(answered, tensor.to_dlpack()))
            else:
                answers.append(pb_utils.Tensor(answered, tensor.as_numpy()))
        return answers
