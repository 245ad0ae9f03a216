"""Find where somebody speaks in recordings: a model that remembers what it has heard of each.

    python -m pipelines.voice_activity --files 'gs://bucket/calls/*.wav' --endpoint http://triton:8000

The model is Silero VAD, in ``pipelines/model_repository_voice_activity``; without ``--endpoint`` it is served
on this machine. Without ``--files`` (WAV of 16 kHz, 16 bit, one channel) the recordings are made here, of an
artificial voice, noise and tones. A line of the output is a recording, and from which second to which
somebody speaks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import wave
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.io import fileio
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from beam_triton import TritonSequenceInference
from beam_triton.testing import LocalTriton
from pipelines.artificial_voice import SAMPLE_RATE, Audio, noise, silence, tones, voice

MODEL_REPOSITORY = Path(__file__).resolve().parent / "model_repository_voice_activity"
PACKAGES = (MODEL_REPOSITORY / "silero_vad" / "requirements.txt").read_text().split()

# What the model takes at a time, 32 ms.
CHUNK_SAMPLES = 512
CHUNK_MICROSECONDS = CHUNK_SAMPLES * 1_000_000 // SAMPLE_RATE

# As Silero has them: speech ends at a lower probability than it begins, short pauses do not end it.
SPEECH_BEGINS, SPEECH_GOES_ON = 0.5, 0.35
SHORTEST_PAUSE_SECONDS, SHORTEST_SPEECH_SECONDS = 0.1, 0.25


def made_recordings() -> dict[str, Audio]:
    """Recordings by name: two with a voice, two with none."""
    hum = noise(7, loudness=0.002)
    return {
        "a question": np.concatenate([silence(1), voice(2, seed=1), silence(1)]) + hum[: 4 * SAMPLE_RATE],
        "a talk": np.concatenate(
            [silence(1), voice(1.5, pitch=190, seed=2), silence(1), voice(2.5, pitch=190, seed=3), silence(1)]
        )
        + hum,
        "rain": noise(3, seed=4),
        "a telephone": np.concatenate([tones(1, 440, 480), silence(1), tones(1, 440, 480)]),
    }


def read_wave(file: fileio.ReadableFile) -> tuple[str, Audio]:
    """A file's path and its samples, between -1 and 1."""
    with file.open() as opened, wave.open(opened) as recording:
        form = recording.getframerate(), recording.getsampwidth(), recording.getnchannels()
        if form != (SAMPLE_RATE, 2, 1):
            raise ValueError(
                f"{file.metadata.path} has {form[0]} Hz, {8 * form[1]} bit, {form[2]} channels: "
                f"convert it to {SAMPLE_RATE} Hz, 16 bit, one channel"
            )
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
    return str(file.metadata.path), samples.astype(np.float32) / np.float32(32768)


def chunks(recording: tuple[str, Audio]) -> Iterator[TimestampedValue[Any]]:
    """A recording as ``(name, {"audio": chunk})``, the last one filled up with silence, in no order at all.

    A chunk's timestamp is where it begins in the recording. In such an order a broker or a shuffle may bring
    them.
    """
    name, samples = recording
    filled = np.pad(samples, (0, -len(samples) % CHUNK_SAMPLES)).reshape(-1, CHUNK_SAMPLES)
    for index in random.Random(name).sample(range(len(filled)), len(filled)):
        timestamp = Timestamp(micros=index * CHUNK_MICROSECONDS)
        yield TimestampedValue((name, {"audio": filled[index]}), timestamp)


def with_time(
    keyed: tuple[str, PredictionResult], timestamp: Any = beam.DoFn.TimestampParam
) -> tuple[str, tuple[int, float]]:
    """A result as ``(name, (microseconds, probability))``."""
    name, result = keyed
    answer: Any = result.inference
    return name, (timestamp.micros, float(answer["speech_probability"][0]))


def speech(probabilities: Iterable[tuple[int, float]]) -> list[tuple[float, float]]:
    """The seconds from and to which somebody speaks, of ``(microseconds, probability)`` in any order."""
    found: list[tuple[float, float]] = []
    begin: int | None = None
    end = 0
    for start, probability in [*sorted(probabilities), (sys.maxsize, 0.0)]:
        if probability >= (SPEECH_BEGINS if begin is None else SPEECH_GOES_ON):
            begin = start if begin is None else begin
            end = start + CHUNK_MICROSECONDS
        elif begin is not None and start + CHUNK_MICROSECONDS - end >= SHORTEST_PAUSE_SECONDS * 1e6:
            if end - begin >= SHORTEST_SPEECH_SECONDS * 1e6:
                found.append((begin / 1e6, end / 1e6))
            begin = None
    return found


def to_line(name: str, probabilities: Iterable[tuple[int, float]]) -> str:
    """A recording's result as a line of JSON."""
    return json.dumps({"recording": name, "speech": speech(probabilities)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; further arguments are Beam's. The exit code."""
    parser = argparse.ArgumentParser(prog="voice_activity", description=__doc__.partition("\n")[0])
    parser.add_argument("--files", help="pattern of WAV files; without it, recordings are made here")
    parser.add_argument("--output", help="JSON Lines to write; without it, they are printed")
    parser.add_argument(
        "--endpoint", help="URL of a Triton that has the model; without it one is started here"
    )
    given, beam_arguments = parser.parse_known_args(arguments)
    with ExitStack() as stack:
        endpoint = given.endpoint
        if endpoint is None:
            endpoint = stack.enter_context(LocalTriton(MODEL_REPOSITORY, packages=PACKAGES)).endpoint
        with beam.Pipeline(options=PipelineOptions(beam_arguments)) as p:
            if given.files is None:
                recordings = p | beam.Create(made_recordings().items())
            else:
                recordings = (
                    p
                    | fileio.MatchFiles(given.files)
                    | fileio.ReadMatches(compression="uncompressed")
                    | beam.Map(read_wave)
                )
            lines = (
                recordings
                | beam.FlatMap(chunks)
                | TritonSequenceInference(endpoint, "silero_vad")
                | beam.Map(with_time)
                | beam.GroupByKey()
                | beam.MapTuple(to_line)
            )
            if given.output is None:
                _ = lines | beam.Map(print)
            else:
                _ = lines | beam.io.WriteToText(given.output, shard_name_template="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
