"""Small models, one function each; the configuration's parameter ``function`` selects it."""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


def sum_and_difference(a, b):
    return {"sum": a + b, "difference": a - b}


def scale(x, factor=None):
    return {"y": x if factor is None else x * factor}


def ragged(values):
    return {"total": values.sum(axis=1, keepdims=True), "doubled": 2 * values}


def attend(input_ids, attention_mask):
    # What is under the mask decides every value of its element, as in a transformer.
    total = (input_ids * attention_mask).sum(axis=1, keepdims=True)
    mean = total / np.maximum(attention_mask.sum(axis=1, keepdims=True), 1)
    return {
        "mean": mean.astype(np.float32),
        "centred": ((input_ids - mean) * attention_mask).astype(np.float32),
        "width": np.full((len(input_ids), 1), input_ids.shape[1], np.int64),
    }


def transpose(x):
    return {"y": np.ascontiguousarray(np.swapaxes(x, -1, -2))}


def classify(x):
    return {"scores": x}


def shout(text):
    # BYTES are raw bytes in the protocol; client and model agree on their meaning.
    lengths = np.frompyfunc(len, 1, 1)(text).astype(np.int64)
    return {"loud": np.frompyfunc(bytes.upper, 1, 1)(text), "length_bytes": lengths}


def sleep(x):
    time.sleep(float(x.max(initial=0)))
    return {"y": x}


def empty(x):
    return {"y": np.empty((len(x), 0), np.float32)}


def zeros(count):
    return {"y": np.zeros((len(count), int(count.max(initial=0))), np.float32)}


def one_row_less(x):
    return {"y": x[:-1]}


def add_one(x):
    return {"y": x + 1}


def two_hundred(x):
    return {"y": np.full_like(x, 200)}


def double(x):
    return {"y": 2 * x}


def color_histogram(image):
    # The share of pixels in each of 4 x 4 x 4 colors.
    colors = (image // 64).astype(np.int64) @ np.array([16, 4, 1])
    counts = [np.bincount(each.ravel(), minlength=64) for each in colors]
    return {"embedding": np.array(counts, np.float32) / colors[0].size}


def byte_histogram(file):
    counts = [np.bincount(np.frombuffer(each, np.uint8), minlength=256) for each in file[:, 0]]
    return {"embedding": np.array(counts, np.float32)}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.function = globals()[config["parameters"]["function"]["string_value"]]
        self.names = [tensor["name"] for tensor in config["input"]]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.names}
        arrays = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        outputs = self.function(**arrays)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])
