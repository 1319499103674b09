"""What is extracted equals what MediaPipe and openSMILE say themselves: live, and from a recorded run where they are not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.processing.descriptors.extract import extract, find_jobs
from omnisapiens_jax.processing.descriptors.read import Descriptor, read_audio_descriptor, read_video_descriptor
from tests.oracle import REPO, run_oracle
from tests.processing.descriptors.clips import descriptors_python, write_clips

GOLDEN = REPO / "tests" / "golden" / "descriptors"
FACE, HANDS = slice(99, 1533), slice(1533, 1659)


@pytest.fixture(
    scope="module",
    params=["recorded", pytest.param("live", marks=pytest.mark.slow)],
)
def described(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of descriptors, and what the packages say of the same clips."""
    if request.param == "recorded":
        with np.load(GOLDEN / "packages.npz") as packages:
            return GOLDEN, dict(packages)
    python, folder = descriptors_python(), tmp_path_factory.mktemp("described")
    write_clips(folder / "clips", seconds=4.0)
    jobs = find_jobs(folder / "clips", folder / "out")
    report = extract(jobs, folder / "out", python=python, workers=2)
    assert (report.written, report.nothing, report.failures) == (6, 1, [])  # the portrait has no sound
    videos, audios = ([str(job.source) for job in jobs if job.kind == kind and job.target.exists()] for kind in ("video", "audio"))
    return folder / "out", run_oracle("described", python=python, video=videos, audio=audios)


def video(described: tuple[Path, dict[str, np.ndarray]], name: str) -> Descriptor:
    """A descriptor of landmarks."""
    found = read_video_descriptor(described[0] / "pose" / f"{name}.npz")
    assert found is not None
    return found


def audio(described: tuple[Path, dict[str, np.ndarray]], name: str) -> Descriptor:
    """A descriptor of a sound."""
    found = read_audio_descriptor(described[0] / "opensmile" / f"{name}.npz")
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["speaker.mp4", "portrait.mp4", "nothing.mp4"])
def test_landmarks_are_mediapipes_own(described: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    found = video(described, name)
    np.testing.assert_allclose(found.frames, described[1][f"{name} frames"], atol=1e-6)
    np.testing.assert_allclose(found.pooled, described[1][f"{name} pooled"], atol=1e-6)


@pytest.mark.parametrize("name", ["speaker.mp4", "reader.wav", "nothing.mp4"])
def test_functionals_and_low_level_descriptors_are_opensmiles_own(described: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    """Of a sound at its own rate, of a video through its track."""
    found = audio(described, name)
    np.testing.assert_array_equal(found.pooled, described[1][f"{name} features"][0])
    np.testing.assert_array_equal(found.frames, described[1][f"{name} low_level"])
    np.testing.assert_allclose(found.times, described[1][f"{name} spans"].mean(axis=1), atol=1e-6)


def test_a_face_is_seen_where_there_is_one(described: tuple[Path, dict[str, np.ndarray]]) -> None:
    for name in ("speaker.mp4", "portrait.mp4"):
        face = video(described, name).frames[:, FACE].reshape(-1, 478, 3)
        assert (face[..., :2] > 0).all() and (face[..., :2] < 1).all()  # inside the picture
    assert video(described, "speaker.mp4").frames[:, HANDS].any()
    nothing = video(described, "nothing.mp4")
    assert len(nothing.frames) == 8 and not nothing.frames.any() and not nothing.pooled.any()


def test_speech_is_told_from_silence(described: tuple[Path, dict[str, np.ndarray]]) -> None:
    """By the pitch, the first of the low-level descriptors: a man's voice is read, and silence has none."""
    pitch = audio(described, "reader.wav").frames[:, 0]
    assert 60 < np.median(pitch[pitch > 0]) < 200
    assert not audio(described, "nothing.mp4").frames[:, 0].any()


def test_times_run_along_the_clip(described: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Frames at the container's times, windows every 10 ms."""
    np.testing.assert_allclose(video(described, "portrait.mp4").times, (np.arange(6) + 0.5) / 8, atol=1e-3)
    speaker = video(described, "speaker.mp4").times
    np.testing.assert_allclose(np.diff(speaker), 1 / 12, atol=0.05)
    sound = audio(described, "speaker.mp4").times
    np.testing.assert_allclose(np.diff(sound)[:-1], 0.01, atol=1e-4)
    assert abs(speaker[-1] - sound[-1]) < 0.3
