"""Acoustic descriptors of the miniature atlas' speech, in the shape of the released ones, by a few lines of numpy.

They are a **stand-in, not ComParE 2016**: a sound is described by 24 features of our own, window by window, and by functionals of these
over the clip. They fill the first places of openSMILE's 65 and 6373; all other places are zero, and no place means what it means there.
"""

from __future__ import annotations

import numpy as np

from omnisapiens_jax.atlas.miniature.speech import RATE
from omnisapiens_jax.processing.descriptors.read import AUDIO_WIDTH, LOW_LEVEL_WIDTH

WINDOW, HOP = 640, 160  # samples: 40 ms, every 10
BANDS = 18  # of even width in octaves
LOW_LEVEL = ("energy", "zero_crossings", "pitch", "voicing", "centroid", "flux", *(f"band_{i}" for i in range(BANDS)))
FUNCTIONALS = ("mean", "deviation", "low", "high", "change", "first_third", "second_third", "last_third")

_KEPT = 4  # of so many windows one is kept in a file, as of the frames of a face
_FLOOR = 1e-5  # of amplitudes: -100 dB
_PITCHES = (60.0, 500.0)  # Hz
_OCTAVE_COST = 0.05  # of the autocorrelation, that a pitch an octave lower must be better
_EDGES = np.geomspace(100.0, 7500.0, BANDS + 1)  # Hz, of the bands


def describe(wave: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a descriptor file, as `processing.descriptors.read` wants them.

    Args:
      wave: mono `[samples]` at 16 kHz, within -1..1; one shorter than a window is padded with silence.

    Returns: `features [1, 6373]`, `low_level [T, 65]` and `times [T]` (seconds, the middle of each window), float32, rounded to three
    decimals; T windows are a fourth of all.
    """
    frames = low_level(wave)
    features = np.zeros((1, AUDIO_WIDTH), np.float32)
    features[0, : len(FUNCTIONALS) * len(LOW_LEVEL)] = functionals(frames).ravel()
    kept = np.arange(0, len(frames), _KEPT)
    padded = np.zeros((len(kept), LOW_LEVEL_WIDTH), np.float32)
    padded[:, : len(LOW_LEVEL)] = frames[kept]
    times = (kept * HOP + WINDOW / 2) / RATE
    return {"features": features.round(3), "low_level": padded.round(3), "times": times.astype(np.float32).round(3)}


def low_level(wave: np.ndarray) -> np.ndarray:
    """Features `[T, 24]` of every window, in the order of `LOW_LEVEL`, each scaled to a few units at most.

    Energy and bands are in 20 dB from -50 dB; zero crossings a millisecond; pitch in octaves from 150 Hz, 0 without voice; voicing is the
    peak of the autocorrelation, 1 of a perfect period; centroid in octaves from 1 kHz; flux is how much the shape of the spectrum moves.
    """
    wave = np.pad(wave, (0, max(0, WINDOW - len(wave)))).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    hann = np.hanning(WINDOW)
    spectrum = np.abs(np.fft.rfft(windows * hann, 2 * WINDOW)) / hann.sum()  # padded, so that no lag wraps around
    hertz = np.fft.rfftfreq(2 * WINDOW, 1 / RATE)
    shape = spectrum / (spectrum.sum(axis=1, keepdims=True) + _FLOOR)
    pitch, voicing = _pitch(spectrum, hann)
    within = [(low <= hertz) & (hertz < high) for low, high in zip(_EDGES, _EDGES[1:], strict=False)]
    columns = {
        "energy": _decibels(np.sqrt(np.mean(windows**2, axis=1))),
        "zero_crossings": np.count_nonzero(np.diff(np.signbit(windows), axis=1), axis=1) / (1000 * WINDOW / RATE),
        "pitch": pitch,
        "voicing": voicing,
        "centroid": np.log2((shape @ hertz + 50.0) / 1000),
        "flux": np.abs(np.diff(shape, axis=0, prepend=shape[:1])).sum(axis=1),
        **{f"band_{i}": _decibels(spectrum[:, band].max(axis=1)) for i, band in enumerate(within)},
    }
    return np.stack([columns[name] for name in LOW_LEVEL], axis=1)


def functionals(frames: np.ndarray) -> np.ndarray:
    """`[8, 24]`: what `FUNCTIONALS` names, of features `[T, 24]`; low and high are the tenth and ninetieth percentile."""
    low, high = np.percentile(frames, (10, 90), axis=0)
    change = np.abs(np.diff(frames, axis=0, prepend=frames[:1])).mean(axis=0)
    thirds = [part.mean(axis=0) if len(part) else frames.mean(axis=0) for part in np.array_split(frames, 3)]
    return np.stack([frames.mean(axis=0), frames.std(axis=0), low, high, change, *thirds])


def _decibels(amplitudes: np.ndarray) -> np.ndarray:
    """In units of 20 dB, 0 at -50 dB."""
    return np.log10(amplitudes + _FLOOR) + 2.5


def _pitch(spectrum: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Octaves above 150 Hz `[T]` where there is a voice, else 0, and the peak of the normalised autocorrelation `[T]`."""
    lags = np.arange(round(RATE / _PITCHES[1]), round(RATE / _PITCHES[0]) + 1)
    own = np.fft.irfft(np.abs(np.fft.rfft(window, 2 * WINDOW)) ** 2)
    found = np.fft.irfft(spectrum**2, axis=1)
    found = (found[:, lags] / (found[:, :1] + _FLOOR**2)) / (own[lags] / own[0])
    best = (found - _OCTAVE_COST * np.log2(lags)).argmax(axis=1)  # two periods are a period as well
    voicing = np.clip(found.max(axis=1), 0, 1)
    return np.where(voicing > 0.5, np.log2(RATE / lags[best] / 150.0), 0.0), voicing
