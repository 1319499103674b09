"""From RGB frames to what the vision encoder takes: resized, cut into patches and laid out in attention windows.

Pixels stay bytes: resizing rounds to them anyway, and they take a quarter of the memory and of the way to the device. The encoder
normalises them.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from omnisapiens_jax.models.config import PIXEL_MEAN, VisionConfig

MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class VisionLayout:
    """The images and videos of one row in window order.

    `patches` `[F, W, P, patch_dim]` uint8 (float32 where normalised ones were laid out), `mask` `[F, W, P]` bool, `coords` `[F, W, P, 2]`
    int32 (row, column in patches), and `slots` `[cells, 3]` int32: (frame, window, cell) of every decoder token in reading order.
    """

    patches: np.ndarray
    mask: np.ndarray
    coords: np.ndarray
    slots: np.ndarray


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of `factor`, whose area lies within the bounds and whose shape is nearly kept.

    Halves round to even, as in the published processor. Raises ValueError for a side more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rows, columns


def grid_of(frames: int, height: int, width: int, config: VisionConfig, *, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:
    """Grid (steps, rows, columns in patches) of a still (`frames` 1) or video of that size in pixels, before anything is decoded."""
    factor = config.patch_size * config.spatial_merge_size
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return -(-frames // config.temporal_patch_size), rows // config.patch_size, columns // config.patch_size


def patchify(frames: np.ndarray, config: VisionConfig, *, min_pixels: int, max_pixels: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches `[t * h * w, patch_dim]` uint8 of uint8 RGB `frames` `[n, H, W, 3]`, and the grid (t, h, w).

    The last frame is repeated to fill the last temporal patch, so a still is its frame twice. The patches of one cell (2 x 2) are
    adjacent; a patch is flattened as (channel, time, row, column).
    """
    steps, h, w = grid = grid_of(len(frames), frames.shape[1], frames.shape[2], config, min_pixels=min_pixels, max_pixels=max_pixels)
    size, merge, time = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    planes = frames.transpose(0, 3, 1, 2).reshape(-1, *frames.shape[1:3])
    pixels = _resize(planes, h * size, w * size).reshape(len(frames), 3, h * size, w * size)
    if missing := steps * time - len(pixels):
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
    blocks = pixels.reshape(steps, time, 3, h // merge, merge, size, w // merge, merge, size)
    # (step, time, channel, cell row, in-cell row, y, cell column, in-cell column, x) -> patches in cell order, channel first
    return blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * h * w, -1), grid


def black_patches(grid: tuple[int, int, int], config: VisionConfig) -> np.ndarray:
    """Patches `[t * h * w, patch_dim]` uint8 of black frames: what `patchify` gives for zeros."""
    return np.zeros((math.prod(grid), config.patch_dim), np.uint8)


