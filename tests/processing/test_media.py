"""Decoding: what comes out, and what the user is told when a file is broken."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from omnisapiens_jax.processing.media import (
    MediaError,
    decode_audio,
    decode_image,
    decode_video,
    frame_indices,
    frame_spacing,
    has_audio,
    image_shape,
    video_shape,
)


def grey_levels(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


def test_video_frames_are_taken_evenly_from_first_to_last(mp4):
    clip = mp4(frames=20)
    frames = decode_video(clip, frames=4)
    assert frames.shape == (4, 64, 96, 3) == (*video_shape(clip, frames=4), 3)
    assert grey_levels(frames) == frame_indices(20, 4) == [0, 6, 13, 19]


def test_a_short_video_keeps_all_it_has(mp4):
    assert grey_levels(decode_video(mp4(frames=3), frames=4)) == [0, 1, 2]
    assert video_shape(mp4(frames=3), frames=4) == (3, 64, 96)


def test_audio_is_the_mean_of_its_channels_at_16_khz(wav, tmp_path):
    stereo = wav(1.5, rate=44100, channels=2)  # channels are scaled by 0.5 and 1.5, so that the mean is the tone
    mono = wav(1.5, rate=44100)
    heard = decode_audio(stereo, seconds=10)
    assert heard.dtype == np.float32 and len(heard) == 24000
    np.testing.assert_allclose(heard, 2 * decode_audio(mono, seconds=10), atol=2e-4)
    file = tmp_path / "clip.wav"
    file.write_bytes(stereo)
    np.testing.assert_array_equal(decode_audio(file, seconds=10), heard)


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3"])
def test_compressed_audio_is_read(wav, form: str):
    heard, plain = decode_audio(wav(1.0, format=form), seconds=10), decode_audio(wav(1.0), seconds=10)
    assert abs(len(heard) - 16000) < 1200  # coders add a little padding
    assert abs(heard.std() - plain.std()) < 0.01


def test_only_the_first_seconds_are_heard(wav):
    whole = decode_audio(wav(3.0, rate=22050), seconds=10)
    cut = decode_audio(wav(3.0, rate=22050), seconds=1.25)
    assert len(cut) == 20000
    np.testing.assert_allclose(cut, whole[:20000], atol=1e-5)


def test_sound_track_of_a_video(mp4):
    clip = mp4(frames=10, sound=1.0)
    assert has_audio(clip) and not has_audio(mp4(frames=10))
    assert abs(len(decode_audio(clip, seconds=10)) - 16000) < 2100  # AAC frames are 1024 samples


def test_images_become_rgb():
    file = io.BytesIO()
    Image.new("LA", (30, 20), (7, 255)).save(file, "PNG")
    assert decode_image(file.getvalue()).tolist() == np.full((1, 20, 30, 3), 7).tolist()
    assert image_shape(file.getvalue()) == (1, 20, 30)


def nan_wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(8000, np.nan, np.float32), 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def test_broken_audio_is_named_with_its_cause(wav, mp4, tmp_path):
    def heard(source) -> str:
        with pytest.raises(MediaError) as error:
            decode_audio(source, seconds=10, name="cremad 12, audio 0")
        return str(error.value)

    assert heard(b"RIFF" + bytes(60)).startswith("cremad 12, audio 0 (64 bytes): corrupt audio file")
    assert "not a readable audio file" in heard(b"no sound at all" * 20)
    assert "is empty" in heard(b"")
    assert "NaN or infinite" in heard(nan_wav())
    assert "holds no audio samples" in heard(wav(0.0))
    assert "only 15 ms of sound" in heard(wav(0.015))
    assert "has no audio stream" in heard(mp4(frames=3))
    missing = tmp_path / "gone.wav"
    assert heard(missing) == f"cremad 12, audio 0 ({missing}): cannot be read (No such file or directory)"


@pytest.mark.parametrize("faststart", [False, True])
def test_a_truncated_video_is_named_with_its_cause(mp4, faststart: bool):
    clip = mp4(frames=40, faststart=faststart)
    for read in (decode_video, video_shape):
        with pytest.raises(MediaError, match=r"meld 3, video 0 \(\d+ bytes\): .*truncated video"):
            read(clip[: len(clip) * 6 // 10], frames=4, name="meld 3, video 0")


def test_other_broken_pictures(wav, tmp_path):
    for read in (lambda s: decode_video(s, frames=4), lambda s: video_shape(s, frames=4)):
        with pytest.raises(MediaError, match="has no video stream"):
            read(wav(1.0))
        with pytest.raises(MediaError, match="is empty"):
            read(b"")
        with pytest.raises(MediaError, match="cannot be read"):
            read(tmp_path / "gone.mp4")
    for read in (decode_image, image_shape):
        with pytest.raises(MediaError, match="not a readable image"):
            read(b"\x89PNG nothing")
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "PNG")
    with pytest.raises(MediaError, match="not a readable image"):
        decode_image(file.getvalue()[:2000])


def test_a_picture_of_absurd_size_is_refused_before_it_takes_the_memory():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for read in (decode_image, image_shape):
        with pytest.raises(MediaError, match="not a readable image"):
            read(bomb)


def test_titles_in_another_encoding_do_not_stop_a_clip(mp4):
    """Of AVI and old MP4 files they often are Latin-1, which PyAV would not read."""
    clip = mp4(frames=3, sound=0.5)
    titled = clip.replace(b"Handler", b"H\xe4ndler")
    assert titled != clip and has_audio(titled)
    np.testing.assert_array_equal(decode_video(titled, frames=2), decode_video(clip, frames=2))
    np.testing.assert_array_equal(decode_audio(titled, seconds=1), decode_audio(clip, seconds=1))
    assert video_shape(titled, frames=2) == (2, 64, 96) and frame_spacing(titled, frames=2) == frame_spacing(clip, frames=2) is not None
