"""The Qwen2.5 decoder with TMRoPE: whole rows, prompts with groups of responses behind them, and one decoded token at a time.

All three read the same layers through `DecoderLayer.project` and `DecoderLayer.finish`, so sampler and learner share one forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.models.attention import Attended, attend, join
from omnisapiens_jax.models.config import TextConfig
from omnisapiens_jax.models.layers import Build, Linear, RMSNorm, Stack, SwiGLU, rotate, shard


class KeyValue(NamedTuple):
    """Keys and values of one layer `[..., S, K, H]`; stacked ones lead with the layers."""

    key: jax.Array
    value: jax.Array


Cache = KeyValue | list[KeyValue]  # stacked, or one entry a layer when the stack is unrolled


class Hidden(NamedTuple):
    """Decoder states `[..., T, D]`.

    `last` is after the final norm (`hidden_states[-1]` of transformers); `penultimate` is the raw input of the last layer
    (`hidden_states[-2]`), which classification heads and BAM pool.
    """

    last: jax.Array
    penultimate: jax.Array


class DecoderAttention(nnx.Module):
    """Grouped-query attention; q, k and v have biases, o has none."""

    def __init__(self, build: Build, config: TextConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.head_dim = config.head_dim
        hidden, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(build, "q_proj", (hidden, queries), ("embed", "heads"), bias=True, rngs=rngs)
        self.k_proj = Linear(build, "k_proj", (hidden, keys), ("embed", "kv_heads"), bias=True, rngs=rngs)
        self.v_proj = Linear(build, "v_proj", (hidden, keys), ("embed", "kv_heads"), bias=True, rngs=rngs)
        self.o_proj = Linear(build, "o_proj", (queries, hidden), ("heads", "embed"), bias=False, rngs=rngs)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, build: Build, config: TextConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.input_layernorm = RMSNorm(build, config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.self_attn = DecoderAttention(build, config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(build, config.hidden_size, config.rms_norm_eps, rngs=rngs)
        self.mlp = SwiGLU(build, config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)

    def project(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, KeyValue]:
        """`x [B, T, D]`, `angles [B, T, H/2]` -> rotated queries `[B, T, N, H]`, rotated keys and values `[B, T, K, H]`."""
        normed = self.input_layernorm(x)
        attn = self.self_attn
        q, k, v = (proj(normed).reshape(*x.shape[:2], -1, attn.head_dim) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k, v = shard(q, "batch", "length", "act_heads", None), *(shard(a, "batch", "length", "act_kv_heads", None) for a in (k, v))
        return rotate(q, angles), KeyValue(rotate(k, angles), v)

    def __call__(self, x: jax.Array, angles: jax.Array, segments: jax.Array) -> tuple[jax.Array, KeyValue]:
        """Whole rows, causal inside each segment: `x [B, T, D]` -> the same after this layer, and its keys and values."""
        query, kv = self.project(x, angles)
        return self.finish(x, attend(query, kv.key, kv.value, segments, segments, causal=True).out), kv

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds the attention output `[B, T, N, H]` and the MLP to the residual stream `x [B, T, D]`."""
        x = x + self.self_attn.o_proj(attended.reshape(*x.shape[:2], -1))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return shard(x, "batch", "length", "act_embed")


