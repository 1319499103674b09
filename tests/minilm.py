"""A BERT of a few thousand numbers, as a file in the published layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from omnisapiens_jax.models.embedder import EmbedderConfig

TINY = EmbedderConfig(vocab_size=50, hidden_size=12, num_layers=3, num_heads=3, intermediate_size=20, max_positions=256)


def tiny_tensors(config: EmbedderConfig = TINY, seed: int = 0, scale: float = 0.5) -> dict[str, np.ndarray]:
    """Random tensors under the names of a BERT checkpoint, the unused ones too."""
    rng = np.random.default_rng(seed)
    d, f = config.hidden_size, config.intermediate_size
    tensors: dict[str, np.ndarray] = {"embeddings.position_ids": np.arange(config.max_positions)[None]}

    def add(name: str, *shape: int, around: float = 0.0, spread: float = scale) -> None:
        tensors[name] = (around + spread * rng.standard_normal(shape)).astype(np.float32)

    def norm(name: str) -> None:
        add(f"{name}.weight", d, around=1.0)
        add(f"{name}.bias", d)

    def linear(name: str, inputs: int, outputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    for name, rows in (("word", config.vocab_size), ("position", config.max_positions), ("token_type", 2)):
        add(f"embeddings.{name}_embeddings.weight", rows, d, spread=0.02 * scale)  # so small that a wrong LayerNorm epsilon shows
    norm("embeddings.LayerNorm")
    linear("pooler.dense", d, d)
    for i in range(config.num_layers):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"encoder.layer.{i}.attention.{name}", d, d)
        norm(f"encoder.layer.{i}.attention.output.LayerNorm")
        linear(f"encoder.layer.{i}.intermediate.dense", d, f)
        linear(f"encoder.layer.{i}.output.dense", f, d)
        norm(f"encoder.layer.{i}.output.LayerNorm")
    return tensors


def tiny_file(path: Path, **changes: np.ndarray) -> Path:
    """Writes the tiny model, with some tensors exchanged or added."""
    save_file(tiny_tensors() | changes, path)
    return path
