"""Custom runtimes of MLServer, by the names of their models; runs in MLServer's own Python."""

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceResponse


class Runtime(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        given = payload.inputs[0]
        if self.name == "shout":
            words = [word.upper() for word in StringCodec.decode_input(given)]
            outputs = [StringCodec.encode_output("loud", words)]
        else:
            name, function = FUNCTIONS[self.name]
            outputs = [NumpyCodec.encode_output(name, function(NumpyCodec.decode_input(given)))]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)


def double(x):
    if (x < 0).any():
        raise InferenceError(f"negative numbers are not taken: {x.min()}")
    return x * 2


def root(x):
    with np.errstate(invalid="ignore"):
        return np.sqrt(x)


FUNCTIONS = {
    "double": ("y", double),
    "unnamed": ("y", double),
    "root": ("y", root),
    "half": ("y", lambda x: x / np.float16(2)),
    "echo": ("y", lambda x: x),
    "total": ("total", lambda x: x.sum().reshape(1)),
}
