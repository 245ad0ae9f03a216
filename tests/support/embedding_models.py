"""Embedding models that need no hub, for a real Triton.

    write_embedding_models(folder)   every one of them
    wordllama_tokenizer()            the tokenizer of ``wordllama_tokens``

``wordllama`` takes texts, ``wordllama_tokens`` their token ids: WordLlama's static embeddings, whose weights
are in its wheel on PyPI. The wheel's files are data: nothing of it is installed or imported. It is
downloaded once (19 MB). ``color_histogram`` takes RGB images, ``byte_histogram`` files.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beam_triton.server.environment import cache_folder, make_folder
from tests.support.llama_tokenizer import LlamaTokenizer
from tests.support.models import Model, Tensor

DIMENSIONS = 256

# The same wheel whatever this Python is: its vectors and vocabulary are read, not its code.
_WHEEL = "wordllama==0.4.0.post1"
_DOWNLOAD = (
    "download --quiet --no-deps --only-binary=:all: --python-version 3.11 --platform manylinux2014_x86_64"
)
_VECTORS = "wordllama/weights/l2_supercat_256.safetensors"
_TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"

_EMBEDDING = (Tensor("embedding", "FP32", (DIMENSIONS,)),)
_MODELS = (
    Model("wordllama", (Tensor("text", "BYTES", (1,)),), _EMBEDDING, source="wordllama"),
    Model(
        "wordllama_tokens",
        (Tensor("input_ids", "INT64", (-1,)), Tensor("attention_mask", "INT64", (-1,))),
        _EMBEDDING,
        source="wordllama",
    ),
    Model(
        "color_histogram",
        (Tensor("image", "UINT8", (-1, -1, 3)),),
        (Tensor("embedding", "FP32", (64,)),),
        parameters={"function": "color_histogram"},
    ),
    Model(
        "byte_histogram",
        (Tensor("file", "BYTES", (1,)),),
        (Tensor("embedding", "FP32", (256,)),),
        parameters={"function": "byte_histogram"},
    ),
)


def write_embedding_models(repository: Path) -> Path:
    """Write the models into a model repository, and return it."""
    for model in _MODELS:
        model.write(repository)
        if model.source != "wordllama":
            continue
        folder = repository / model.name / "1"
        for file in _files().iterdir():
            (folder / file.name).symlink_to(file)
        shutil.copy(Path(__file__).with_name("llama_tokenizer.py"), folder)
    return repository


def wordllama_tokenizer() -> LlamaTokenizer:
    """The tokenizer of the model, as a user of ``wordllama_tokens`` has it."""
    return LlamaTokenizer(_files() / "tokenizer.json")


def _files() -> Path:
    """The folder with ``vectors.npy`` and ``tokenizer.json``."""
    folder = cache_folder() / _WHEEL.replace("==", "-")
    make_folder(folder, _download, is_usable=Path.exists)
    return folder


def _download(folder: Path) -> None:
    wheels = folder / "wheels"
    subprocess.run([sys.executable, "-m", "pip", *_DOWNLOAD.split(), "--dest", wheels, _WHEEL], check=True)
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        (folder / "tokenizer.json").write_bytes(wheel.read(_TOKENIZER))
        np.save(folder / "vectors.npy", _read_safetensors(wheel.read(_VECTORS)))
    shutil.rmtree(wheels)


def _read_safetensors(data: bytes) -> NDArray[np.float32]:
    """The one tensor of the file: the length of a JSON header, the header, the values."""
    start = 8 + int.from_bytes(data[:8], "little")
    (tensor,) = json.loads(data[8:start]).values()
    assert tensor["dtype"] == "F16"
    return np.frombuffer(data, "<f2", offset=start).astype(np.float32).reshape(-1, DIMENSIONS)