class Decoder(nnx.Module):
    """Token embeddings (media already merged in) to normed hidden states."""

    def __init__(self, build: Build, config: TextConfig, *, rngs: nnx.Rngs):
        """Shapes from `config`."""
        self.config = config
        self.dtype = build.dtype
        self.embed_tokens = build.param(nnx.initializers.normal(0.02), rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"))
        self.layers = Stack(lambda r: DecoderLayer(build, config, rngs=r), config.num_layers, build.remat, rngs=rngs)
        self.norm = RMSNorm(build, config.hidden_size, config.rms_norm_eps, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """`[..., T]` ids -> `[..., T, D]`."""
        table = shard(self.embed_tokens[...].astype(self.dtype), "vocab", None)  # a gather from a table split both ways is slow
        return table[tokens]

    def angles(self, positions: jax.Array) -> jax.Array:
        """TMRoPE angles `[B, T, H/2]` of `positions [B, 3, T]`: the first frequencies turn with time, then height, then width."""
        half = self.config.head_dim // 2
        inverse = self.config.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
        axis = np.repeat(np.arange(3), self.config.mrope_section)
        return jnp.moveaxis(positions[:, axis], 1, 2).astype(jnp.float32) * inverse

    def __call__(self, x: jax.Array, positions: jax.Array, segments: jax.Array) -> Hidden:
        """Whole rows, causal inside each segment.

        Args:
          x: `[B, T, D]` embeddings.
          positions: `[B, 3, T]`.
          segments: `[B, T]`; 0 = padding.
        """
        hidden, _ = self.prefill(x, positions, segments, keep=False)
        return hidden

    def prefill(self, x: jax.Array, positions: jax.Array, segments: jax.Array, *, keep: bool = True) -> tuple[Hidden, Cache | None]:
        """As `__call__`, and (when `keep`) every layer's keys and values `[L, B, T, K, H]` (a list of `KeyValue` when unrolled)."""
        angles = self.angles(positions)

        def body(layer: DecoderLayer, carry: Hidden, _: None) -> tuple[Hidden, KeyValue | None]:
            last, kv = layer(carry.last, angles, segments)
            return Hidden(last, carry.last), kv if keep else None

        hidden, kv = self.layers.run(body, Hidden(shard(x, "batch", "length", "act_embed"), x))
        return Hidden(self.norm(hidden.last), hidden.penultimate), kv

    def penultimate(self, x: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """`Hidden.penultimate` `[B, T, D]` alone, of what `__call__` takes: the last layer is not run."""
        angles = self.angles(positions)

        def body(layer: DecoderLayer, x: jax.Array) -> jax.Array:
            return layer(x, angles, segments)[0]

        return self.layers.run_first(self.config.num_layers - 1, body, shard(x, "batch", "length", "act_embed"))

    def grouped(
        self,
        prompt: jax.Array,
        prompt_positions: jax.Array,
        prompt_segments: jax.Array,
        responses: jax.Array,
        response_positions: jax.Array,
        response_segments: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Prompts and the n responses behind each, in one pass: every prompt is computed once, its keys are never copied.

        A response attends to the whole of its prompt and causally to itself. The gradient equals that of n separate rows.

        Args:
          prompt: `[B, P, D]` embeddings, right-padded.
          prompt_positions: `[B, 3, P]`.
          prompt_segments: `[B, P]`; 1 = token, 0 = padding.
          responses: `[B, n, R, D]` embeddings.
          response_positions: `[B, R]`, the same on all three axes and for all n.
          response_segments: `[B, n, R]`; 1 = token, 0 = padding.

        Returns: normed states of the prompt `[B, P, D]` and of the responses `[B, n, R, D]`.
        """
        batch, rollouts, length, width = responses.shape
        prompt_angles = self.angles(prompt_positions)
        angles = self._response_angles(response_positions)  # [B, R, H/2]
        row_angles = jnp.repeat(angles, rollouts, axis=0)
        row_segments = response_segments.reshape(batch * rollouts, length)
        ones = jnp.ones((batch, rollouts * length), jnp.int32)

        def body(layer: DecoderLayer, carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            p, r = carry
            p_query, p_kv = layer.project(p, prompt_angles)
            query, kv = layer.project(r, row_angles)
            own = attend(query, kv.key, kv.value, row_segments, row_segments, causal=True)
            r = layer.finish(r, _with_prompt(query, own, p_kv, prompt_segments, ones))
            p = layer.finish(p, attend(p_query, p_kv.key, p_kv.value, prompt_segments, prompt_segments, causal=True).out)
            return (p, r), None

        (p, r), _ = self.layers.run(body, (prompt, responses.reshape(batch * rollouts, length, width)))
        return self.norm(p), self.norm(r).reshape(responses.shape)

    def decode(
        self,
        x: jax.Array,
        positions: jax.Array,
        prompt_kv: Cache,
        prompt_segments: jax.Array,
        cache: Cache,
        step: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """One token of every response; its keys are written into `cache` at `step`, in place when the cache is donated.

        Args:
          x: `[B, n, D]` embeddings of the tokens.
          positions: `[B]`, the same on all axes and for all n.
          prompt_kv: `[L, B, P, K, H]`, as `prefill` gave them (a list when unrolled).
          prompt_segments: `[B, P]`.
          cache: `[L, B * n, R, K, H]` (a list when unrolled).
          step: scalar index of the token in its response.

        Returns: normed states `[B, n, D]` and the cache.
        """
        batch, rollouts, width = x.shape
        angles = jnp.repeat(self._response_angles(positions[:, None]), rollouts, axis=0)
        ones = jnp.ones((batch, rollouts), jnp.int32)
        unrolled = isinstance(cache, list)
        slots = (cache[0] if unrolled else cache).key.shape[-3]
        written = jnp.broadcast_to((jnp.arange(slots) <= step).astype(jnp.int32), (batch * rollouts, slots))
        one = jnp.ones((batch * rollouts, 1), jnp.int32)

        def body(layer: DecoderLayer, carry: tuple[jax.Array, Cache], xs: tuple[KeyValue, Any]) -> tuple[tuple[jax.Array, Cache], None]:
            (x, cache), (p_kv, index) = carry, xs
            query, new = layer.project(x, angles)
            cache = _write(cache, index, new, step)
            kv = cache[index] if unrolled else jax.tree.map(lambda leaf: leaf[index], cache)
            own = attend(query, kv.key, kv.value, one, written, causal=False)
            return (layer.finish(x, _with_prompt(query, own, p_kv, prompt_segments, ones)), cache), None

        depth = self.config.num_layers
        xs = list(zip(prompt_kv, range(depth), strict=True)) if unrolled else (prompt_kv, jnp.arange(depth))
        (x, cache), _ = self.layers.run(body, (x.reshape(batch * rollouts, 1, width), cache), xs)
        return self.norm(x).reshape(batch, rollouts, width), cache

    def _response_angles(self, positions: jax.Array) -> jax.Array:
        """Angles `[B, T, H/2]` of text at `positions [B, T]`."""
        return self.angles(jnp.broadcast_to(positions[:, None], (positions.shape[0], 3, positions.shape[1])))


def _write(cache: Cache, layer: Any, new: KeyValue, step: jax.Array) -> Cache:
    """Puts one token's `new` keys and values `[M, 1, K, H]` of `layer` into the cache at `step`, touching nothing else."""
    if isinstance(cache, list):
        kv = KeyValue(
            *(jax.lax.dynamic_update_slice(o, n.astype(o.dtype), (0, step, 0, 0)) for o, n in zip(cache[layer], new, strict=True))
        )
        return [*cache[:layer], kv, *cache[layer + 1 :]]
    start = (layer, 0, step, 0, 0)
    return KeyValue(*(jax.lax.dynamic_update_slice(o, n[None].astype(o.dtype), start) for o, n in zip(cache, new, strict=True)))


def _with_prompt(query: jax.Array, own: Attended, prompt: KeyValue, prompt_segments: jax.Array, ones: jax.Array) -> jax.Array:
    """Joins the attention `own` of rows `[B * n, T]` with their attention over the shared prompt `[B, P]`."""
    rows, length = query.shape[:2]
    batch = prompt.key.shape[0]
    together = query.reshape(batch, rows // batch * length, *query.shape[2:])  # all responses of a prompt as one row of queries
    over = attend(together, prompt.key, prompt.value, ones, prompt_segments, causal=False)
    return join(own, Attended(*(leaf.reshape(rows, length, *leaf.shape[2:]) for leaf in over)))
