"""Returns its first input as its output, in the output's datatype."""

import json

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.given = config["input"][0]["name"]
        self.answered = config["output"][0]["name"]
        self.dtype = pb_utils.triton_string_to_numpy(config["output"][0]["data_type"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        values = pb_utils.get_input_tensor_by_name(request, self.given).as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.answered, values.astype(self.dtype))])
