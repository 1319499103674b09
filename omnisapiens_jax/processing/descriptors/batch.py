"""Descriptors as a model takes them: pooled vectors and, for attention, sequences of frames with their times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from omnisapiens_jax.processing.descriptors.read import AUDIO_WIDTH, FRAME_WIDTH, LOW_LEVEL_WIDTH, VIDEO_WIDTH, Descriptor

_LEAST_NORM = 1e-6


@dataclasses.dataclass(frozen=True)
class DescriptorConfig:
    """What is taken from descriptors.

    Attributes:
      landmarks: the most frames of landmarks of a sample; of longer sequences as many, evenly spread in time. 0 = no sequences.
      low_level: the most windows of low-level descriptors, likewise.
      trailing_pad: pools clips without a face as the published code does, see `read_video_descriptor`.
    """

    landmarks: int = 0
    low_level: int = 0
    trailing_pad: bool = False

    def __post_init__(self) -> None:
        if self.landmarks < 0 or self.low_level < 0:
            raise ValueError(f"{self.landmarks} frames of landmarks and {self.low_level} windows: neither can be negative")

    @property
    def sequences(self) -> dict[str, tuple[int, int]]:
        """(The most frames, width) of every sequence asked for."""
        known = {"landmarks": (self.landmarks, FRAME_WIDTH), "low_level": (self.low_level, LOW_LEVEL_WIDTH)}
        return {name: sizes for name, sizes in known.items() if sizes[0]}


def describe(video: Descriptor | None, audio: Descriptor | None, config: DescriptorConfig) -> dict[str, np.ndarray]:
    """What a sample's descriptors give, unpadded: the keys of `collate_descriptors` but the masks.

    The functionals of a sound are divided by their length (at least 1e-6), as the published adapters take them (reference 4.4).
    """
    found: dict[str, np.ndarray] = {}
    for name, width, descriptor in (("video", VIDEO_WIDTH, video), ("audio", AUDIO_WIDTH, audio)):
        pooled = np.zeros(width, np.float32) if descriptor is None else descriptor.pooled
        if name == "audio":
            pooled = (pooled / max(float(np.linalg.norm(pooled.astype(np.float64))), _LEAST_NORM)).astype(np.float32)
        found |= {f"{name}_descriptor": pooled, f"{name}_present": np.asarray(descriptor is not None)}
    for name, (most, width) in config.sequences.items():
        descriptor = video if name == "landmarks" else audio
        if descriptor is None:
            frames, times = np.zeros((0, width), np.float32), np.zeros(0, np.float32)
        else:
            kept = spread(descriptor.times, most)
            frames, times = descriptor.frames[kept], descriptor.times[kept]
        found |= {name: frames, f"{name}_times": times}
    return found


def spread(times: np.ndarray, most: int) -> np.ndarray:
    """Places of at most `most` of the rising `times` `[T]`: those next to instants that are evenly spread from the first to the last."""
    if len(times) <= most:
        return np.arange(len(times))
    instants = np.linspace(times[0], times[-1], most)
    after = np.clip(np.searchsorted(times, instants), 1, len(times) - 1)
    return np.unique(after - (instants - times[after - 1] < times[after] - instants))


def collate_descriptors(rows: Sequence[Mapping[str, np.ndarray] | None], config: DescriptorConfig) -> dict[str, np.ndarray]:
    """A batch of what `describe` gives, None for a row without anything.

    Returns: `video_descriptor [B, 3318]`, `audio_descriptor [B, 6373]` float32, `video_present` and `audio_present` `[B]` bool; and for
    every sequence asked for, of static width N, `landmarks [B, N, 1659]` or `low_level [B, N, 65]` float32, `NAME_times [B, N]` float32
    seconds and `NAME_mask [B, N]` bool. What a row has not is zero, and masked.
    """
    count = len(rows)
    batch: dict[str, np.ndarray] = {}
    for name, width in (("video", VIDEO_WIDTH), ("audio", AUDIO_WIDTH)):
        batch |= {f"{name}_descriptor": np.zeros((count, width), np.float32), f"{name}_present": np.zeros(count, bool)}
    for name, (most, width) in config.sequences.items():
        batch |= {name: np.zeros((count, most, width), np.float32), f"{name}_times": np.zeros((count, most), np.float32)}
        batch[f"{name}_mask"] = np.zeros((count, most), bool)
    for i, row in enumerate(rows):
        if row is None:
            continue
        for name in ("video_descriptor", "video_present", "audio_descriptor", "audio_present"):
            batch[name][i] = row[name]
        for name in config.sequences:
            length = len(row[name])
            batch[name][i, :length], batch[f"{name}_times"][i, :length], batch[f"{name}_mask"][i, :length] = (
                row[name],
                row[f"{name}_times"],
                True,
            )
    return batch
