"""Functions served by PyTriton's own binding; runs in PyTriton's own Python. ``pytriton_server.py PORT``"""

import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


@batch
def double(x):
    if (x < 0).any():
        raise ValueError(f"negative numbers are not taken: {x.min()}")
    return {"y": x * 2}


@batch
def root(x):
    with np.errstate(invalid="ignore"):
        return {"y": np.sqrt(x)}


@batch
def half(x):
    return {"y": x / np.float16(2)}


@batch
def echo(x):
    return {"y": x}


@batch
def shout(text):
    return {"loud": np.char.upper(text.astype(np.bytes_)).astype(np.object_)}


@batch
def add_if_given(x, added=None):
    return {"y": x if added is None else x + added}


def vector(name, datatype=np.float32, size=4, optional=False):
    return Tensor(name=name, dtype=datatype, shape=(size,), optional=optional)


def serve(port):
    config = TritonConfig(
        http_address="127.0.0.1", http_port=port, allow_grpc=False, allow_metrics=False, exit_timeout_secs=1
    )
    with Triton(config=config) as triton:
        batched = ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=500))
        for name, function, inputs, outputs in (
            ("double", double, [vector("x")], [vector("y")]),
            ("root", root, [vector("x")], [vector("y")]),
            ("half", half, [vector("x", np.float16)], [vector("y", np.float16)]),
            ("echo", echo, [vector("x", size=1)], [vector("y", size=1)]),
            ("shout", shout, [vector("text", np.bytes_, 1)], [vector("loud", np.bytes_, 1)]),
            ("add_if_given", add_if_given, [vector("x"), vector("added", optional=True)], [vector("y")]),
        ):
            triton.bind(name, infer_func=function, inputs=inputs, outputs=outputs, config=batched)
        triton.serve()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
