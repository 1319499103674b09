"""The Behavioral Adapter Module as published: a descriptor of a whole clip in, something to add to a hidden state out.

What `models.behaviour` has beside it does the same by attention; both are a `Behaviour`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from omnisapiens_jax.models.decoder import Between
from omnisapiens_jax.models.layers import Build, LayerNorm, Linear

MODALITIES = ("video", "audio")  # in the order in which their deltas are added

Dropped = Mapping[str, jax.Array]  # [B] bool by modality: of which samples it is withheld, in training

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

    def __call__(self, descriptors: jax.Array, present: jax.Array, dropped: jax.Array | None = None) -> jax.Array:
        """Deltas `[B, D]` of descriptors `[B, F]`, zero where `present [B]` is false, whatever the descriptor is there.

        A `dropped [B]` descriptor is zeros before the norm, and nothing is scaled up for it, as published: what the norm's bias makes of
        that is added nevertheless.
        """
        seen = present if dropped is None else present & ~dropped
        x = jnp.where(seen[:, None], descriptors.astype(jnp.float32), 0.0)  # a NaN would otherwise spread through the gradients
        x = x if self.norm is None else self.norm(x)
        delta = self.alpha[...] * self.fc2(jax.nn.relu(self.fc1(x)))
        return jnp.where(present[:, None], delta, 0.0)


class Behaviour(Protocol):
    """How descriptors reach a thinker. A batch has what `processing.descriptors.batch` makes, and `media_starts [B, 2]`."""

    def remember(self, batch: Mapping[str, jax.Array], dropped: Dropped | None = None) -> Any:
        """What a batch's samples need, computed once and then read for every token."""
        ...

    def between(self, remembered: Any, time: jax.Array) -> Between:
        """What stands between the decoder's layers for tokens `[B, T]` with TMRoPE's temporal positions `time [B, T]`."""
        ...

    def finish(self, states: jax.Array, remembered: Any) -> jax.Array:
        """What the heads or the LM head read in the place of `states [B, D]` or `[B, T, D]`."""
        ...


class ResidualAdapters(nnx.Module):
    """The published kind: an adapter for each modality that a dataset has descriptors of."""

    def __init__(self, adapters: Mapping[str, ResidualAdapter], depth: int | None = None):
        """`adapters` by modality, at least one. Their deltas are added to the states of all tokens that `depth` layers of the decoder have
        made; None: to what the heads or the LM head read, as published. A delta is the same for every token of a sample, so before the LM
        head it is a bias on its logits."""
        self.video, self.audio = (adapters.get(modality) for modality in MODALITIES)
        self.depth = depth

    def adapters(self) -> dict[str, ResidualAdapter]:
        """Those there are, in the order in which they are added."""
        return {name: adapter for name, adapter in (("video", self.video), ("audio", self.audio)) if adapter is not None}

    def remember(self, batch: Mapping[str, jax.Array], dropped: Dropped | None = None) -> tuple[jax.Array, ...]:
        """Deltas `[B, D]`."""
        return tuple(
            adapter(batch[f"{name}_descriptor"], batch[f"{name}_present"], None if dropped is None else dropped[name])
            for name, adapter in self.adapters().items()
        )

    def between(self, remembered: tuple[jax.Array, ...], time: jax.Array) -> Between:
        """The deltas, at `depth`."""
        return {} if self.depth is None else {self.depth: lambda x: _added(x, remembered)}

    def finish(self, states: jax.Array, remembered: tuple[jax.Array, ...]) -> jax.Array:
        """The deltas added, unless they were."""
        return _added(states, remembered) if self.depth is None else states


def _added(states: jax.Array, deltas: tuple[jax.Array, ...]) -> jax.Array:
    total = states.astype(jnp.float32)
    for delta in deltas:
        total = total + jnp.expand_dims(delta, range(1, states.ndim - 1))
    return total.astype(states.dtype)