def grey_patches(patches: np.ndarray) -> np.ndarray:
    """Patches `[..., patch_dim]` of the same shape and kind that show nothing: the grey that is 0 once normalised, to the nearest byte."""
    if patches.dtype != np.uint8:
        return np.zeros_like(patches)
    grey = np.rint(255 * PIXEL_MEAN).astype(np.uint8)
    return np.broadcast_to(np.repeat(grey, patches.shape[-1] // len(grey)), patches.shape).copy()  # a patch is flattened channel first


def window_slots(rows: int, columns: int, side: int) -> tuple[np.ndarray, int, int]:
    """Window and place in it `[rows * columns, 2]` of every cell in reading order, the number of windows, the cells of the largest.

    Windows of `side` x `side` cells go row by row; those at the right and lower edge are smaller and hold their cells without gaps.
    """
    row, column = (axis.reshape(-1) for axis in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    across = -(-columns // side)
    window_width = np.minimum(side, columns - column // side * side)
    slots = np.stack([row // side * across + column // side, row % side * window_width + column % side], axis=1)
    return slots, -(-rows // side) * across, min(side, rows) * min(side, columns)


def layout_vision(items: list[tuple[np.ndarray, tuple[int, int, int]]], config: VisionConfig) -> VisionLayout:
    """Lays out the `(patches, grid)` of a row's images and videos, in reading order, frame by frame and window by window.

    W and P are the smallest that hold every frame of the row. Patches are uint8, or all of them normalised float32.
    """
    merge, per_cell = config.spatial_merge_size, config.cell_patches
    plans = [(grid, *window_slots(grid[1] // merge, grid[2] // merge, config.window_cells)) for _, grid in items]
    total = sum(grid[0] for grid, *_ in plans)
    windows = max((count for _, _, count, _ in plans), default=0)
    cells = max((largest for *_, largest in plans), default=0)
    patches = np.zeros((total, windows, cells, per_cell, config.patch_dim), items[0][0].dtype if items else np.uint8)
    mask = np.zeros((total, windows, cells, per_cell), bool)
    coords = np.zeros((total, windows, cells, per_cell, 2), np.int32)
    slots = [np.zeros((0, 3), np.int32)]
    first = 0
    for (values, _), ((steps, h, w), places, _, _) in zip(items, plans, strict=True):
        frame = np.arange(first, first + steps)[:, None]
        window, cell = places[:, 0], places[:, 1]
        patches[frame, window, cell] = values.reshape(steps, len(places), per_cell, -1)
        mask[frame, window, cell] = True
        coords[frame, window, cell] = _cell_coords(h, w, merge)
        slots.append(np.concatenate([np.repeat(frame, len(places), axis=0), np.tile(places, (steps, 1))], axis=1).astype(np.int32))
        first += steps
    return VisionLayout(
        patches=patches.reshape(total, windows, cells * per_cell, config.patch_dim),
        mask=mask.reshape(total, windows, cells * per_cell),
        coords=coords.reshape(total, windows, cells * per_cell, 2),
        slots=np.concatenate(slots),
    )


def _cell_coords(h: int, w: int, merge: int) -> np.ndarray:
    """(row, column) of every patch, `[cells, merge * merge, 2]`, cells in reading order."""
    coords = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    return coords.reshape(h // merge, merge, w // merge, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, merge * merge, 2)


def _resize(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Channels `[N, H, W]` uint8 as `[N, height, width]` uint8, bit for bit as torch's antialiased bicubic makes them of bytes.

    That is what the published processor resizes with: along the rows, then along the columns, with weights of 16 bits and their sign.
    (Pillow's have more, and since version 13 it takes some pictures the other way.) What is added up pixel by pixel there are products of
    narrow bands of a matrix here, whose sums are not rounded (see `_bands`).
    """
    count, rows, columns = planes.shape
    made = np.empty((count, height, width), np.uint8)
    (along, halves), (down, halves_down) = _bands(columns, width), _bands(rows, height)
    dtype = np.result_type(halves, halves_down)
    # Used for one strip and plane after the other, because they stay in the processor's cache.
    source, across, levels = (np.empty(shape, dtype) for shape in ((min(rows, _STRIP), columns), (rows, width), (height, width)))
    for plane, out in zip(planes, made, strict=True):
        if columns == width:
            across[...] = plane
            across -= _MIDDLE
        else:
            for begin in range(0, rows, _STRIP):
                strip = across[begin : begin + _STRIP]
                given = source[: len(strip)]
                given[...] = plane[begin : begin + _STRIP]
                given -= _MIDDLE
                for pixels, read, weights in along:
                    np.matmul(given[:, read], weights.T, out=strip[:, pixels])
                np.floor(np.add(strip, halves, out=strip), out=strip)  # to the nearest level, halves upwards
                np.clip(strip, -_MIDDLE, 255 - _MIDDLE, out=strip)
        if rows == height:
            out[...] = across + _MIDDLE
        else:
            for pixels, read, weights in down:
                np.matmul(weights, across[read], out=levels[pixels])
            np.add(levels, halves_down[:, None] + _MIDDLE, out=levels)
            out[...] = np.clip(levels, 0, 255, out=levels)  # cuts off what is behind the point
    return made


_MIDDLE = 128  # of the levels, which are counted from here: sums of small numbers have fewer bits
_STRIP = 256  # rows that are read at once
_BAND = 16  # pixels that are made at once


@functools.lru_cache(maxsize=256)
def _bands(size: int, wanted: int) -> tuple[list[tuple[slice, slice, np.ndarray]], np.ndarray]:
    """Weights of a bicubic resize of `size` pixels to `wanted`, band by band: the pixels made, those read, and the matrix between them.

    The kernel (Keys, a = -0.5) is widened when pixels are fewer than before. Weights are rounded so that the greatest of all just fits 16
    bits with its sign, as torch has them (`_compute_index_ranges_int16_weights`). Sums over levels are whole numbers of such units: of 24
    bits at most, which float32 holds exactly, unless a picture shrinks to less than about a quarter. Then the type is float64.

    The second answer, `[wanted]`, is what a sum lacks before it is rounded down: half a level, and `_MIDDLE` as often as its weights,
    once they are rounded, are more than one.
    """
    scale = size / wanted
    widened = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centres - 2 * widened + 0.5).astype(int), 0)
    last = np.minimum((centres + 2 * widened + 0.5).astype(int), size)
    bands = []
    for begin in range(0, wanted, _BAND):
        made = slice(begin, min(begin + _BAND, wanted))
        read = slice(int(first[made].min()), int(last[made].max()))
        place = np.arange(read.start, read.stop)
        x = np.abs((place - centres[made, None] + 0.5) / widened)
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[(place < first[made, None]) | (place >= last[made, None])] = 0.0
        bands.append((made, read, weights / weights.sum(axis=1, keepdims=True)))
    greatest = max(weights.max() for *_, weights in bands)
    unit = 0.5 ** next((bits for bits in range(22) if int(0.5 + greatest * 2 ** (bits + 1)) >= 2**15), 22)
    bands = [(made, read, np.trunc(weights / unit + np.copysign(0.5, weights)) * unit) for made, read, weights in bands]
    halves = 0.5 + _MIDDLE * (np.concatenate([weights.sum(axis=1) for *_, weights in bands]) - 1)
    largest = _MIDDLE * max(np.abs(weights).sum(axis=1).max() for *_, weights in bands) + np.abs(halves).max()
    dtype = np.float32 if max(largest, 2 * _MIDDLE) / unit <= 2**24 else np.float64
    return [(made, read, weights.astype(dtype)) for made, read, weights in bands], halves.astype(dtype)
