"""A small atlas on disk: a few rows of three signatures with real media files, and a toy vocabulary."""

import dataclasses
import json
import re
import zlib
from pathlib import Path

import av
import numpy as np
import soundfile

from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.models.config import ThinkerConfig, TokenIds
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import SPECIAL_TOKENS

CONFIG = ThinkerConfig.preset("mini")
OPTIONS = ProcessingConfig(audio_seconds=1.0, video_frames=4, video_min_pixels=56 * 56, video_max_pixels=84 * 84)


class ToyTokenizer:
    """A word is an id; the special tokens are the model's."""

    ids: TokenIds = CONFIG.tokens
    vocab_size = 1024
    _special = {literal: getattr(CONFIG.tokens, field) for field, literal in SPECIAL_TOKENS.items()}
    _pieces = re.compile("|".join(map(re.escape, _special)) + r"|\w+|[^\w\s]")

    def encode(self, text):
        return [self._special.get(piece, 10 + zlib.crc32(piece.encode()) % 1000) for piece in self._pieces.findall(text)]

    def decode(self, ids, skip_special=True):
        raise AssertionError("these tests only encode")


RECIPE = Recipe(ToyTokenizer(), CONFIG, OPTIONS, max_tokens=160)


def recipe(**changes):
    return dataclasses.replace(RECIPE, **changes)


def write_wav(path: Path, seconds: float, seed: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(size=int(16000 * seconds)) * 0.1, 16000)


def write_video(path: Path, frames: int, width: int, height: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = np.full((height, width, 3), 30 * i % 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_atlas(folder: Path, count: int = 30) -> Path:
    """Rows 0, 3, 6.. are text, 1, 4, 7.. have audio, 2, 5, 8.. audio and video; lengths differ from row to row."""
    rows = []
    for i in range(count):
        words = " ".join(f"word{j}" for j in range(5 + 7 * i % 40))
        row = {
            "problem": f"Transcript: {words}\nWhich of anger, sad?",
            "answer": ("anger", "sad")[i % 2],
            "dataset": ("mmpsy_anxiety", "cremad", "meld_emotion")[i % 3],
            "modality_signature": ("text", "text_audio", "text_video_audio")[i % 3],
            "task": "emotion_cls",
            "class_label": "",
            "rationale": "the words say so" if i % 2 else "",
            "audios": [f"audio/{i}.wav"] if i % 3 else [],
            "videos": [f"video/{i % 9}.mp4"] if i % 3 == 2 else [],
        }
        if i % 3 == 0:
            row |= {"answer": "anxiety", "task": "anxiety_cls"}
        for audio in row["audios"]:
            write_wav(folder / audio, 0.2 + 0.09 * (i % 11), i)
        for video in row["videos"]:
            write_video(folder / video, 3 + i % 4, *((64, 64), (96, 64), (64, 96))[i % 9 // 3])
        rows.append(row)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def edit_row(path: Path, number: int, **changes):
    """Rewrites one row of a JSONL file; a change to None deletes the key."""
    lines = path.read_text().splitlines()
    row = {k: v for k, v in (json.loads(lines[number]) | changes).items() if v is not None}
    lines[number] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")
