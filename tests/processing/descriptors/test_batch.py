"""Descriptors as a batch: lengths, masks, what is kept of a long sequence, and the norm of a sound's functionals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.processing.descriptors.batch import DescriptorConfig, collate_descriptors, describe, spread
from omnisapiens_jax.processing.descriptors.read import Descriptor

CONFIG = DescriptorConfig(landmarks=4, low_level=3)


def descriptor(modality: str, frames: int, seed: int = 0) -> Descriptor:
    random = np.random.default_rng(seed)
    pooled, width = (3318, 1659) if modality == "video" else (6373, 65)
    times = np.arange(frames, dtype=np.float32) / 10
    return Descriptor(random.standard_normal(pooled).astype(np.float32), random.random((frames, width), np.float32), times)


def test_a_batch_has_static_widths_and_masks_for_what_is_not_there() -> None:
    video, audio = descriptor("video", 9), descriptor("audio", 2)
    batch = collate_descriptors([describe(video, None, CONFIG), None, describe(None, audio, CONFIG)], CONFIG)
    assert {name: array.shape for name, array in batch.items()} == {
        "video_descriptor": (3, 3318),
        "video_present": (3,),
        "audio_descriptor": (3, 6373),
        "audio_present": (3,),
        "landmarks": (3, 4, 1659),
        "landmarks_times": (3, 4),
        "landmarks_mask": (3, 4),
        "low_level": (3, 3, 65),
        "low_level_times": (3, 3),
        "low_level_mask": (3, 3),
    }
    assert batch["video_present"].tolist() == [True, False, False] and batch["audio_present"].tolist() == [False, False, True]
    assert batch["landmarks_mask"].sum(1).tolist() == [4, 0, 0] and batch["low_level_mask"].sum(1).tolist() == [0, 0, 2]
    np.testing.assert_array_equal(batch["video_descriptor"][0], video.pooled)
    np.testing.assert_array_equal(batch["low_level"][2, :2], audio.frames)
    assert not any(batch[name][1].any() for name in batch)


def test_without_sequences_only_pooled_ones_are_there() -> None:
    assert [*collate_descriptors([None], DescriptorConfig())] == ["video_descriptor", "video_present", "audio_descriptor", "audio_present"]


@pytest.mark.parametrize(("scale", "length"), [(1.0, 1.0), (1e-12, None)])
def test_functionals_are_of_length_one_unless_they_are_nearly_nothing(scale: float, length: float | None) -> None:
    """As `x / clamp(norm, 1e-6)`."""
    audio = descriptor("audio", 1)
    pooled = audio.pooled * np.float32(scale)
    found = describe(None, Descriptor(pooled, audio.frames, audio.times), CONFIG)["audio_descriptor"]
    norm = np.linalg.norm(pooled.astype(np.float64))
    np.testing.assert_allclose(found, pooled / max(norm, 1e-6), rtol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(length or norm / 1e-6, rel=1e-5)


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=40), st.integers(1, 12))
def test_a_long_sequence_is_thinned_evenly_in_time(gaps: list[float], most: int) -> None:
    """First and last frame stay; every instant of the even spread has a frame kept that no other is nearer to."""
    times = np.cumsum(gaps).astype(np.float32)
    kept = spread(times, most)
    assert (np.diff(kept) > 0).all() and len(kept) <= most
    if len(times) > most > 1:
        assert kept[0] == 0 and kept[-1] == len(times) - 1
        for instant in np.linspace(times[0], times[-1], most):
            assert np.abs(times[kept] - instant).min() <= np.abs(times - instant).min() + 1e-5


def test_a_negative_width_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        DescriptorConfig(landmarks=-1)
