"""WordLlama's static embeddings: the mean of a text's token vectors.

Takes texts (``text``, BYTES) or token ids with their mask (``input_ids``, ``attention_mask``), whichever the
configuration names. `tests.support.wordllama` lays ``vectors.npy``, ``tokenizer.json`` and its tokenizer
beside this file.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from llama_tokenizer import LlamaTokenizer


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        self.takes_text = config["input"][0]["name"] == "text"
        self.tokenizer = LlamaTokenizer(folder / "tokenizer.json") if self.takes_text else None
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        def array(name):
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

        if self.takes_text:
            try:
                texts = [text.decode() for text in array("text")[:, 0]]
            except UnicodeDecodeError as error:
                return pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(
                        f"text is not UTF-8: {error}", pb_utils.TritonError.INVALID_ARG
                    )
                )
            tokens = self.tokenizer(texts)
        else:
            tokens = {name: array(name) for name in ("input_ids", "attention_mask")}
        mask = np.asarray(tokens["attention_mask"], np.float32)[:, :, np.newaxis]
        summed = (self.vectors[np.asarray(tokens["input_ids"])] * mask).sum(axis=1)
        means = summed / np.maximum(mask.sum(axis=1), 1)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embedding", means.astype(np.float32))])
