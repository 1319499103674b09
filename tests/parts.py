"""Heads and adapters that torch has made, beside what it answers with them (`oracle_scripts/classifier_parts.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from omnisapiens_jax.convert.loading import fill_parts
from omnisapiens_jax.convert.parts import part_shapes
from omnisapiens_jax.models.bam import ResidualAdapter
from omnisapiens_jax.models.heads import DomainHeads
from omnisapiens_jax.processing.tensors import Tensor
from tests.oracle import run_oracle

WIDTH = 24
LABELS = (7, 8, 2, 2, 2, 2, 2)
LENGTHS = (1, 17, 30, 0, 5, 30, 12, 8)  # a row without a token, and one of each domain
DOMAINS = np.array([0, 1, 2, 0, 3, 4, 5, 6])
TARGETS = np.array([3, 12, 16, 0, 17, 20, 22, 24])  # among all labels


def states() -> tuple[np.ndarray, np.ndarray]:
    """Hidden states `[B, T, D]` as un-normed ones are, with a few channels far off, and where there is a token `[B, T]`."""
    random = np.random.default_rng(0)
    values = random.standard_normal((len(LENGTHS), max(LENGTHS), WIDTH)) + np.where(np.arange(WIDTH) % 7 == 3, 5.0, 0.0)
    return values.astype(np.float32), np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]


def form(features: int, hidden: int = 16, modality: str = "video", **more: bool) -> dict[str, Any]:
    """An adapter in the oracle's words: in today's form with a LayerNorm, but for what `more` says."""
    today = {"normed": True, "confidences": False, "conf_norm": False, "scalar": False}
    return {"features": features, "hidden": hidden, "modality": modality} | today | more


def torchs_answer(folder: Path, adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Lets torch write `heads.bin`, and a file for each adapter, into a folder; its pooled states, logits, losses and deltas."""
    values, mask = states()
    return run_oracle(
        "classifier_parts",
        folder=str(folder),
        labels=LABELS,
        adapters=dict(adapters),
        states=values,
        mask=mask,
        domains=DOMAINS,
        targets=TARGETS,
    )


def ours(parts: Mapping[str, Tensor], where: Path) -> tuple[DomainHeads | None, dict[str, ResidualAdapter]]:
    """Our modules with the values of some parts."""
    shapes = part_shapes(parts, WIDTH, where)
    heads = DomainHeads(WIDTH, shapes.heads, rngs=nnx.Rngs(0)) if shapes.heads else None
    adapters = {
        modality: ResidualAdapter(shape.features, shape.hidden, WIDTH, normed=shape.normed, rngs=nnx.Rngs(0))
        for modality, shape in shapes.adapters.items()
    }
    fill_parts(heads, adapters, parts)
    return heads, adapters
