"""The Behavioral Adapter Module as published: a descriptor of a whole clip in, something to add to a hidden state out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from omnisapiens_jax.models.layers import Build, LayerNorm, Linear

_BUILD = Build("bam", jnp.float32, jnp.float32)
_EPS = 1e-5  # of the norm. An L2-normed descriptor has a variance near 1e-4, so that this is felt: it may not be another


class ResidualAdapter(nnx.Module):
    """`alpha * (W2 relu(W1 norm(f) + b1) + b2)` for a descriptor `f`.

    The deltas of video and audio are added, in this order, to the pooled state before the heads, or to the last hidden states before the LM
    head. They do not depend on the thinker's states, so that a sample's deltas are the same for every token.
    """

    def __init__(self, features: int, hidden: int, width: int, *, normed: bool, alpha: float = 1.0, rngs: nnx.Rngs):
        """Widths of descriptor, hidden layer and the thinker's states; `normed` puts a LayerNorm first; `alpha` to begin with."""
        self.norm = LayerNorm(_BUILD, features, _EPS, rngs=rngs) if normed else None
        self.fc1 = Linear(_BUILD, "fc1", (features, hidden), (None, "mlp"), bias=True, rngs=rngs)
        self.fc2 = Linear(_BUILD, "fc2", (hidden, width), ("mlp", "embed"), bias=True, rngs=rngs)
        self.alpha = _BUILD.param(nnx.initializers.constant(alpha), rngs, (1,), ("norm",))

    def __call__(self, descriptors: jax.Array, present: jax.Array) -> jax.Array:
        """Deltas `[B, D]` of descriptors `[B, F]`, zero where `present [B]` is false, whatever the descriptor is there."""
        x = jnp.where(present[:, None], descriptors.astype(jnp.float32), 0.0)  # a NaN would otherwise spread through the gradients
        x = x if self.norm is None else self.norm(x)
        delta = self.alpha[...] * self.fc2(jax.nn.relu(self.fc1(x)))
        return jnp.where(present[:, None], delta, 0.0)
