from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import MiniTokenizer
from tools.train_tokenizer import train


@pytest.fixture(scope="session")
def mini_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MiniTokenizer:
    """A small vocabulary trained on words made for the purpose."""
    rng = np.random.default_rng(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(2000)]
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train([" ".join(rng.choice(words, 12)) + "." for _ in range(1500)], file)
    return MiniTokenizer(file)


@pytest.fixture(scope="session")
def mini() -> ThinkerConfig:
    return ThinkerConfig.preset("mini")


@pytest.fixture
def small() -> ProcessingConfig:
    """Pictures of a few cells."""
    return ProcessingConfig(image_min_pixels=3136, image_max_pixels=112 * 140, video_min_pixels=3136, video_max_pixels=84 * 140)


@pytest.fixture(scope="session")
def wav() -> Callable[..., bytes]:
    def make(seconds: float = 1.0, rate: int = 16000, channels: int = 1, seed: int = 0, **kwargs) -> bytes:
        """A gliding tone in a little noise."""
        time = np.arange(round(seconds * rate)) / rate
        tone = 0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time) + 0.01 * np.random.default_rng(seed).standard_normal(len(time))
        file = io.BytesIO()
        soundfile.write(file, np.stack([tone * (0.5 + c) for c in range(channels)], 1), rate, format=kwargs.pop("format", "WAV"), **kwargs)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def mp4() -> Callable[..., bytes]:
    def make(frames: int = 20, width: int = 96, height: int = 64, sound: float = 0.0, faststart: bool = False) -> bytes:
        """A clip at 10 frames a second whose brightness is `10 * frame`; with `sound` seconds of AAC tone."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "clip.mp4"
            write(file, frames, width, height, sound, faststart)
            return file.read_bytes()

    def write(file: Path, frames: int, width: int, height: int, sound: float, faststart: bool) -> None:
        with av.open(str(file), "w", format="mp4", options={"movflags": "faststart"} if faststart else {}) as container:
            video = container.add_stream("libx264", rate=10, options={"crf": "1"})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
            noise = np.random.default_rng(0).integers(-5, 6, (height, width, 3))
            for index in range(frames):
                picture = np.clip(noise + 10 * index % 250, 0, 255).astype(np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(video.encode())
            if audio is not None:
                tone = np.sin(np.arange(round(sound * 16000)) * 0.2).astype(np.float32)[None] * 0.3
                frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                frame.sample_rate = 16000
                container.mux(audio.encode(frame))
                container.mux(audio.encode())

    return make
