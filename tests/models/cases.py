"""Tiny thinkers and batches for the comparison with transformers; all of it follows from names and seeds, so only answers are stored.

numpy's legacy `RandomState` is used because its stream is frozen for good.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.models.config import AudioConfig, TextConfig, ThinkerConfig, TokenIds, VisionConfig
from omnisapiens_jax.processing.audio import audio_token_count
from omnisapiens_jax.processing.example import IGNORED, Batch, Bucket, Example, collate, lay_out
from omnisapiens_jax.processing.positions import Grid, interleave, rope_positions

IDS = TokenIds(pad=0, im_start=1, im_end=2, audio=3, audio_bos=4, audio_eos=5, vision_bos=6, vision_eos=7, image=8, video=9)
FIRST_WORD = 10
ROWS = 3  # slots of every batch; cases with fewer rows leave the others masked

# Two shapes with as little in common as possible. Embeddings and what the encoders put out are small (SCALES), so that a wrong eps shows.
CONFIGS = {
    # 6 query heads over 2 key heads of a width that is not hidden / heads, an odd n_window (pooled pairs straddle chunks), windows of 3 x 3
    "uneven": ThinkerConfig(
        text=TextConfig(
            vocab_size=72,
            hidden_size=56,
            num_layers=3,
            num_heads=6,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=88,
            mrope_section=(2, 3, 3),
        ),
        audio=AudioConfig(d_model=24, num_layers=2, num_heads=3, ffn_dim=40, output_dim=56, num_mel_bins=12, n_window=15),
        vision=VisionConfig(
            depth=3,
            hidden_size=40,
            num_heads=2,
            intermediate_size=52,
            out_hidden_size=56,
            fullatt_block_indexes=(1,),
            window_size=24,
            patch_size=4,
        ),
        tokens=IDS,
    ),
    # tied head, one key head, an even n_window, windows of 2 x 2, whole-frame attention first and last, another clock
    "tied": ThinkerConfig(
        text=TextConfig(
            vocab_size=60,
            hidden_size=48,
            num_layers=2,
            num_heads=5,
            num_kv_heads=1,
            head_dim=24,
            intermediate_size=64,
            mrope_section=(2, 4, 6),
            rope_theta=10_000.0,
        ),
        audio=AudioConfig(d_model=32, num_layers=3, num_heads=4, ffn_dim=48, output_dim=48, num_mel_bins=10, n_window=8),
        vision=VisionConfig(
            depth=4,
            hidden_size=48,
            num_heads=3,
            intermediate_size=36,
            out_hidden_size=48,
            fullatt_block_indexes=(0, 3),
            window_size=8,
            patch_size=2,
        ),
        tokens=IDS,
        tie_head=True,
        position_id_per_seconds=10,
        seconds_per_chunk=1,
    ),
}
SMALL = ("embed_tokens", "audio_tower.proj", "visual.merger.mlp.2")


def tensor(name: str, shape: Sequence[int]) -> np.ndarray:
    """The float32 weights of a tensor, by its Hugging Face name: biases and norms far from where training starts, so that each matters."""
    random = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if any(part in name for part in SMALL):
        return (random * 0.02 / (1 if name.endswith("bias") or "embed" in name else np.sqrt(shape[-1]))).astype(np.float32)
    if name.endswith("bias"):
        return (random * 0.4).astype(np.float32)
    if len(shape) == 1:
        return (1 + 0.2 * random).astype(np.float32)
    if name == "lm_head.weight":
        return (random * 0.4).astype(np.float32)
    return (random / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def their_tensors(config: ThinkerConfig) -> dict[str, np.ndarray]:
    """Every tensor of a model of `config` in Hugging Face's names and axes."""
    return {name: tensor(name, row.their_shape) for row in mappings(config) for name in row.their_names}


