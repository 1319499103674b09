"""A recorded rollout: all the learner needs to repeat its update, on any mesh and with any algorithm.

One `.npz` file (no pickle inside) that holds the arrays and, as UTF-8 JSON under `meta`, the texts. It is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np

_FORMAT = "omnisapiens-rollout-1"
_BATCH = "batch."


@dataclasses.dataclass(frozen=True)
class Rollout:
    """n responses to each of G prompts, as sampled at one policy step.

    Attributes:
        batch: the prompts with their media as the model was fed them, `processing.collate`'s arrays, each [G, ...].
        sample_ids: [G] int, the samples' row indices in the atlas.
        tokens: [G, n, R] int32 response tokens, padded on the right.
        mask: [G, n, R] bool, True up to and including the end token.
        log_probs: [G, n, R] float32 under the sampling policy.
        rewards: [G, n] float32.
        advantages: [G, n] float32, as they were used.
        row_mask: [G, n] bool, False for rollouts that do not count.
        texts: G tuples of n decoded responses.
        golds: G gold answers.
        tasks: G task names, e.g. `emotion_cls`.
        step: policy step, updates made before sampling.
        temperature: that the logits were divided by.
    """

    batch: dict[str, np.ndarray]
    sample_ids: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    log_probs: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    row_mask: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    golds: tuple[str, ...]
    tasks: tuple[str, ...]
    step: int
    temperature: float

    def __post_init__(self) -> None:
        """Raises ValueError where shapes disagree, or where an array would not survive a file."""
        if self.tokens.ndim != 3:
            raise ValueError(f"tokens must be [groups, rollouts, response], got shape {self.tokens.shape}")
        groups, rollouts, _ = self.tokens.shape
        wanted = {"sample_ids": (groups,)}
        wanted |= dict.fromkeys(("mask", "log_probs"), self.tokens.shape)
        wanted |= dict.fromkeys(("rewards", "advantages", "row_mask"), (groups, rollouts))
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, but tokens {self.tokens.shape} ask for {shape}")
        if {len(self.texts), len(self.golds), len(self.tasks)} != {groups} or any(len(row) != rollouts for row in self.texts):
            raise ValueError(f"need {groups} golds, {groups} tasks and {groups} x {rollouts} texts")
        for name, array in _arrays(self).items():
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{name} has dtype {array.dtype}, which a .npz file does not keep: convert it to float32 first")
            if name.startswith(_BATCH) and array.shape[:1] != (groups,):
                raise ValueError(f"{name} has shape {array.shape}: the first axis must be the {groups} prompts")


def save_rollout(path: str | Path, rollout: Rollout) -> None:
    """Writes a rollout to `path`, replacing what was there only when the new file is complete."""
    path = Path(path)
    meta = {name: getattr(rollout, name) for name in ("texts", "golds", "tasks", "step", "temperature")} | {"format": _FORMAT}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **_arrays(rollout), meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_rollout(path: str | Path) -> Rollout:
    """Reads what `save_rollout` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no rollout, is damaged, or its parts do not fit together.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta.pop("format") != _FORMAT:
            raise ValueError(f"not of the format {_FORMAT}")
        batch = {name.removeprefix(_BATCH): arrays.pop(name) for name in list(arrays) if name.startswith(_BATCH)}
        meta["texts"] = tuple(map(tuple, meta["texts"]))
        return Rollout(batch=batch, **arrays, **meta | {name: tuple(meta[name]) for name in ("golds", "tasks")})
    except FileNotFoundError:
        raise
    except (OSError, EOFError, KeyError, TypeError, AttributeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable rollout record ({error}); it may be damaged: record the rollout again") from error


def _arrays(rollout: Rollout) -> dict[str, np.ndarray]:
    own = ("sample_ids", "tokens", "mask", "log_probs", "rewards", "advantages", "row_mask")
    return {name: getattr(rollout, name) for name in own} | {_BATCH + name: array for name, array in rollout.batch.items()}
