"""Speech for the miniature atlas: eSpeak NG through ctypes, and prosody by a few lines of numpy.

eSpeak keeps hidden state between utterances (phases, random numbers), so one sentence would sound a little different after
another. The library is therefore loaded, seeded and unloaded for every utterance: six milliseconds, and the same bytes each time.
"""

from __future__ import annotations

import _ctypes
import ctypes
import dataclasses

import numpy as np
import soxr

try:
    import espeakng_loader
except ModuleNotFoundError as reason:
    raise ModuleNotFoundError(
        "the miniature atlas is spoken by eSpeak NG, which is not installed: pip install 'omnisapiens-jax[atlas]', or name an atlas of "
        "your own with --config.atlas.path=DIR"
    ) from reason

RATE = 16_000  # Hz, of everything this module returns
LONGEST = 1.7  # seconds; a longer utterance is spoken again, faster

_SYNCHRONOUS, _CHARS_UTF8, _POS_CHARACTER = 2, 1, 1  # espeak's speak_lib.h
_PARAM_RATE, _PARAM_PITCH, _PARAM_RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclasses.dataclass(frozen=True)
class Voice:
    """One speaker: an espeak voice with variant (`en+f3`) and a vocal-tract factor (above 1 is smaller and higher)."""

    name: str
    tract: float


@dataclasses.dataclass(frozen=True)
class Prosody:
    """How a feeling sounds, relative to the speaker's neutral voice."""

    rate: float  # of speaking, times neutral
    pitch: int  # espeak pitch, 50 is the voice's own
    range: int  # espeak pitch range, 0 is monotone
    gain: float  # dB
    tilt: float  # dB per octave around 1 kHz
    tremolo: tuple[float, float] = (0.0, 0.0)  # Hz, depth 0..1
    drive: float = 0.0  # saturation, 0 is clean
    pause: float = 0.0  # seconds, at the comma


PROSODY: dict[str, Prosody] = {
    "neutral": Prosody(1.0, 50, 40, -2.0, 0.0),
    "happy": Prosody(1.1, 74, 99, 1.0, 2.0),
    "anger": Prosody(1.15, 56, 75, 7.0, 4.0, drive=4.0),
    "fear": Prosody(1.3, 98, 10, -3.0, 1.0, tremolo=(9.0, 0.75)),
    "sad": Prosody(0.75, 18, 6, -10.0, -5.0, pause=0.25),
    "disgust": Prosody(0.85, 32, 60, -1.0, -1.5, tremolo=(27.0, 0.8)),
    "flat": Prosody(0.85, 36, 0, -4.0, -2.0),
}
_NEUTRAL_WPM = 215


def speak(text: str, voice: Voice, style: str, rng: np.random.Generator, laugh: str = "") -> np.ndarray:
    """Says `text` in a voice and a style of `PROSODY`; `laugh` puts a laugh "before" or "after" the words.

    Returns mono float32 `[samples]` at 16 kHz, within -1..1. The same arguments and generator state give the same samples.
    """
    prosody = PROSODY[style]
    jitter = rng.uniform(0.93, 1.07, 3)
    pitch = int(np.clip(round(prosody.pitch * jitter[0]), 0, 99))
    spread = int(np.clip(round(prosody.range * jitter[1]), 0, 99))
    wpm = _NEUTRAL_WPM * prosody.rate * jitter[2]
    seed = int(rng.integers(1, 2**31 - 1))
    longest = LONGEST - prosody.pause
    wave = _synthesise(text, voice, wpm, pitch, spread, seed)
    if len(wave) > longest * RATE:
        wave = _synthesise(text, voice, min(wpm * len(wave) / (longest * RATE), 430), pitch, spread, seed)
    if prosody.pause and "," in text:
        wave = _insert_pause(wave, text.index(",") / len(text), prosody.pause * jitter[1])
    wave = _shape(wave, prosody, rng)
    if laugh:
        burst = _laugh(120 * voice.tract**4 * (1.8 if "+f" in voice.name else 1.0), rng)
        gap = np.zeros(int(0.08 * RATE), np.float32)
        wave = np.concatenate([wave, gap, burst] if laugh == "after" else [burst, gap, wave])
    wave = np.concatenate([np.zeros(int(rng.uniform(0.0, 0.05) * RATE), np.float32), wave])
    return np.clip(wave + _hiss(len(wave), rng), -1, 1).astype(np.float32)


