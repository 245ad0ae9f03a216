"""A decoupled model that tells its prompt word by word, as a language model does token by token.

Request parameters: ``pause_ms`` before each word, ``fail_after`` so many words, ``repeat`` the prompt so
often. Where ``stream`` is false, all of it is one response.
"""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            self._tell(request, request.get_response_sender())

    def _tell(self, request, sender):
        parameters = json.loads(request.parameters())
        prompt = _value(request, "text_input").decode()
        words = prompt.split() * parameters.get("repeat", 1)
        if not _value(request, "stream", True):
            words = [" ".join(words)] if words else []
        for index, word in enumerate(words):
            time.sleep(parameters.get("pause_ms", 0) / 1000)
            if index == parameters.get("fail_after"):
                error = pb_utils.TritonError(f"the story ended at word {index}")
                sender.send(
                    pb_utils.InferenceResponse([], error), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                )
                return
            text = word if index == 0 else f" {word}"
            outputs = [
                pb_utils.Tensor("text_output", np.array([text.encode()], object)),
                pb_utils.Tensor("length", np.array([len(word)], np.int32)),
            ]
            sender.send(pb_utils.InferenceResponse(outputs))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _value(request, name, default=None):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().flat[0]
