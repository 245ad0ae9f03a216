"""KServe's Python server with custom models; runs in KServe's own Python. ``kserve_server.py PORT``"""

import sys

import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelServer
from kserve.errors import InvalidInput


class Function(Model):
    """One input ``x`` and one output ``y`` of this datatype and of shape [any, ``size``]."""

    def __init__(self, name, function, datatype="FP32", size=4, named=True):
        super().__init__(name)
        self.function = function
        self.datatype = datatype
        self.size = size
        self.named = named
        self.ready = True

    def get_input_types(self):
        return self.types("x")

    def get_output_types(self):
        return self.types("y")

    def types(self, name):
        if not self.named:
            return []
        return [{"name": name, "datatype": self.datatype, "shape": [-1, self.size]}]

    def predict(self, payload, headers=None, response_headers=None):
        result = self.function(payload.inputs[0].as_numpy())
        output = InferOutput("y", list(result.shape), self.datatype)
        # KServe itself has no JSON for FP16.
        output.set_data_from_numpy(result, binary_data=self.datatype == "FP16")
        return InferResponse(payload.id, self.name, [output], requested_outputs=payload.request_outputs)


def double(x):
    if (x < 0).any():
        raise InvalidInput(f"negative numbers are not taken: {x.min()}")
    return (x * 2).astype(np.float32)


def root(x):
    with np.errstate(invalid="ignore"):
        return np.sqrt(x)


def shout(words):
    # Text from JSON, bytes from a binary request.
    text = [word if isinstance(word, str) else word.decode() for word in words.ravel()]
    return np.array([word.upper().encode() for word in text], np.object_).reshape(words.shape)


if __name__ == "__main__":
    models = [
        Function("double", double),
        Function("unnamed", double, named=False),
        Function("root", root),
        Function("half", lambda x: x / np.float16(2), datatype="FP16"),
        Function("echo", lambda x: x, size=1),
        Function("shout", shout, datatype="BYTES", size=1),
    ]
    ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1).start(models)
