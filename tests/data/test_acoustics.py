"""The acoustic descriptors of the miniature atlas: what they measure, in the shape in which descriptors are read."""

from __future__ import annotations

import io

import numpy as np
import pytest

from omnisapiens_jax.atlas.miniature import acoustics, speech, words
from omnisapiens_jax.processing.descriptors.read import read_audio_descriptor


def tone(hertz: float, seconds: float = 1.0, amplitude: float = 0.3) -> np.ndarray:
    """Ten harmonics of a voice that holds one note."""
    time = np.arange(round(seconds * speech.RATE)) / speech.RATE
    return amplitude * np.sum([np.sin(2 * np.pi * h * hertz * time) / h for h in range(1, 11)], axis=0) / 2


def of(frames: np.ndarray, name: str) -> np.ndarray:
    return frames[:, acoustics.LOW_LEVEL.index(name)]


def test_they_are_read_as_any_sounds_descriptor() -> None:
    wave = speech.speak("Well, the letter is flat.", words.SPEAKERS["train"][0], "happy", np.random.default_rng(0))
    held = io.BytesIO()
    np.savez_compressed(held, allow_pickle=False, **acoustics.describe(wave))
    found = read_audio_descriptor(held.getvalue())
    assert found is not None and found.pooled.shape == (6373,) and found.frames.shape[1] == 65
    assert len(found.frames) == len(found.times) and (np.diff(found.times) > 0).all() and found.times[-1] < len(wave) / speech.RATE
    used = len(acoustics.LOW_LEVEL) * len(acoustics.FUNCTIONALS)
    assert found.pooled[:used].any() and not found.pooled[used:].any() and not found.frames[:, len(acoustics.LOW_LEVEL) :].any()


@pytest.mark.parametrize("hertz", [90.0, 150.0, 240.0, 400.0])
def test_pitch_and_voice_of_a_held_note(hertz: float) -> None:
    frames = acoustics.low_level(tone(hertz))
    np.testing.assert_allclose(of(frames, "pitch"), np.log2(hertz / 150), atol=0.02)  # half a sample of 40
    assert (of(frames, "voicing") > 0.95).all()


def test_noise_has_no_voice_and_silence_is_finite() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, speech.RATE)
    assert np.mean(of(acoustics.low_level(noise), "pitch") == 0) > 0.95
    for wave in (np.zeros(speech.RATE), np.zeros(10), tone(150, 0.001)):
        described = acoustics.describe(wave)
        assert all(np.isfinite(values).all() for values in described.values()) and len(described["low_level"])


def test_ten_times_louder_is_one_more_and_a_band_is_where_its_tone_is() -> None:
    loud, quiet = acoustics.low_level(tone(150)), acoustics.low_level(tone(150) / 10)
    np.testing.assert_allclose(of(loud, "energy") - of(quiet, "energy"), 1, atol=1e-3)  # the floor of -100 dB
    time = np.arange(speech.RATE) / speech.RATE
    peaks = [acoustics.low_level(np.sin(2 * np.pi * hertz * time))[:, -acoustics.BANDS :].mean(0).argmax() for hertz in (200, 1000, 5000)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_functionals_know_when_a_sound_came() -> None:
    silence = np.zeros(speech.RATE)
    late, early = (acoustics.describe(np.concatenate(parts)) for parts in ((silence, tone(150)), (tone(150), silence)))
    shaped = [found["features"][0, : 8 * len(acoustics.LOW_LEVEL)].reshape(8, -1)[:, 0] for found in (late, early)]
    first, last = acoustics.FUNCTIONALS.index("first_third"), acoustics.FUNCTIONALS.index("last_third")
    assert shaped[0][last] - shaped[0][first] > 2 and shaped[1][first] - shaped[1][last] > 2
