"""A rollout survives the disk bit for bit; a damaged or interrupted file is never taken for one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.rl.replay import Rollout, load_rollout, save_rollout


def rollout(seed: int = 0, groups: int = 3, rollouts: int = 2, length: int = 5) -> Rollout:
    rng = np.random.default_rng(seed)
    shape = (groups, rollouts, length)
    return Rollout(
        batch={
            "tokens": rng.integers(0, 9, (groups, 4), np.int32),
            "patches": rng.standard_normal((groups, 0, 2, 4, 6)).astype(np.float32),
        },
        sample_ids=rng.integers(0, 99, groups),
        tokens=rng.integers(0, 99, shape, np.int32),
        mask=rng.random(shape) < 0.5,
        log_probs=-rng.exponential(1, shape).astype(np.float32),
        rewards=rng.standard_normal(shape[:2]).astype(np.float32),
        advantages=rng.standard_normal(shape[:2]).astype(np.float32),
        row_mask=np.ones(shape[:2], bool),
        texts=tuple(tuple(f"<think>{g}é笑\n</think>\\boxed{{{n}}}" for n in range(rollouts)) for g in range(groups)),
        golds=("joy", "not sarcasm", ""),
        tasks=("emotion_cls", "sarcasm_cls", "int_qa"),
        step=7,
        temperature=0.7,
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rollout_7.npz"
    first = rollout()
    save_rollout(path, first)
    second = load_rollout(path)
    for field in dataclasses.fields(Rollout):
        ours, theirs = getattr(first, field.name), getattr(second, field.name)
        if isinstance(ours, np.ndarray):
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes()), field.name
        elif field.name != "batch":
            assert ours == theirs, field.name
    assert first.batch.keys() == second.batch.keys()
    for name, array in first.batch.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            second.batch[name].dtype,
            second.batch[name].shape,
            second.batch[name].tobytes(),
        )
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "other"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rollout.npz"
    save_rollout(path, rollout())
    data = bytearray(path.read_bytes())
    if damage == "other":
        np.savez(path, tokens=np.zeros(3))
    else:
        place = data.index(rollout().log_probs.tobytes()) + 3
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        path.write_bytes({"truncated": data[: len(data) // 2], "flipped": flipped, "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(ValueError, match=r"rollout\.npz: not a readable rollout record"):
        load_rollout(path)


def test_a_missing_file_is_just_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        load_rollout(tmp_path / "nothing.npz")


def test_no_pickle_is_ever_read(tmp_path: Path) -> None:
    path = tmp_path / "rollout.npz"
    np.savez(path, meta=np.array([{"format": "x"}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_rollout(path)


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rollout.npz"
    save_rollout(path, rollout(0))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_rollout(path, rollout(1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": np.zeros((3, 2, 4), np.float32)}, r"log_probs has shape \(3, 2, 4\)"),
        ({"rewards": np.zeros((3, 3), np.float32)}, r"rewards has shape \(3, 3\)"),
        ({"golds": ("a",)}, "need 3 golds"),
        ({"texts": (("a",),) * 3}, "3 x 2 texts"),
        ({"batch": {"tokens": np.zeros((2, 4))}}, r"batch.tokens has shape \(2, 4\)"),
        ({"batch": {"tokens": np.array(["a"] * 3)}}, "batch.tokens has dtype <U1"),
    ],
)
def test_parts_that_do_not_fit_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(rollout(), **change)
