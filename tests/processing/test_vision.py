"""Patches against transformers' image processor, and the window layout against a plain walk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.models.config import PRESETS
from omnisapiens_jax.models.vision import normalise
from omnisapiens_jax.processing.media import decode_image, decode_video
from omnisapiens_jax.processing.vision import grid_of, layout_vision, patchify, smart_resize, window_slots
from tests.oracle import run_oracle

REAL = Path(__file__).parents[2] / "data" / "real"
VISION = PRESETS["7b"].vision
BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 200 * 200}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise on top, so that both resampling and rounding show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x / width, y / height, (x + y) / (width + height)], -1) * 200
    return np.clip(smooth + rng.integers(0, 55, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.oracle
def test_patches_equal_transformers():
    sizes = {
        "image_shrunk": (480, 640),
        "image_grown": (20, 31),
        "image_exact": (112, 140),
        "image_halves": (70, 98),
        "image_long": (30, 500),
        "image_tall": (400, 100),
        "image_tiny": (4, 5),
    }
    pictures = {name: picture(*size) for name, size in sizes.items()}
    # Bright and much smaller: sums of so many levels have more bits than float32.
    pictures["image_bright"] = np.random.default_rng(0).integers(200, 256, (1600, 1800, 3), dtype=np.uint8)
    pictures["image_astronaut"] = decode_image(REAL / "astronaut.png")[0]
    pictures["image_obama"] = decode_video(REAL / "obama_speech.mp4", frames=4)[2]
    arguments: dict[str, Any] = BOUNDS | pictures
    theirs = run_oracle("extractors", **arguments)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])  # as published
    worst = 0.0
    for name, pixels in pictures.items():
        patches, grid = patchify(pixels[None], VISION, **BOUNDS)
        assert grid == tuple(theirs[name.replace("image", "grid")]), name
        normalised = (patches.reshape(len(patches), 3, -1) / 255 - mean[:, None]) / std[:, None]
        ours = np.asarray(normalise(jnp.asarray(patches)))
        np.testing.assert_allclose(ours, normalised.reshape(ours.shape), atol=1e-6)  # float32 near 2.6
        worst = max(worst, float(np.abs(ours - theirs[name.replace("image", "patches")]).max()))
    print(f"patches: worst difference {worst:.1e}, a grey level is {1 / 255 / std.max():.1e}")
    assert worst <= 1e-6  # the same bytes, normalised in float32


def test_a_picture_that_shrinks_a_hundredfold_keeps_its_level():
    frames = np.broadcast_to(np.array([3, 128, 254], np.uint8), (1, 8000, 6000, 3))  # weights never reach 16 bits
    patches, grid = patchify(frames, VISION, min_pixels=3136, max_pixels=3136)
    assert grid == (1, 4, 2)
    np.testing.assert_array_equal(patches.reshape(8, 3, -1), np.broadcast_to(np.array([3, 128, 254])[:, None], (8, 3, 392)))


def test_a_video_is_paired_frames_in_the_same_order_as_stills():
    frames = np.stack([picture(56, 84, seed) for seed in range(3)])
    patches, grid = patchify(frames, VISION, min_pixels=3136, max_pixels=10**6)
    assert grid == (2, 4, 6)
    stills = [patchify(frame[None], VISION, min_pixels=3136, max_pixels=10**6)[0].reshape(24, 3, 2, 14, 14) for frame in frames]
    video = patches.reshape(2, 24, 3, 2, 14, 14)
    for step, place, still in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)):  # an odd last frame is repeated
        np.testing.assert_array_equal(video[step, :, :, place], stills[still][:, :, place])


def test_the_four_patches_of_a_cell_are_adjacent_and_channel_first():
    rows = np.arange(56)[:, None, None] // 14
    columns = np.arange(56)[None, :, None] // 14
    frame = np.broadcast_to(10 * rows + columns, (56, 56, 3)).astype(np.uint8)
    patches, _ = patchify(frame[None], VISION, min_pixels=1, max_pixels=10**6)
    red = patches.reshape(16, 3, -1)[:, 0]
    names = red[:, 0].astype(int)
    assert names[:8].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert (red.std(axis=1) < 1e-4).all()


@pytest.mark.parametrize(
    ("height", "width", "bounds", "expected"),
    [
        (720, 1280, (147_456, 147_456), (280, 504)),  # reference: 180 tokens a grid step
        (720, 1280, (100_352, 602_112), (560, 1008)),  # 720
        (42, 70, (1, 10**6), (56, 56)),  # halves go to the even multiple
    ],
)
def test_smart_resize(height, width, bounds, expected):
    assert smart_resize(height, width, factor=28, min_pixels=bounds[0], max_pixels=bounds[1]) == expected


def test_four_frames_of_a_720p_clip_give_360_tokens():
    assert np.prod(grid_of(4, 720, 1280, VISION, min_pixels=147_456, max_pixels=147_456)) // 4 == 360


def test_extreme_shapes_are_refused():
    with pytest.raises(ValueError, match="more than 200 times"):
        smart_resize(2, 500, factor=28, min_pixels=1, max_pixels=10**6)


@given(
    grids=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)), max_size=3), side=st.sampled_from([28, 56, 112, 168])
)
def test_windows_hold_every_patch_once_in_the_published_order(grids: list[tuple[int, int, int]], side: int):
    config = dataclasses.replace(PRESETS["mini"].vision, window_size=side, in_channels=1, patch_size=14, temporal_patch_size=1)
    cells = side // 28
    items, number = [], 0
    for steps, rows, columns in grids:
        count = steps * rows * columns * 4
        values = np.zeros((count, config.patch_dim), np.float32)
        values[:, 0] = np.arange(number, number + count) + 1  # every patch has a name
        number += count
        items.append((values, (steps, 2 * rows, 2 * columns)))
    layout = layout_vision(items, config)
    names = layout.patches[..., 0].astype(int)
    assert sorted(names[layout.mask].tolist()) == list(range(1, number + 1))
    assert (names[~layout.mask] == 0).all()

    frame = token = 0
    for (values, _), (steps, rows, columns) in zip(items, grids, strict=True):
        for step in range(steps):
            window = 0
            reading = {}
            for top in range(0, rows, cells):
                for left in range(0, columns, cells):
                    inside = [(r, c) for r in range(top, min(top + cells, rows)) for c in range(left, min(left + cells, columns))]
                    for slot, (r, c) in enumerate(inside):
                        reading[r, c] = (frame, window, slot)
                        four = slice(4 * slot, 4 * slot + 4)
                        first = (step * rows * columns + r * columns + c) * 4
                        assert names[frame, window, four].tolist() == values[first : first + 4, 0].tolist()
                        expected = [[2 * r, 2 * c], [2 * r, 2 * c + 1], [2 * r + 1, 2 * c], [2 * r + 1, 2 * c + 1]]
                        assert layout.coords[frame, window, four].tolist() == expected
                    assert layout.mask[frame, window].sum() == 4 * len(inside)
                    window += 1
            for r in range(rows):
                for c in range(columns):
                    assert tuple(layout.slots[token]) == reading[r, c]
                    token += 1
            frame += 1
    assert token == len(layout.slots)


def test_the_layout_is_no_larger_than_its_largest_window():
    _, windows, largest = window_slots(3, 9, 4)
    assert (windows, largest) == (3, 12)
