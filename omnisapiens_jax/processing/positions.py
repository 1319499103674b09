"""TMRoPE: the three position axes (time, height, width) of every token of a row, and the order of audio-in-video tokens.

Equal, token for token, to `get_rope_index` of the published model. A time step is 1/25 s (`position_id_per_seconds`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omnisapiens_jax.models.config import ThinkerConfig

Grid = tuple[int, int, int]  # (steps, rows, columns) in patches


def rope_positions(
    tokens: np.ndarray,
    config: ThinkerConfig,
    *,
    audio_tokens: Sequence[int] = (),
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] = (),
    use_audio_in_video: bool = False,
) -> tuple[np.ndarray, int]:
    """Positions `[3, T]` int32 of one unpadded row of `tokens` `[T]`, and its rope delta `1 + max position - T`.

    `audio_tokens` counts the placeholders of each clip; grids are in patches; `seconds_per_grid` has one entry a video. All are in reading
    order. With `use_audio_in_video` only a video that opens with `vision_bos audio_bos` has vision positions; a row whose videos are all
    silent then gets plain text positions, as the published model gives it.

    Raises ValueError when the placeholders do not match the media.
    """
    ids, merge = config.tokens, config.vision.spatial_merge_size
    tokens = np.asarray(tokens)
    if len(seconds_per_grid) != len(video_grids):
        raise ValueError(f"{len(video_grids)} videos need as many seconds_per_grid, got {len(seconds_per_grid)}")
    starts = np.flatnonzero(tokens == ids.vision_bos)
    silent = int(np.sum(tokens[starts[starts + 1 < len(tokens)] + 1] == ids.video)) if use_audio_in_video else 0
    if silent and silent != len(video_grids):
        raise ValueError(f"{silent} of {len(video_grids)} videos have no audio: with use_audio_in_video a row's videos need it all or none")
    placeholders = (ids.audio, ids.image) if silent else (ids.audio, ids.image, ids.video)

    media_at = np.flatnonzero(np.isin(tokens, placeholders))
    audios, images, videos = iter(audio_tokens), iter(image_grids), iter(zip(video_grids, seconds_per_grid, strict=True))
    pieces: list[np.ndarray] = []
    done, following = 0, 0  # tokens placed so far; 1 + maximum of the last piece

    def place(piece: np.ndarray) -> None:
        nonlocal done, following
        pieces.append(piece)
        done += piece.shape[1]
        following = int(piece.max()) + 1

    def place_text(length: int) -> None:
        if length:
            place(_line(length) + following)

    while (cursor := int(np.searchsorted(media_at, done))) < len(media_at):
        at = int(media_at[cursor])
        kind = int(tokens[at])
        if kind == ids.audio:
            length = _next(audios, "audio", at)
            place_text(at - done)
            _check_span(tokens, at, length, (ids.audio,), "audio")
            place(_line(length) + following)
        elif kind == ids.image:
            grid = _next(images, "image", at)
            vision = _vision(grid, np.arange(grid[0]) * config.position_id_per_seconds, merge)
            place_text(at - done)
            _check_span(tokens, at, vision.shape[1], (ids.image,), "image")
            place(vision + following)
        else:
            grid, seconds = _next(videos, "video", at)
            vision = _vision(grid, video_times(grid[0], seconds, config), merge)
            if not use_audio_in_video:
                place_text(at - done)
                _check_span(tokens, at, vision.shape[1], (ids.video,), "video")
                place(vision + following)
                continue
            length = _next(audios, "audio", at)
            if at - 2 < done or tuple(tokens[at - 2 : at]) != (ids.vision_bos, ids.audio_bos):
                raise ValueError(f"the video with audio at token {at} does not follow vision_bos audio_bos")
            place_text(at - 2 - done)
            _check_span(tokens, at, vision.shape[1] + length, (ids.video, ids.audio), "video with audio")
            place(_pair(following))
            base, audio = following, _line(length)
            for part, begin, end in interleave(vision[0], audio[0], config):
                place((vision, audio)[part][:, begin:end] + base)
            place(_pair(following))
    place_text(len(tokens) - done)
    for kind, rest in (("audio", audios), ("image", images), *((("video", videos),) if not silent else ())):
        if (left := sum(1 for _ in rest)) > 0:
            raise ValueError(f"{left} {kind} item(s) have no placeholder in the prompt")
    if not pieces:
        return np.zeros((3, 0), np.int32), 0
    positions = np.concatenate(pieces, axis=1).astype(np.int32)
    return positions, 1 + int(positions.max()) - len(tokens)


def video_times(steps: int, seconds_per_grid: float, config: ThinkerConfig) -> np.ndarray:
    """Time position `[steps]` int64 of every grid step. The product is taken in float32 and cut, not rounded: that is the published law."""
    times = np.arange(steps, dtype=np.float32) * np.float32(seconds_per_grid) * np.float32(config.position_id_per_seconds)
    return times.astype(np.int64)


def interleave(video_values: np.ndarray, audio_values: np.ndarray, config: ThinkerConfig) -> list[tuple[int, int, int]]:
    """Order in which the tokens of a video (0) and of its sound (1) follow each other, as pieces `(which, begin, end)`.

    The values are token times. Chunk j holds the video's tokens, then the audio's; when one stream ends the other simply goes on.
    """
    size = int(config.position_id_per_seconds * config.seconds_per_chunk)
    streams = (_chunks(video_values, size), _chunks(audio_values, size))
    return [(which, *stream[j]) for j in range(max(map(len, streams))) for which, stream in enumerate(streams) if j < len(stream)]


def _chunks(values: np.ndarray, size: int) -> list[tuple[int, int]]:
    # The published walk raises the limit by one chunk at each cut, even when a token jumped over several: such tokens are cut off singly.
    # So this cannot be a grouping by values // size.
    cuts, begin, start = [], 0, 0
    while True:
        at = start + int(np.searchsorted(values[start:], (len(cuts) + 1) * size))
        if at >= len(values):
            return [*cuts, (begin, len(values))]
        cuts.append((begin, at))
        begin, start = at, at + 1


def _line(length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(length), (3, length))


def _pair(position: int) -> np.ndarray:
    return np.full((3, 2), position)


def _vision(grid: Grid, times: np.ndarray, merge: int) -> np.ndarray:
    rows, columns = grid[1] // merge, grid[2] // merge
    axes = np.meshgrid(times, np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes])


def _next(items, kind: str, at: int):
    try:
        return next(items)
    except StopIteration:
        raise ValueError(f"more {kind} placeholders than media: token {at} begins one without media") from None


def _check_span(tokens: np.ndarray, at: int, length: int, kinds: tuple[int, ...], what: str) -> None:
    found = int(np.sum(np.isin(tokens[at : at + length], kinds)))
    if found != length or length == 0:
        raise ValueError(f"the {what} at token {at} needs {length} placeholders, found {found} in a row")
