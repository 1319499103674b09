"""The supervised classifier of Human Behavior Atlas: a thinker whose pooled penultimate states are scored by the head of each domain."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from omnisapiens_jax.models.heads import DomainHeads, own_tokens, pool
from omnisapiens_jax.models.thinker import Batch, Thinker


class Classifier(nnx.Module):
    """Prompts in, a class out. The LM head and the decoder's last layer are never run."""

    def __init__(self, thinker: Thinker, labels: Sequence[int], *, rngs: nnx.Rngs):
        """Random heads on `thinker`; `labels[i]` = how many labels domain `i` has."""
        self.thinker = thinker
        self.heads = DomainHeads(thinker.config.text.hidden_size, labels, rngs=rngs)

    def pooled(self, batch: Batch) -> jax.Array:
        """Mean penultimate states `[B, D]` (packed: `[B, S, D]`, of each sample) over words and media, in float32.

        Reads what the thinker reads of rows that end with the prompt, and of `domain` the shape.
        """
        return pool(self.thinker.penultimate(batch), own_tokens(batch["segment_ids"], batch["domain"]))

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits `[B, C]` (packed: `[B, S, C]`) over the labels of all domains; see `DomainHeads` for those of other domains."""
        return self.heads(self.pooled(batch), batch["domain"])


def best_class(classifier: Classifier, batch: Batch) -> jax.Array:
    """The likeliest class within its domain of each sample, among those of all domains: `[B]` (packed: `[B, S]`); -1 without a domain."""
    return jnp.where(batch["domain"] >= 0, jnp.argmax(classifier(batch), axis=-1), -1)
