"""Names the type of a file by its content: the ONNX model of Google's Magika, which its package brings.

The model sees the first and the last bytes that are not white space, taken from a block at each end.
"""

import json
import pathlib
from importlib.util import find_spec

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        package = pathlib.Path(find_spec("magika").origin).parent
        (folder,) = (package / "models").glob("standard_*")
        config = json.loads((folder / "config.min.json").read_text())
        self.types = np.array([name.encode() for name in config["target_labels_space"]], object)
        self.block_bytes = config["block_size"]
        self.beginning, self.end = config["beg_size"], config["end_size"]
        self.nothing = config["padding_token"]
        # One thread: the instances of this model are what runs in parallel.
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        contents = pb_utils.get_input_tensor_by_name(request, "content").as_numpy()[:, 0]
        (scores,) = self.session.run(
            ["target_label"], {"bytes": np.stack(list(map(self.features, contents)))}
        )
        best = scores.argmax(axis=1)[:, np.newaxis]
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("type", self.types[best]),
                pb_utils.Tensor("score", np.take_along_axis(scores, best, axis=1)),
            ]
        )

    def features(self, content):
        features = np.full(self.beginning + self.end, self.nothing, np.int32)
        first = content[: self.block_bytes].lstrip()[: self.beginning]
        last = content[-self.block_bytes :].rstrip()[-self.end :]
        features[: len(first)] = np.frombuffer(first, np.uint8)
        features[len(features) - len(last) :] = np.frombuffer(last, np.uint8)
        return features
