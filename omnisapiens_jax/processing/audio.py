"""From a waveform to what the audio encoder takes: log-mel frames, cut into chunks, and the pairs of states that become tokens.

The log-mel equals WhisperFeatureExtractor's (128 bins, 300 s padding) without computing those 300 s.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from omnisapiens_jax.models.config import AudioConfig

SAMPLE_RATE = 16_000
HOP = 160
WINDOW = 400
MAX_SAMPLES = 300 * SAMPLE_RATE
SILENCE = -1.5  # log-mel of digital silence


@dataclasses.dataclass(frozen=True)
class AudioLayout:
    """The clips of one row: chunks `[A, C, mels]` float32, valid frames `[A]` int32, pooled pairs `[Na, 2]` int32, tokens of each clip."""

    chunks: np.ndarray
    frames: np.ndarray
    pairs: np.ndarray
    clip_tokens: tuple[int, ...]


def mel_frames(samples: int) -> int:
    """Valid mel frames of a clip of so many 16 kHz samples."""
    return -(-min(samples, MAX_SAMPLES) // HOP)


def audio_token_count(frames: int) -> int:
    """Decoder tokens of a clip of so many mel frames: 25 a second; 0 for two frames or fewer."""
    return max(((frames - 1) // 2 + 1 - 2) // 2 + 1, 0)


def log_mel(waveform: np.ndarray, num_mel_bins: int = 128) -> np.ndarray:
    """Log-mel `[frames, mels]` float32 of a mono 16 kHz `waveform` `[samples]`; `frames = ceil(samples / 160)`."""
    waveform = np.asarray(waveform, np.float64)[:MAX_SAMPLES]
    frames = mel_frames(len(waveform))
    # The original pads to 300 s before framing, so a clip's end sees zeros and its beginning its own reflection. Frames past the last
    # valid one that still touch the clip count in the maximum below; the rest is silence.
    touched = min(-(-(len(waveform) + WINDOW // 2) // HOP), MAX_SAMPLES // HOP)
    padded = np.concatenate([waveform, np.zeros(touched * HOP + WINDOW - len(waveform))])
    padded = np.concatenate([padded[WINDOW // 2 : 0 : -1], padded])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:touched]
    power = np.abs(np.fft.rfft(windows * _hann(), axis=-1)) ** 2
    bins, weights = _mel_triangles(num_mel_bins)
    logs = np.log10(np.maximum(np.einsum("fmk,mk->fm", power[:, bins], weights), 1e-10))
    logs = np.maximum(logs, logs.max() - 8.0)
    return ((logs[:frames] + 4.0) / 4.0).astype(np.float32)


def layout_audio(mels: list[np.ndarray], config: AudioConfig) -> AudioLayout:
    """Cuts the log-mels (each `[frames, mels]`) of a row's clips into chunks and pairs the encoder states that are pooled into one token.

    A pair is two flat indices `chunk * config.chunk_tokens + position`. Pairs never cross clips; they straddle chunks when a chunk has an
    odd number of states.
    """
    size, states = config.chunk_frames, config.chunk_tokens
    chunks, frames, pairs = [], [], []
    for mel in mels:
        count = -(-len(mel) // size)
        block = np.zeros((count * size, config.num_mel_bins), np.float32)
        block[: len(mel)] = mel
        lengths = np.minimum(len(mel) - np.arange(count) * size, size)
        valid = np.arange(states) < ((lengths - 1) // 2 + 1)[:, None]
        flat = np.flatnonzero(valid) + sum(map(len, frames)) * states
        chunks.append(block.reshape(count, size, -1))
        frames.append(lengths)
        pairs.append(flat[: len(flat) // 2 * 2].reshape(-1, 2))
    return AudioLayout(
        chunks=np.concatenate([np.zeros((0, size, config.num_mel_bins), np.float32), *chunks]),
        frames=np.concatenate([np.zeros(0, np.int32), *frames]).astype(np.int32),
        pairs=np.concatenate([np.zeros((0, 2), np.int32), *pairs]).astype(np.int32),
        clip_tokens=tuple(len(p) for p in pairs),
    )


@functools.cache
def _hann() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)  # periodic


@functools.cache
def _mel_triangles(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The Fourier bins `[count, widest]` under each mel triangle and their weights, zero where a triangle is narrower.

    Slaney scale (Auditory Toolbox, 1998) from 0 to 8000 Hz, each triangle of unit area. A triangle covers nine bins at most, so that
    gathering them beats a product with the full matrix, whose BLAS threads also get into the way of other workers.
    """
    log_step = np.log(6.4) / 27.0
    top = 15.0 + np.log(SAMPLE_RATE / 2 / 1000.0) / log_step
    mels = np.linspace(0.0, top, count + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp(log_step * (mels - 15.0)))
    distance = edges[:, None] - np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    widths = np.diff(edges)[:, None]
    triangles = np.maximum(0.0, np.minimum(-distance[:-2] / widths[:-1], distance[2:] / widths[1:]))
    triangles *= 2.0 / (edges[2:] - edges[:-2])[:, None]
    covered = triangles > 0
    bins = covered.argmax(axis=1)[:, None] + np.arange(covered.sum(axis=1).max())
    bins = np.minimum(bins, triangles.shape[1] - 1)
    bins_are_own = np.diff(bins, axis=1, prepend=-1) > 0  # the last bin may now stand there more than once
    return bins, np.take_along_axis(triangles, bins, axis=1) * bins_are_own
