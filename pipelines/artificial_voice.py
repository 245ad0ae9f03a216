"""A voice that says nothing, and sounds beside it: audio for the pipeline of voice activity.

A syllable is a hiss, then a vowel: pulses at the pitch of a voice, through a resonance for each of its
formants. That is what a detector of speech listens for.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Audio = npt.NDArray[np.float32]
_Samples = npt.NDArray[np.float64]

SAMPLE_RATE = 16_000

# Frequencies and bandwidths of resonances, in Hz: the vowels' own (of men, by Peterson and Barney), and
# what all vowels share.
_FORMANTS = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}
_BANDWIDTHS = (80, 90, 120)
_FOURTH_FORMANT, _LARYNX = (3500, 200), (0, 100)


def voice(seconds: float, *, pitch: float = 120.0, seed: int = 0) -> Audio:
    """Somebody who talks without a pause, at about ``pitch`` Hz; of shape [samples], between -1 and 1."""
    random = np.random.default_rng(seed)
    length = round(seconds * SAMPLE_RATE)
    syllables: list[_Samples] = []
    while sum(map(len, syllables)) < length:
        vowel = random.choice(list(_FORMANTS))
        syllables.append(_hiss(0.06, random))
        syllables.append(_vowel(vowel, pitch * random.uniform(0.9, 1.15), random.uniform(0.12, 0.22)))
        syllables.append(np.zeros(SAMPLE_RATE // 50))
    return (0.4 * np.concatenate(syllables)[:length]).astype(np.float32)


def silence(seconds: float) -> Audio:
    """Nothing at all."""
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def noise(seconds: float, *, loudness: float = 0.05, seed: int = 0) -> Audio:
    """White noise, as of rain or a fan."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))
    return (loudness * samples).astype(np.float32)


def tones(seconds: float, *frequencies: float) -> Audio:
    """A chord of pure tones, as of a telephone that rings."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    chord = sum((np.sin(2 * np.pi * frequency * time) for frequency in frequencies), np.zeros_like(time))
    return (0.3 * chord / len(frequencies)).astype(np.float32)


def _hiss(seconds: float, random: np.random.Generator) -> _Samples:
    samples: _Samples = np.diff(random.standard_normal(round(seconds * SAMPLE_RATE)), prepend=0.0)
    samples *= np.hanning(len(samples)) * 0.24 / np.abs(samples).max()
    return samples


def _vowel(name: str, pitch: float, seconds: float) -> _Samples:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    falling = pitch * (1.05 - 0.15 * time / seconds)
    samples: _Samples = np.diff(np.floor(np.cumsum(falling / SAMPLE_RATE)), prepend=0.0)
    for frequency, bandwidth in (
        _LARYNX,
        *zip(_FORMANTS[name], _BANDWIDTHS, strict=True),
        _FOURTH_FORMANT,
    ):
        samples = _resonance(samples, frequency, bandwidth)
    samples = np.diff(samples, prepend=0.0)
    swell_and_fade = np.minimum(1, np.minimum(time / 0.03, (seconds - time) / 0.06))
    samples *= swell_and_fade / np.abs(samples).max()
    return samples


def _resonance(samples: _Samples, frequency: float, bandwidth: float) -> _Samples:
    """A resonator of two poles."""
    radius = math.exp(-math.pi * bandwidth / SAMPLE_RATE)
    first, second = 2 * radius * math.cos(2 * math.pi * frequency / SAMPLE_RATE), -radius * radius
    gain = 1 - first - second
    filtered = np.empty_like(samples)
    before = long_before = 0.0
    for index, sample in enumerate(samples.tolist()):
        before, long_before = gain * sample + first * before + second * long_before, before
        filtered[index] = before
    return filtered