def write_checkpoint(config: ThinkerConfig, folder: Path) -> None:
    """A Hugging Face directory, written without any of our conversion."""
    save_file(their_tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


@dataclasses.dataclass(frozen=True)
class Text:
    tokens: int


@dataclasses.dataclass(frozen=True)
class Audio:
    frames: int


@dataclasses.dataclass(frozen=True)
class Image:
    rows: int  # in patches, as columns
    columns: int


@dataclasses.dataclass(frozen=True)
class Video:
    steps: int
    rows: int
    columns: int
    seconds: float
    audio_frames: int = 0  # more: the sound lies inside the video


Row = tuple[Text | Audio | Image | Video, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: rows of pieces, and on which side transformers pads them."""

    rows: tuple[Row, ...]
    pad: str = "right"

    @property
    def audio_in_video(self) -> bool:
        return any(isinstance(piece, Video) and piece.audio_frames > 0 for row in self.rows for piece in row)


_ONE_ROW: dict[str, Row] = {
    "text": (Text(19),),
    "audio_and_video": (Text(3), Audio(60), Text(1), Video(3, 4, 6, 0.59), Text(6)),
    "video_longer": (Text(3), Video(5, 4, 4, 1.0, audio_frames=60), Text(6)),
    "audio_longer": (Text(3), Video(2, 4, 4, 0.7, audio_frames=230), Text(6)),
    "jumping_chunks": (Text(3), Video(3, 4, 6, 4.3, audio_frames=90), Text(2), Video(3, 2, 4, 0.63, audio_frames=33), Text(6)),
}
_MORE_ROWS: dict[str, tuple[Row, ...]] = {
    "texts": ((Text(21),), (Text(9),), (Text(14),)),
    # an exact chunk, one frame more, less than a chunk, an odd number of states
    "audios": ((Text(3), Audio(95), Audio(30), Text(2), Audio(31), Text(6)), (Text(2), Audio(7), Text(7))),
    # grids that windows do not divide, one smaller than a window, one cell
    "images": ((Text(3), Image(8, 10), Text(2), Image(4, 4), Text(6)), (Text(2), Image(2, 2), Image(14, 6), Text(5))),
    "videos": ((Text(2), Video(3, 6, 8, 0.63), Text(5)), (Text(2), Video(2, 4, 4, 1.37), Text(2), Video(4, 2, 6, 0.47), Text(5))),
    "mixed": (
        (Text(4), Image(6, 8), Text(3), Audio(37), Text(6)),
        (Text(17),),
        (Text(3), Video(2, 4, 10, 0.63), Text(8)),
    ),
    "sound_mixed": (
        (Text(3), Video(4, 4, 4, 1.0, audio_frames=100), Text(6)),
        (Text(2), Image(4, 6), Text(2), Audio(20), Text(7)),
    ),
}
CASES = {name: Case((row,)) for name, row in _ONE_ROW.items()} | {
    f"{name}_{side}": Case(rows, side) for name, rows in _MORE_ROWS.items() for side in ("right", "left")
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a case feeds: unpadded rows, and their media in reading order."""

    tokens: list[np.ndarray]  # [T] each
    labels: list[np.ndarray]
    mels: list[list[np.ndarray]]  # of every row: [frames, mels]
    visuals: list[list[tuple[np.ndarray, Grid]]]  # of every row, images and videos: patches and grid
    is_video: list[list[bool]]
    seconds: list[list[float]]  # of every row: of its videos


@functools.cache
def inputs(config_name: str, case_name: str) -> Inputs:
    """The arrays of a case for one of the configs."""
    config, case = CONFIGS[config_name], CASES[case_name]
    random = np.random.RandomState(zlib.crc32(f"{config_name}/{case_name}".replace("left", "right").encode()))
    rows = [_row(row, config, random) for row in case.rows]
    return Inputs(*(list(column) for column in zip(*rows, strict=True)))


def _row(row: Row, config: ThinkerConfig, random: np.random.RandomState) -> tuple[Any, ...]:
    ids: list[int] = [IDS.im_start]
    mels, visuals, is_video, seconds = [], [], [], []
    cell = config.vision.cell_patches

    def sound(frames: int) -> int:
        mels.append(random.standard_normal((frames, config.audio.num_mel_bins)).astype(np.float32))
        return audio_token_count(frames)

    def picture(grid: Grid, video: bool) -> int:
        patches = int(np.prod(grid))
        visuals.append((random.standard_normal((patches, config.vision.patch_dim)).astype(np.float32), grid))
        is_video.append(video)
        return patches // cell

    for piece in row:
        match piece:
            case Text(count):
                ids += random.randint(FIRST_WORD, config.text.vocab_size, count).tolist()
            case Audio(frames):
                ids += [IDS.audio_bos, *[IDS.audio] * sound(frames), IDS.audio_eos]
            case Image(height, width):
                ids += [IDS.vision_bos, *[IDS.image] * picture((1, height, width), False), IDS.vision_eos]
            case Video(steps, height, width, each, frames):
                seconds.append(each)
                count = picture((steps, height, width), True)
                if not frames:
                    ids += [IDS.vision_bos, *[IDS.video] * count, IDS.vision_eos]
                    continue
                times = np.repeat(np.arange(steps) * each * config.position_id_per_seconds, count // steps)
                order = interleave(times, np.arange(sound(frames)), config)
                span = [(IDS.video, IDS.audio)[which] for which, begin, end in order for _ in range(begin, end)]
                ids += [IDS.vision_bos, IDS.audio_bos, *span, IDS.audio_eos, IDS.vision_eos]
    tokens = np.asarray(ids, np.int32)
    labels = np.full(len(tokens), IGNORED, np.int32)
    labels[-4:] = tokens[-4:]
    return tokens, labels, mels, visuals, is_video, seconds


def for_transformers(config_name: str, case_name: str) -> dict[str, np.ndarray]:
    """The arguments of the oracle's forward, padded as the case says."""
    config, case, data = CONFIGS[config_name], CASES[case_name], inputs(config_name, case_name)
    arrays = {
        "input_ids": pad(data.tokens, case.pad, IDS.pad),
        "attention_mask": pad([np.ones_like(row) for row in data.tokens], case.pad, 0),
        "labels": pad(data.labels, case.pad, IGNORED),
    }
    if mels := [mel for row in data.mels for mel in row]:
        longest = max(map(len, mels))
        arrays["input_features"] = np.zeros((len(mels), config.audio.num_mel_bins, longest), np.float32)
        arrays["feature_attention_mask"] = np.zeros((len(mels), longest), np.int32)
        for index, mel in enumerate(mels):
            arrays["input_features"][index, :, : len(mel)] = mel.T
            arrays["feature_attention_mask"][index, : len(mel)] = 1
    pictures = [
        (*visual, video) for row, kinds in zip(data.visuals, data.is_video, strict=True) for visual, video in zip(row, kinds, strict=True)
    ]
    for video, values, grids in ((False, "pixel_values", "image_grid_thw"), (True, "pixel_values_videos", "video_grid_thw")):
        if chosen := [(patches, grid) for patches, grid, is_video in pictures if is_video == video]:
            arrays[values] = np.concatenate([patches for patches, _ in chosen])
            arrays[grids] = np.array([grid for _, grid in chosen])
    if seconds := [each for row in data.seconds for each in row]:
        arrays["video_second_per_grid"] = np.array(seconds, np.float32)
    if case.audio_in_video:
        arrays["use_audio_in_video"] = np.array(True)
    return arrays


def examples(config_name: str, case_name: str) -> list[Example]:
    """The rows of a case as our processing lays them out."""
    config, case, data = CONFIGS[config_name], CASES[case_name], inputs(config_name, case_name)
    rows = []
    for tokens, labels, mels, visuals, is_video, seconds in zip(*(getattr(data, f.name) for f in dataclasses.fields(data)), strict=True):
        grids: Mapping[bool, list[Grid]] = {
            video: [grid for (_, grid), kind in zip(visuals, is_video, strict=True) if kind == video] for video in (False, True)
        }
        positions, _ = rope_positions(
            tokens,
            config,
            audio_tokens=[audio_token_count(len(mel)) for mel in mels],
            image_grids=grids[False],
            video_grids=grids[True],
            seconds_per_grid=seconds,
            use_audio_in_video=case.audio_in_video,
        )
        rows.append(lay_out(tokens, labels, positions, len(tokens), mels, visuals, config))
    return rows


@functools.cache
def bucket(config_name: str) -> Bucket:
    """One shape that holds every case, so that each config compiles once."""
    return Bucket.covering(example.size() for case in CASES for example in examples(config_name, case))


def batch(config_name: str, case_name: str, *, shape: Bucket | None = None) -> Batch:
    """A case as our model takes it, in `bucket(config_name)` unless another shape is given; left-padded when the case says so."""
    rows = examples(config_name, case_name)
    made = collate([*rows, *[None] * (ROWS - len(rows))], shape or bucket(config_name), CONFIGS[config_name])
    if CASES[case_name].pad == "left":  # our own batches never are; the model must not care
        for row, example in enumerate(rows):
            for name in ("tokens", "labels", "segment_ids", "positions", "media_index"):
                made[name][row] = np.roll(made[name][row], made["tokens"].shape[1] - len(example.tokens), axis=-1)
    return made


def pad(rows: Sequence[np.ndarray], side: str, value: int) -> np.ndarray:
    """Rows `[..., T]` of different length as one array, filled with `value`."""
    longest = max(row.shape[-1] for row in rows)
    widths = [longest - row.shape[-1] for row in rows]
    return np.stack(
        [np.pad(row, (width, 0) if side == "left" else (0, width), constant_values=value) for row, width in zip(rows, widths, strict=True)]
    )
