"""One attention primitive: softmax attention over segments that also returns its log-sum-exp, and the join of two such parts.

No `[T, T]` buffer is ever built: queries go by in blocks, and a causal block reads only the keys up to its own end.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnisapiens_jax.models.layers import recomputed

_MASKED = -1e30  # finite, so that a fully masked row gives junk instead of NaN


class Attended(NamedTuple):
    """Attention output `[..., T, N, H]` and the log-sum-exp of its scores `[..., T, N]` (float32)."""

    out: jax.Array
    lse: jax.Array


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    causal: bool,
    block: int = 128,
) -> Attended:
    """Grouped-query attention inside segments.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; key/value head j serves query heads `j*N/K .. (j+1)*N/K - 1`.
      value: `[B, S, K, H]`.
      query_segments: `[B, T]` int; a query sees the keys of its own segment.
      key_segments: `[B, S]` int; 0 = never seen (padding).
      causal: query t sees keys s <= t only (T == S, order of the axis).
      block: queries handled at once; the score buffer is `[B, N, block, S]`.
    """
    length = query.shape[1]
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        seen = stop if causal else key.shape[1]
        step = recomputed(functools.partial(_attend_block, offset=start if causal else None))  # scores are not kept
        parts.append(step(query[:, start:stop], key[:, :seen], value[:, :seen], query_segments[:, start:stop], key_segments[:, :seen]))
    return parts[0] if len(parts) == 1 else Attended(*(jnp.concatenate(leaves, axis=1) for leaves in zip(*parts, strict=True)))


def _attend_block(
    query: jax.Array, key: jax.Array, value: jax.Array, query_segments: jax.Array, key_segments: jax.Array, offset: int | None
) -> Attended:
    """Attention of one block of queries; `offset` is the index of the first query when causal."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    # Heads first, queries of a key head together: the products then come out as they are read, and no [T, S] array is transposed.
    grouped = jnp.moveaxis(query.reshape(batch, length, kv_heads, -1, width), 1, 3).reshape(batch, kv_heads, -1, width)
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    scores = jnp.einsum("bkqh,bksh->bkqs", grouped, key, preferred_element_type=jnp.float32) * width**-0.5
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    allowed = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]
    if offset is not None:
        allowed &= jnp.arange(key.shape[2])[None, :] <= jnp.arange(offset, offset + length)[:, None]
    scores = jnp.where(allowed[:, None, None], scores, _MASKED)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    flat = (weights / total).astype(value.dtype).reshape(batch, kv_heads, -1, key.shape[2])
    out = jnp.einsum("bkqs,bksh->bkqh", flat, value).reshape(batch, kv_heads, -1, length, width)
    lse = (jnp.log(total) + peak)[..., 0]  # [B, K, G, T]
    return Attended(jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width), jnp.moveaxis(lse, 3, 1).reshape(batch, length, heads))


def join(first: Attended, second: Attended) -> jax.Array:
    """Attention over the union of two disjoint key sets, from the attention over each: weights `softmax(lse)`."""
    share = jax.nn.sigmoid(first.lse - second.lse)[..., None]  # exp(l1) / (exp(l1) + exp(l2))
    out = first.out.astype(jnp.float32) * share + second.out.astype(jnp.float32) * (1 - share)
    return out.astype(first.out.dtype)
