"""Clips to describe: real ones, and ones with nothing to see or hear; and the environment that describes them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from tests.oracle import REPO

REAL = REPO / "data" / "real"
VARIABLE = "OMNISAPIENS_DESCRIPTORS_PYTHON"


def descriptors_python() -> Path:
    """Interpreter of the descriptors' environment: $OMNISAPIENS_DESCRIPTORS_PYTHON, else `.venv-descriptors`; skips where there is none."""
    python = Path(os.environ.get(VARIABLE, REPO / ".venv-descriptors" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"NOT COMPARED WITH MEDIAPIPE AND OPENSMILE: no {python} (run `make descriptors-env`)")
    return python


def write_clips(folder: Path, seconds: float = 100.0) -> None:
    """A speaker with hands in view, a reader's voice, a face that does not move, and a picture of nothing with silence."""
    folder.mkdir(parents=True)
    (folder / "speaker.mp4").write_bytes(cut(REAL / "obama_speech.mp4", seconds))
    wave, rate = soundfile.read(REAL / "austen_0880.wav", dtype="int16")
    soundfile.write(folder / "reader.wav", wave[: round(seconds * rate)], rate)
    stairs = np.arange(128, dtype=np.uint8)[None, :, None].repeat(128, 0).repeat(3, 2)
    (folder / "nothing.mp4").write_bytes(
        encode(np.stack([np.roll(stairs, 9 * turn, 1) for turn in range(8)]), np.zeros(16_000, np.float32))
    )
    portrait = next(iter(av.open(REAL / "astronaut.png").decode(video=0))).to_ndarray(format="rgb24")
    (folder / "portrait.mp4").write_bytes(encode(portrait[None].repeat(6, 0)))


def cut(source: Path, seconds: float) -> bytes:
    """The beginning of a video, its packets unchanged."""
    buffer = io.BytesIO()
    with av.open(source) as container, av.open(buffer, "w", format="mp4") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in container.streams}
        for packet in container.demux():
            if packet.pts is not None and packet.time_base is not None and packet.pts * packet.time_base < seconds:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return buffer.getvalue()


def encode(frames: np.ndarray, wave: np.ndarray | None = None) -> bytes:
    """A video of frames `[T, H, W, 3]` at 8 a second, with the sound `[samples]` at 16 kHz or no track."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as target:
        video = target.add_stream("libx264", rate=8, options={"threads": "1"})
        video.height, video.width = frames.shape[1:3]
        audio = None if wave is None else target.add_stream("aac", rate=16_000, layout="mono")
        for frame in frames:
            target.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        target.mux(video.encode())
        if audio is not None and wave is not None:
            sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            sound.sample_rate = 16_000
            target.mux(audio.encode(sound))
            target.mux(audio.encode())
    return buffer.getvalue()