def room(rng: np.random.Generator) -> np.ndarray:
    """A quiet room where nobody speaks, about as long as a sentence: mono float32 `[samples]` at 16 kHz."""
    return _hiss(int(rng.uniform(1.0, LONGEST) * RATE), rng).astype(np.float32)


def envelope(wave: np.ndarray, frames: int) -> np.ndarray:
    """Loudness `[frames]` in 0..1 of equal slices of a wave: how far the drawn mouth opens."""
    power = np.array([np.sqrt(np.mean(piece**2)) for piece in np.array_split(wave, frames)])
    return np.clip(power / (power.max() + 1e-6), 0, 1)


def _synthesise(text: str, voice: Voice, wpm: float, pitch: int, spread: int, seed: int) -> np.ndarray:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    pieces: list[np.ndarray] = []

    def receive(wave: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if wave and count > 0:
            pieces.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    callback = _CALLBACK(receive)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG did not start with the data at {espeakng_loader.get_data_path()}: reinstall espeakng-loader")
    try:
        library.espeak_SetSynthCallback(callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        if library.espeak_SetVoiceByName(voice.name.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice.name!r}")
        # the tract factor also speeds the wave up: ask for less speed
        for parameter, value in ((_PARAM_RATE, round(wpm / voice.tract)), (_PARAM_PITCH, pitch), (_PARAM_RANGE, spread)):
            library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        library.espeak_Synth(encoded, len(encoded), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)
    wave = np.concatenate(pieces).astype(np.float32) / 32768
    wave = soxr.resample(wave, rate * voice.tract, RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[loud[0] : loud[-1] + 1]


def _insert_pause(wave: np.ndarray, fraction: float, seconds: float) -> np.ndarray:
    """Silence at the quietest moment near `fraction` of the wave (espeak reports no word times in this mode)."""
    width = RATE // 50
    loudness = np.convolve(wave**2, np.ones(width) / width, mode="same")
    low, high = (int(np.clip(fraction + d, 0.05, 0.9) * len(wave)) for d in (-0.15, 0.2))
    cut = low + int(np.argmin(loudness[low : high + 1]))
    return np.concatenate([wave[:cut], np.zeros(int(seconds * RATE), np.float32), wave[cut:]])


def _shape(wave: np.ndarray, prosody: Prosody, rng: np.random.Generator) -> np.ndarray:
    """Spectral tilt, saturation, tremolo and gain, in this order; the level before gain is -22 dBFS RMS."""
    spectrum = np.fft.rfft(wave)
    octaves = np.log2(np.clip(np.fft.rfftfreq(len(wave), 1 / RATE), 125, 8000) / 1000)
    wave = np.fft.irfft(spectrum * 10 ** (prosody.tilt * octaves / 20), len(wave))
    wave = wave / (np.sqrt(np.mean(wave**2)) + 1e-6)
    if prosody.drive:
        wave = np.tanh(wave * prosody.drive)
        wave = wave / np.sqrt(np.mean(wave**2))
    frequency, depth = prosody.tremolo
    if depth:
        phase = 2 * np.pi * (frequency * rng.uniform(0.9, 1.1) * np.arange(len(wave)) / RATE + rng.uniform())
        wave = wave * (1 - depth * (0.5 + 0.5 * np.sin(phase)))
    level = -22 + prosody.gain + rng.uniform(-1.5, 1.5)
    return (wave * 10 ** (level / 20)).astype(np.float32)


def _hiss(samples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 10 ** (rng.uniform(-64, -50) / 20), samples)


def _laugh(pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Three voiced bursts at about 6 Hz with falling pitch and loudness, half a second together."""
    bursts = []
    for k in range(3):
        length = int(RATE * 0.15 * rng.uniform(0.95, 1.05))
        time = np.arange(length) / RATE
        tone = sum(np.sin(2 * np.pi * h * pitch * (1.5 - 0.12 * k) * time) / h for h in range(1, 9))
        breath = rng.normal(0, 0.4, length)
        bursts.append((tone + breath) * np.exp(-time * 18) * (1 - np.exp(-time * 300)) * (1 - 0.2 * k))
    return (0.16 * np.concatenate(bursts)).astype(np.float32)
