"""The vision encoder of Qwen2.5-Omni: window attention in most blocks, whole-frame attention in a few."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.models.attention import attend
from omnisapiens_jax.models.config import PIXEL_MEAN, PIXEL_STD, VisionConfig
from omnisapiens_jax.models.layers import Build, Linear, RMSNorm, Stack, SwiGLU, rotate, shard


class VisionAttention(nnx.Module):
    """Bidirectional attention with separate q, k and v and a two-dimensional rotary embedding."""

    def __init__(self, build: Build, config: VisionConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.heads = config.num_heads
        width = (config.hidden_size, config.hidden_size)
        self.q = Linear(build, "q", width, ("embed", "heads"), bias=True, rngs=rngs)
        self.k = Linear(build, "k", width, ("embed", "heads"), bias=True, rngs=rngs)
        self.v = Linear(build, "v", width, ("embed", "heads"), bias=True, rngs=rngs)
        self.proj = Linear(build, "proj", width, ("heads", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, segments: jax.Array) -> jax.Array:
        """`x [M, S, D]`, `angles [M, S, H/2]`, `segments [M, S]` (0 = empty slot)."""
        q, k, v = (proj(x).reshape(*x.shape[:2], self.heads, -1) for proj in (self.q, self.k, self.v))
        out = attend(rotate(q, angles), rotate(k, angles), v, segments, segments, causal=False).out
        return self.proj(out.reshape(x.shape))


class VisionBlock(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, build: Build, config: VisionConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.norm1 = RMSNorm(build, config.hidden_size, 1e-6, rngs=rngs)
        self.norm2 = RMSNorm(build, config.hidden_size, 1e-6, rngs=rngs)
        self.attn = VisionAttention(build, config, rngs=rngs)
        self.mlp = SwiGLU(build, config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, segments: jax.Array, whole_frame: jax.Array) -> jax.Array:
        """`x [M, W, P, D]`: attention over P, or over W*P where the scalar `whole_frame` is true."""
        normed = self.norm1(x)

        def inside(shape: tuple[int, int]) -> jax.Array:
            flat = (leaf.reshape(*shape, *leaf.shape[3:]) for leaf in (normed, angles, segments))
            return self.attn(*flat).reshape(x.shape)

        frames, windows, patches = x.shape[:3]
        if windows == 1:  # one window is the whole frame
            x = x + inside((frames, patches))
        else:
            x = x + jax.lax.cond(whole_frame, lambda: inside((frames, windows * patches)), lambda: inside((frames * windows, patches)))
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Joins the patches of a cell and projects them to the decoder's width."""

    def __init__(self, build: Build, config: VisionConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        joined = config.hidden_size * config.cell_patches
        self.joined = joined
        self.ln_q = RMSNorm(build, config.hidden_size, 1e-6, rngs=rngs)
        self.fc1 = Linear(build, "merger", (joined, joined), ("embed", "mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear(build, "merger", (joined, config.out_hidden_size), ("mlp", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, S, D]` -> `[B, S / cell_patches, out_hidden_size]`."""
        x = self.ln_q(x).reshape(x.shape[0], -1, self.joined)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionEncoder(nnx.Module):
    """Patches in window order in, decoder-width cells out (still in window order: the media index undoes it)."""

    def __init__(self, build: Build, config: VisionConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.config = config
        self.patch_embed = Linear(build, "patch_embed", (config.patch_dim, config.hidden_size), (None, "embed"), bias=False, rngs=rngs)
        self.blocks = Stack(lambda r: VisionBlock(build, config, rngs=r), config.depth, build.remat, rngs=rngs)
        self.merger = PatchMerger(build, config, rngs=rngs)

    def __call__(self, patches: jax.Array, mask: jax.Array, coords: jax.Array) -> jax.Array:
        """Encodes the images and video frames of a batch.

        Args:
          patches: `[B, F, W, P, patch_dim]`, F frames of W windows of P patch slots: uint8 pixels, or normalised ones.
          mask: `[B, F, W, P]` bool, true where a patch is.
          coords: `[B, F, W, P, 2]` row and column, in patches.

        Returns: `[B, F * W * P / cell_patches, out_hidden_size]`.
        """
        batch, frames, windows, slots, _ = patches.shape
        merge = functools.partial(jnp.reshape, shape=(batch * frames, windows, slots, -1))
        pixels = normalise(patches) if patches.dtype == jnp.uint8 else patches
        x = shard(self.patch_embed(merge(pixels)), "batch", None, None, "act_embed")
        angles = rope_angles(merge(coords), self.config.hidden_size // self.config.num_heads)
        segments = merge(mask)[..., 0].astype(jnp.int32)
        whole_frame = np.isin(np.arange(self.config.depth), self.config.fullatt_block_indexes)
        x, _ = self.blocks.run(lambda block, x, whole: (block(x, angles, segments, whole), None), x, jnp.asarray(whole_frame))
        return self.merger(x.reshape(batch, frames * windows * slots, -1))


def normalise(pixels: jax.Array) -> jax.Array:
    """Bytes `[..., patch_dim]` of patches, flattened channel first, as the encoder was trained on them, in float32."""
    channels = pixels.reshape(*pixels.shape[:-1], len(PIXEL_MEAN), -1).astype(jnp.float32)
    return ((channels / 255.0 - PIXEL_MEAN[:, None]) / PIXEL_STD[:, None]).reshape(pixels.shape)


def rope_angles(coords: jax.Array, head_dim: int) -> jax.Array:
    """Rotary angles `[..., head_dim / 2]` of patches at `coords [..., 2]`: the rows' in the first half, the columns' in the second."""
    inverse = 10000.0 ** (-np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2))
    angles = coords[..., None].astype(jnp.float32) * inverse
    return angles.reshape(*coords.shape[:-1], -1)
