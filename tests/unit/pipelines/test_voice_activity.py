"""What the pipeline of voice activity does before and after the model."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from apache_beam.io import fileio
from apache_beam.io.filesystem import FileMetadata

from pipelines import voice_activity
from pipelines.artificial_voice import voice
from pipelines.voice_activity import CHUNK_MICROSECONDS, CHUNK_SAMPLES, chunks, read_wave, speech


def _at_chunks(*probabilities: float) -> list[tuple[int, float]]:
    return [(index * CHUNK_MICROSECONDS, probability) for index, probability in enumerate(probabilities)]


def test_speech_goes_on_at_a_lower_probability_than_it_begins() -> None:
    """0.4 is not enough to begin."""
    found = speech(_at_chunks(0.4, 0.4, *[0.9] * 10, *[0.4] * 5, 0.1, 0.1, 0.1, 0.1, 0.4))
    assert found == [(0.064, 0.544)]


def test_short_pauses_do_not_end_speech_and_clicks_are_none() -> None:
    """Pauses of 96 and of 128 ms; speech of 224 and of 256 ms."""
    first, second = [0.9] * 8, [0.9] * 7
    assert len(speech(_at_chunks(*first, 0, 0, 0, *first))) == 1
    assert len(speech(_at_chunks(*first, 0, 0, 0, 0, *first))) == 2
    assert speech(_at_chunks(*first, 0, 0, 0, 0, *second)) == [(0.0, 0.256)]


def test_speech_at_the_end_of_a_recording_is_found_in_results_of_any_order() -> None:
    """As they come from a GroupByKey."""
    probabilities = _at_chunks(0, 0, *[0.9] * 10)
    assert speech(probabilities[::-1]) == [(0.064, 0.384)]
    assert speech([]) == []


def test_chunks_put_together_by_time_are_the_recording_and_silence() -> None:
    """They come in another order than that of time."""
    samples = voice(1.01)
    found = list(chunks(("name", samples)))
    assert [each.timestamp for each in found] != sorted(each.timestamp for each in found)
    in_order = sorted(found, key=lambda each: each.timestamp)
    assert [each.timestamp.micros for each in in_order] == [n * CHUNK_MICROSECONDS for n in range(len(found))]
    joined = np.concatenate([each.value[1]["audio"] for each in in_order])
    assert len(joined) == 32 * CHUNK_SAMPLES
    np.testing.assert_array_equal(joined[: len(samples)], samples)
    assert not joined[len(samples) :].any()


def test_a_file_of_another_rate_is_refused(tmp_path: Path) -> None:
    """The message says what to do."""
    path = tmp_path / "telephone.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0" * 1600)
    readable = fileio.ReadableFile(FileMetadata(str(path), path.stat().st_size))
    with pytest.raises(ValueError, match=r"telephone\.wav has 8000 Hz.*convert it to 16000 Hz"):
        read_wave(readable)


def test_the_made_recordings_are_sound() -> None:
    """Nothing is cut off when it is written as 16 bit."""
    assert all(np.abs(samples).max() < 1 for samples in voice_activity.made_recordings().values())
