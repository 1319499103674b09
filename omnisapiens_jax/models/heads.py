"""Classification on top of the thinker: pooled hidden states, and one affine head for each domain of the label scheme."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.models.layers import Build, Linear, shard

_BUILD = Build("heads", jnp.float32, jnp.float32)  # small, and what is read off a sum over thousands of tokens: never in half precision


def pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean `[B, D]` in float32 of the states `[B, T, D]` where `mask [B, T]` is true; zero for a row without any.

    Of packed rows, whose mask is `[B, S, T]`, the mean of each sample, `[B, S, D]`. The released heads read the `penultimate` states of a
    thinker. Their sums can overflow half precision.
    """
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("btd,b...t->b...d", states.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(weights.sum(axis=-1), 1.0)[..., None]


def own_tokens(segments: jax.Array, domains: jax.Array) -> jax.Array:
    """Which of a row's tokens are a sample's, words and places of media alike: `[B, T]`, of packed rows `[B, S, T]`.

    Args:
      segments: `[B, T]`, as `processing.example.collate` numbers them.
      domains: `[B]`, or `[B, S]` of packed rows; only the shape is read.
    """
    if domains.ndim == 1:
        return segments == 1
    return segments[:, None] == 1 + jnp.arange(domains.shape[1])[:, None]


class DomainHeads(nnx.Module):
    """An affine map for each domain, side by side in one matrix; a row is scored on the labels of its own domain alone."""

    def __init__(self, width: int, labels: Sequence[int], *, rngs: nnx.Rngs):
        """`width` of the pooled states; `labels[i]` = how many labels domain `i` has."""
        self.labels = tuple(labels)
        self.affine = Linear(_BUILD, "heads", (width, sum(labels)), ("embed", None), bias=True, rngs=rngs)

    def __call__(self, pooled: jax.Array, domains: jax.Array) -> jax.Array:
        """Logits `[..., C]` over the labels of all domains, in their order.

        Args:
          pooled: `[..., D]` of `pool`.
          domains: `[...]`, each sample's domain. Labels of other domains get half of the least float32, all of them where it is negative
            (a row without classes).
        """
        of_label = jnp.asarray(np.repeat(np.arange(len(self.labels)), self.labels))
        logits = self.affine(pooled)
        scored = jnp.where(domains[..., None] == of_label, logits, jnp.finfo(jnp.float32).min / 2)
        return shard(scored, "batch", *[None] * (scored.ndim - 1))
