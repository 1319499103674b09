"""A thinker of a few thousand numbers that reads what `mini` reads: the bundled vocabulary, the same patches and mel frames."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax import nnx

from omnisapiens_jax.models.config import PRESETS, AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from omnisapiens_jax.models.thinker import Thinker

TINY = ThinkerConfig(
    text=TextConfig(
        vocab_size=1024,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        mrope_section=(1, 1, 2),
        rope_theta=100.0,
    ),
    audio=AudioConfig(d_model=16, num_layers=1, num_heads=2, ffn_dim=24, output_dim=32, n_window=25),
    vision=VisionConfig(
        depth=2, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32, window_size=56, fullatt_block_indexes=(1,)
    ),
    tokens=PRESETS["mini"].tokens,
)


@functools.cache
def thinker() -> Thinker:
    """The tiny thinker with weights so large that every part of it shows in the logits."""
    model = nnx.jit(lambda: Thinker(TINY, rngs=nnx.Rngs(0)))()
    loud(model)
    return model


def loud(model: Thinker, seed: int = 0) -> None:
    """Replaces embeddings, biases and norms by random numbers far from where training starts."""
    random = np.random.default_rng(seed)

    def shaken(path: tuple[object, ...], leaf: jax.Array) -> np.ndarray | jax.Array:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        noise = random.standard_normal(leaf.shape).astype(leaf.dtype)
        if "embed_tokens" in names:
            return noise
        if "bias" in names:
            return 0.3 * noise
        return 1 + 0.2 * noise if "scale" in names else leaf

    state = nnx.state(model)
    nnx.update(model, jax.tree_util.tree_map_with_path(shaken, state))


def text_prompts(lengths: tuple[int, ...], slots: int, *, jump: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Prompts of words alone, right-padded to `slots`; the positions after the third token lie `jump` further on."""
    random = np.random.default_rng(seed)
    rows, places = len(lengths), np.arange(slots)
    real = places < np.asarray(lengths)[:, None]
    positions = places + np.where(places >= 3, jump, 0)
    return {
        "tokens": np.where(real, random.integers(10, TINY.text.vocab_size, (rows, slots)), 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": np.broadcast_to(positions, (rows, 3, slots)).astype(np.int32),
        "prompt_length": np.asarray(lengths, np.int32),
        "rope_delta": np.full(rows, jump, np.int32),
        "media_index": np.full((rows, slots), -1, np.int32),
        "audio_pairs": np.zeros((rows, 0, 2), np.int32),
        "patches": np.zeros((rows, 0, 1, 4, TINY.vision.patch_dim), np.float32),
        "row_mask": np.ones(rows, bool),
        "index": np.arange(rows, dtype=np.int32),
    }
