"""The audio encoder of Qwen2.5-Omni: a Whisper encoder whose attention stays inside chunks of `2 * n_window` mel frames."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.models.attention import attend
from omnisapiens_jax.models.config import AudioConfig
from omnisapiens_jax.models.layers import Build, LayerNorm, Linear, Stack, shard

_gelu = functools.partial(jax.nn.gelu, approximate=False)


class Conv1d(nnx.Module):
    """Kernel-3 convolution along time with padding 1, written as one matrix product over three shifted copies."""

    def __init__(self, build: Build, features: tuple[int, int], stride: int, *, rngs: nnx.Rngs):
        """`features` are (in, out); the kernel is `[3 * in, out]`, tap-major."""
        self.dtype, self.stride = build.dtype, stride
        self.kernel = build.param(nnx.initializers.lecun_normal(), rngs, (3 * features[0], features[1]), (None, "mlp"))
        self.bias = build.param(nnx.initializers.zeros, rngs, (features[1],), ("mlp",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[M, T, in]` -> `[M, (T - 1) // stride + 1, out]`."""
        length = x.shape[1]
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (0, 0)))
        taps = [padded[:, tap : tap + length : self.stride] for tap in range(3)]
        return jnp.concatenate(taps, axis=-1) @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)


class AudioAttention(nnx.Module):
    """Bidirectional attention; the key projection has no bias."""

    def __init__(self, build: Build, config: AudioConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.heads = config.num_heads
        width = (config.d_model, config.d_model)
        self.q_proj = Linear(build, "q_proj", width, ("embed", "heads"), bias=True, rngs=rngs)
        self.k_proj = Linear(build, "k_proj", width, ("embed", "heads"), bias=False, rngs=rngs)
        self.v_proj = Linear(build, "v_proj", width, ("embed", "heads"), bias=True, rngs=rngs)
        self.out_proj = Linear(build, "out_proj", width, ("heads", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """`x [M, L, D]`, `segments [M, L]` (0 = past the chunk's end)."""
        q, k, v = (proj(x).reshape(*x.shape[:2], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, segments, segments, causal=False).out.reshape(x.shape))


class AudioLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, build: Build, config: AudioConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.self_attn = AudioAttention(build, config, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(build, config.d_model, 1e-5, rngs=rngs)
        self.fc1 = Linear(build, "fc1", (config.d_model, config.ffn_dim), ("embed", "mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear(build, "fc2", (config.ffn_dim, config.d_model), ("mlp", "embed"), bias=True, rngs=rngs)
        self.final_layer_norm = LayerNorm(build, config.d_model, 1e-5, rngs=rngs)

    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """`x [M, L, D]`, `segments [M, L]`."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), segments)
        return x + self.fc2(_gelu(self.fc1(self.final_layer_norm(x))))


class AudioEncoder(nnx.Module):
    """Log-mel chunks in, decoder-width audio tokens out."""

    def __init__(self, build: Build, config: AudioConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.config = config
        self.dtype = build.dtype
        self.conv1 = Conv1d(build, (config.num_mel_bins, config.d_model), 1, rngs=rngs)
        self.conv2 = Conv1d(build, (config.d_model, config.d_model), 2, rngs=rngs)
        # Stored in every published checkpoint and read by nothing; kept so that an import exports all it was given.
        self.audio_bos_eos_token = build.param(nnx.initializers.normal(0.02), rngs, (2, config.output_dim), (None, "norm"))
        self.layers = Stack(lambda r: AudioLayer(build, config, rngs=r), config.num_layers, build.remat, rngs=rngs)
        self.ln_post = LayerNorm(build, config.d_model, 1e-5, rngs=rngs)
        self.proj = Linear(build, "proj", (config.d_model, config.output_dim), (None, "embed"), bias=True, rngs=rngs)

    def __call__(self, chunks: jax.Array, frames: jax.Array, pairs: jax.Array) -> jax.Array:
        """Encodes the audio of a batch.

        Args:
          chunks: `[B, A, C, mels]` log-mel, C = `config.chunk_frames`.
          frames: `[B, A]` valid mel frames of each chunk; 0 = empty slot.
          pairs: `[B, Na, 2]` the two encoder states pooled into each audio token, as `chunk * L + position`, L = `config.chunk_tokens`.

        Returns: `[B, Na, output_dim]`.
        """
        batch, slots, length, mels = chunks.shape
        frames = frames.reshape(-1)
        inside = jnp.arange(length) < frames[:, None]  # [B*A, C]
        x = jnp.where(inside[..., None], chunks.reshape(-1, length, mels), 0).astype(self.dtype)
        # The first convolution spills over the end of a short chunk; the second must see zeros there.
        x = jnp.where(inside[..., None], _gelu(self.conv1(x)), 0)
        x = _gelu(self.conv2(x))
        states = x.shape[1]
        segments = (jnp.arange(states) < ((frames + 1) // 2)[:, None]).astype(jnp.int32)
        x = x + jnp.asarray(sinusoids(states, self.config.d_model), self.dtype)
        x = shard(x, "batch", None, "act_embed")
        x, _ = self.layers.run(lambda layer, x, _: (layer(x, segments), None), x)
        x = x.reshape(batch, slots * states, -1)
        x = jnp.take_along_axis(x, pairs.reshape(batch, -1)[..., None], axis=1).reshape(*pairs.shape, -1).mean(axis=2)
        return self.proj(self.ln_post(x))


def sinusoids(length: int, width: int) -> np.ndarray:
    """Whisper's position table `[length, width]`: sines in the first half, cosines in the second; restarts at 0 in every chunk."""
    rates = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * rates.astype(np.float32)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
