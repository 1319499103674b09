"""Descriptors of a split: read once, each sample by itself, the broken ones counted and the missing ones masked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.atlas import behaviour
from omnisapiens_jax.atlas.behaviour import Behaviour, read_behaviour
from omnisapiens_jax.atlas.faults import BadSamples, FaultLog, Policy
from omnisapiens_jax.atlas.records import read_descriptor
from omnisapiens_jax.atlas.sources import JsonlSource
from omnisapiens_jax.atlas.store import Arrays, Store
from omnisapiens_jax.processing.descriptors.batch import DescriptorConfig
from omnisapiens_jax.processing.descriptors.read import PARTS, Descriptor, read_video_descriptor, trailing_pad

CONFIG = DescriptorConfig(landmarks=3, low_level=2)
SAMPLES = {  # (video, audio) descriptor files of each row
    "both": ("pose/a.npz", "audio/a.npz"),
    "video": ("pose/b.npz", None),
    "never made": ("pose/none.npz", "audio/none.npz"),
    "broken": ("pose/broken.npz", "audio/a.npz"),
    "unnamed": (None, None),
    "no frame": ("pose/empty.npz", None),
}


def write_landmarks(file: Path, frames: int, *, face: bool = True, points: int = 478) -> None:
    file.parent.mkdir(exist_ok=True)
    random, widths = np.random.default_rng(frames), {**PARTS, "face": points}
    parts = {part: random.random((frames, width, 3), np.float32) for part, width in widths.items()}
    if not face:
        parts["face"] = np.zeros_like(parts["face"])
    np.savez(file, allow_pickle=False, **parts, frame_indices=np.arange(frames), total_frames=frames)


@pytest.fixture
def source(tmp_path: Path) -> JsonlSource:
    write_landmarks(tmp_path / "pose/a.npz", 5)
    write_landmarks(tmp_path / "pose/b.npz", 2)
    write_landmarks(tmp_path / "pose/empty.npz", 0)
    (tmp_path / "pose/broken.npz").write_bytes((tmp_path / "pose/a.npz").read_bytes()[:5000])
    (tmp_path / "audio").mkdir()
    random = np.random.default_rng(0)
    sequence = {"low_level": random.random((4, 65), np.float32), "times": np.arange(4, dtype=np.float32)}
    np.savez(tmp_path / "audio/a.npz", features=random.random((1, 6373), np.float32), **sequence)
    row = {"problem": "How?", "answer": "sad", "dataset": "cremad", "modality_signature": "text", "task": "emotion_cls"}
    rows = [
        {**row, "ext_video_feats": [video] if video else [], "ext_audio_feats": [audio] if audio else []}
        for video, audio in SAMPLES.values()
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlSource(tmp_path / "train.jsonl")


def read(source: JsonlSource, on_error: Policy = "skip", config: DescriptorConfig = CONFIG) -> tuple[Behaviour, FaultLog]:
    faults = FaultLog()
    cache = source.path.parent / "cache"
    return read_behaviour(source, range(len(source)), config, cache=cache, on_error=on_error, faults=faults), faults


def test_each_sample_has_what_it_has_and_a_broken_file_costs_nobody_else_anything(source: JsonlSource) -> None:
    found, faults = read(source)
    ids = np.arange(len(SAMPLES))
    batch = found.batch(ids)
    assert batch["video_present"].tolist() == [True, True, False, False, False, False]
    assert batch["audio_present"].tolist() == [True, False, False, True, False, False]
    assert batch["landmarks_mask"].sum(1).tolist() == [3, 2, 0, 0, 0, 0] and batch["low_level_mask"].sum(1).tolist() == [2, 0, 0, 2, 0, 0]
    assert [(fault.row, fault.kind, fault.field) for fault in faults] == [(3, "descriptor", "ext_video_feats")]
    assert "broken.npz" in str(next(iter(faults)))
    assert found.present(ids) == {"video": 2, "audio": 2}
    wanted = read_video_descriptor(source.path.parent / "pose/b.npz")
    assert wanted is not None
    np.testing.assert_array_equal(batch["video_descriptor"][1], wanted.pooled)
    np.testing.assert_array_equal(batch["landmarks"][1, :2], wanted.frames)
    assert not found.batch(np.array([-1]))["video_present"].any()


def test_a_broken_file_stops_a_run_that_wants_that(source: JsonlSource) -> None:
    with pytest.raises(BadSamples, match=r"(?s)1 descriptor.*broken\.npz.*on_error='skip'"):
        read(source, "raise")


def test_files_are_read_once_and_again_when_they_have_changed(source: JsonlSource, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(row: object, *arguments: object, **more: object) -> Descriptor | None:
        asked.append(row.id)  # pyright: ignore[reportAttributeAccessIssue]
        return read_descriptor(row, *arguments, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(behaviour, "read_descriptor", counted)
    read(source)
    assert {*asked} == {*range(6)}
    asked.clear()
    _, faults = read(source)
    assert {*asked} == {3} and len(faults) == 1  # a broken one is told in every run
    asked.clear()
    write_landmarks(source.path.parent / "pose/b.npz", 3)
    write_landmarks(source.path.parent / "pose/none.npz", 3)
    write_landmarks(source.path.parent / "pose/broken.npz", 3)
    found, faults = read(source)
    assert {*asked} == {1, 2, 3} and not faults and found.batch(np.arange(6))["landmarks_mask"].sum(1).tolist() == [3, 3, 3, 3, 0, 0]


def test_statistics_are_of_all_frames(source: JsonlSource) -> None:
    found, _ = read(source)
    mean, spread = found.statistics(np.arange(6))["landmarks"]
    frames = np.concatenate([found.store[sample]["landmarks"] for sample in range(6)]).astype(np.float64)
    np.testing.assert_allclose(mean, frames.mean(0), atol=1e-6)
    np.testing.assert_allclose(spread, frames.std(0), atol=1e-6)


class Alike(Store):
    """Every sample has the same frame over and over, and no sound."""

    def __init__(self) -> None:
        pass

    def __getitem__(self, sample: int) -> Arrays:
        return {"landmarks": np.full((7, 1659), 0.1, np.float32), "low_level": np.zeros((0, 65), np.float32)}


def test_what_never_changes_has_no_spread() -> None:
    found = Behaviour(Alike(), CONFIG).statistics(np.arange(3))
    assert not found["landmarks"][1].any() and (found["low_level"][1] == 1).all()


@pytest.mark.parametrize(("face", "points"), [(True, 478), (False, 468)])
def test_a_descriptor_that_was_read_before_can_be_had_with_the_published_padding(tmp_path: Path, face: bool, points: int) -> None:
    """It equals what the file itself gives so."""
    write_landmarks(tmp_path / "one.npz", 4, face=face, points=points)
    ours, theirs = (read_video_descriptor(tmp_path / "one.npz", compat_trailing_pad=compat) for compat in (False, True))
    assert ours is not None and theirs is not None
    np.testing.assert_array_equal(trailing_pad(ours).pooled, theirs.pooled)
    assert face or np.abs(ours.pooled - theirs.pooled).max() > 0.1


def test_the_switch_reaches_the_batch(source: JsonlSource) -> None:
    write_landmarks(source.path.parent / "pose/b.npz", 4, face=False, points=468)
    pooled = [read(source, config=DescriptorConfig(trailing_pad=pad))[0].batch(np.array([1]))["video_descriptor"] for pad in (False, True)]
    assert not pooled[1][0, -60:].any() and pooled[0][0, -60:].any()
