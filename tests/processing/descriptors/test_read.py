"""Descriptor files: read as torch and the published pooling read them, padded part by part, and told apart from broken ones."""

from __future__ import annotations

import gc
import io
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnisapiens_jax.processing.descriptors.read import (
    ASSUMED_FPS,
    PARTS,
    Descriptor,
    DescriptorError,
    read_audio_descriptor,
    read_video_descriptor,
)
from tests.oracle import run_oracle
from tests.pickles import archive

AUDIO = ("sound", "sound_row", "sound_numpy")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of files that torch saved, and what torch makes of them."""
    folder = tmp_path_factory.mktemp("released")
    return folder, run_oracle("released_descriptors", folder=str(folder))


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["face", "faceless", "one", "long", "numpy", "turned", "lists", "double", "protocol_4"])
def test_a_released_video_is_pooled_as_torch_pools_it(released: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    """Saved as tensors, arrays of either order, or lists; a faceless clip padded in the face's own block."""
    folder, wanted = released
    found = read_video_descriptor(folder / f"{name}.pt")
    assert found is not None and found.pooled.dtype == found.frames.dtype == found.times.dtype == np.float32
    np.testing.assert_allclose(found.pooled, wanted[name], atol=2e-6)
    from_bytes = read_video_descriptor((folder / f"{name}.pt").read_bytes())
    assert from_bytes is not None
    np.testing.assert_array_equal(from_bytes.frames, found.frames)
    np.testing.assert_allclose(from_bytes.frames.mean(axis=0), wanted[name][:1659], atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["face", "faceless"])
def test_the_published_padding_can_be_had(released: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    found = read_video_descriptor(released[0] / f"{name}.pt", compat_trailing_pad=True)
    assert found is not None
    np.testing.assert_allclose(found.pooled, released[1][f"{name} trailing"], atol=2e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["unreadable", "empty"])
def test_a_video_without_frames_has_no_descriptor(released: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    assert read_video_descriptor(released[0] / f"{name}.pt") is None


@pytest.mark.oracle
@pytest.mark.parametrize("name", AUDIO)
def test_a_released_sound_is_read_as_torch_reads_it(released: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    found = read_audio_descriptor(released[0] / f"{name}.pt")
    assert found is not None
    np.testing.assert_array_equal(found.pooled, released[1][name])
    assert found.frames.shape == (0, 65) and found.times.shape == (0,)


def landmarks(frames: int = 4, **other: Any) -> dict[str, Any]:
    """Landmarks of noise."""
    noise = np.random.default_rng(0)
    parts = {part: noise.random((frames, points, 3), np.float32) for part, points in PARTS.items()}
    return {**parts, "frame_indices": np.arange(frames), "total_frames": np.int64(frames), **other}


def saved(content: dict[str, Any]) -> bytes:
    """A file of numpy's."""
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    return buffer.getvalue()


def video(content: dict[str, Any], **options: Any) -> Descriptor:
    """What is read of such a file."""
    found = read_video_descriptor(saved(content), **options)
    assert found is not None
    return found


def test_a_face_without_irises_keeps_everything_in_its_place() -> None:
    """The hands behind it, and the deviations behind the means."""
    whole = landmarks()
    whole["face"][:, 468:] = 0
    short = video(landmarks(face=whole["face"][:, :468]))
    np.testing.assert_array_equal(short.pooled, video(whole).pooled)
    np.testing.assert_array_equal(short.frames[:, -126:], hands(whole))


def hands(content: dict[str, Any]) -> np.ndarray:
    """Both, frame by frame."""
    return np.concatenate([content[part].reshape(len(content[part]), -1) for part in ("left_hand", "right_hand")], axis=1)


def test_times_are_the_middles_of_the_frames() -> None:
    """Those that the file says; else by the number of each frame in the video, at the rate that the caller knows or one that is assumed."""
    np.testing.assert_allclose(video(landmarks(3, times=np.array([0.1, 0.4, 0.9]))).times, [0.1, 0.4, 0.9])
    every_fourth = landmarks(3, frame_indices=np.array([0, 4, 8]))
    np.testing.assert_allclose(video(every_fourth, fps=8.0).times, [0.0625, 0.5625, 1.0625])
    np.testing.assert_allclose(video(every_fourth).times, np.array([0.5, 4.5, 8.5]) / ASSUMED_FPS)


def test_low_level_descriptors_come_with_their_times() -> None:
    content = {"features": np.ones((1, 6373)), "low_level": np.ones((5, 65)), "times": np.arange(5.0)}
    found = read_audio_descriptor(saved(content))
    assert found is not None
    assert found.frames.shape == (5, 65) and found.pooled.shape == (6373,)
    np.testing.assert_array_equal(found.times, np.arange(5))


NAN = np.full((4, 33, 3), 0.5, np.float32)
NAN[1, 2, 0], NAN[3, 0, 2] = np.nan, np.inf
VIDEOS: dict[str, tuple[dict[str, Any], str]] = {
    "a part is missing": ({"left_hand": None}, "left_hand is missing"),
    "a part of another width": ({"face": np.zeros((4, 470, 3))}, r"face is \[4, 470, 3\], not \[4, 478, 3\]"),
    "a part without z": ({"pose": np.zeros((4, 33, 2))}, r"pose is \[4, 33, 2\], not \[4, 33, 3\]"),
    "a part of other frames": ({"right_hand": np.zeros((3, 21, 3))}, r"right_hand is \[3, 21, 3\], not \[4, 21, 3\]"),
    "only one part is empty": ({"pose": np.zeros((0, 33, 3))}, r"face is \[4, 478, 3\], not \[0, 478, 3\]"),
    "a number for a part": ({"pose": np.float32(1)}, r"pose is \[\]"),
    "text for a part": ({"pose": np.array(["a"])}, "pose is no array of numbers"),
    "NaN and infinity": ({"pose": NAN}, "2 of 396 values of pose are NaN or infinite"),
    "beyond float32": ({"face": np.full((4, 478, 3), 1e300)}, "5,736 of 5,736 values of face are NaN or infinite"),
    "no numbers of the frames": ({"frame_indices": None}, "frame_indices is missing"),
    "too few numbers of the frames": ({"frame_indices": np.arange(3)}, r"frame_indices is int64 \[3\], not the numbers of 4 frames"),
    "times of other frames": ({"times": np.zeros(5)}, r"times is \[5\], but there are 4 frames"),
}


@pytest.mark.parametrize("what", VIDEOS)
def test_what_is_wrong_with_a_video_is_told(what: str) -> None:
    changes, said = VIDEOS[what]
    content = {key: value for key, value in (landmarks() | changes).items() if value is not None}
    with pytest.raises(DescriptorError, match=rf"^row 3, ext_video_feats \(\d+ bytes\): {said}"):
        read_video_descriptor(saved(content), "row 3, ext_video_feats")


SOUNDS: dict[str, tuple[dict[str, Any], str]] = {
    "another feature set": ({"features": np.zeros((1, 88))}, r"features is \[1, 88\], not \[1, 6373\]"),
    "several windows": ({"features": np.zeros((2, 6373))}, r"features is \[2, 6373\]"),
    "no features": ({"file_path": np.zeros(1)}, "features is missing"),
    "NaN": ({"features": np.full((1, 6373), np.nan)}, "6,373 of 6,373 values of features are NaN"),
    "low-level descriptors of another width": ({"features": np.zeros(6373), "low_level": np.zeros((3, 130))}, r"low_level is \[3, 130\]"),
    "no times": ({"features": np.zeros(6373), "low_level": np.zeros((3, 65))}, "times is missing"),
}


@pytest.mark.parametrize("what", SOUNDS)
def test_what_is_wrong_with_a_sound_is_told(what: str) -> None:
    content, said = SOUNDS[what]
    with pytest.raises(DescriptorError, match=said):
        read_audio_descriptor(saved(content))


def test_what_is_no_descriptor_is_told(tmp_path: Path) -> None:
    def refused(data: bytes | Path, said: str) -> None:
        for read in (read_video_descriptor, read_audio_descriptor):
            with pytest.raises(DescriptorError, match=said):
                read(data, "clip")

    refused(b"", r"clip \(0 bytes\): is empty")
    refused(b"no archive", "neither a file of torch.save")
    refused(tmp_path / "nowhere.pt", r"clip \(.*nowhere\.pt\): cannot be read \(No such file")
    refused(archive(tmp_path / "list.pt", ["pose"]), "holds no dict")
    refused(archive(tmp_path / "evil.pt", pickle.dumps(print, 2)[2:-1]), r"it names '__builtin__\.print'.*Nothing was executed")
    refused(saved({"pose": np.array([{}], dtype=object)}), "pose is no array of numbers")
    error = DescriptorError("clip", "is empty")  # comes back from a worker process as it was
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "clip: is empty"


def test_a_small_archive_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    """Also where only its directory says so."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pose=np.zeros((4, 33, 3)))
    lying = bytearray(buffer.getvalue())
    place = lying.index(b"PK\1\2") + 24
    lying[place : place + 4] = (3 << 30).to_bytes(4, "little")
    with pytest.raises(DescriptorError, match="unpacks to more than 1,073,741,824 bytes"):
        read_video_descriptor(bytes(lying))


@pytest.mark.oracle
def test_five_thousand_broken_files_raise_nothing_but_the_one_error(released: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Bytes set, dropped, doubled or cut off, mostly where the structure is; whatever is still read has the right shape."""
    chance = random.Random(0)
    small = landmarks(2)
    originals = [(released[0] / f"{name}.pt").read_bytes() for name in ("one", "unreadable", "sound_few_names", "sound_few_numpy")]
    originals += [saved(small), saved({"features": np.ones((1, 6373), np.float32)})]
    read = errors = 0
    for number in range(5000):
        content = bytearray(originals[number % len(originals)])
        for _ in range(chance.randint(1, 4)):
            place = min(int(chance.expovariate(1 / 300)), len(content) - 1)
            place = chance.choice([place, len(content) - 1 - place, chance.randrange(len(content))])
            match chance.randrange(4):
                case 0:
                    content[place] = chance.randrange(256)
                case 1:
                    content[place] ^= 1 << chance.randrange(8)
                case 2:
                    del content[place : place + chance.randint(1, 40)]
                case 3:
                    content[place:place] = content[place : place + chance.randint(1, 40)]
            if not content:
                content = bytearray(b"P")
        for reader, pooled, width in ((read_video_descriptor, 3318, 1659), (read_audio_descriptor, 6373, 65)):
            try:
                found = reader(bytes(content), "clip")
            except DescriptorError as error:
                assert str(error).startswith("clip (")
                errors += 1
            else:
                if found is not None:
                    read += 1
                    assert found.pooled.shape == (pooled,) and found.frames.shape == (len(found.times), width)
                    assert np.isfinite(found.pooled).all() and np.isfinite(found.frames).all()
    assert read > 100 and errors > 5000  # both ways are taken


def test_threads_read_headers_at_once() -> None:
    """Python 3.11 may otherwise say of a whole file: AST constructor recursion depth mismatch."""
    held = io.BytesIO()
    np.savez(held, features=np.zeros((1, 6373), np.float32))
    switching, collecting = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-7)
        gc.set_threshold(1, 1, 1)
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read_audio_descriptor, [held.getvalue()] * 1000))
    finally:
        sys.setswitchinterval(switching)
        gc.set_threshold(*collecting)
