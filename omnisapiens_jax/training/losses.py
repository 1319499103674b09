"""The language-model loss on responses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omnisapiens_jax.models.thinker import Batch, Thinker, token_log_probs

_CHUNK = 64  # places of every row whose logits may be needed together


def lm_loss(thinker: Thinker, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the labelled tokens, each predicted from the state before it; media are encoded and merged.

    Logits are made where there are labels only: the labelled places of each row are gathered to its front, and chunks without any are
    not computed.

    Args:
      thinker: the model.
      batch: as `processing.example.collate` makes it; `labels [B, T]` unshifted, negative where not trained.

    Returns: the sum over the batch and the number of labelled tokens, float32 scalars; both add up over micro-batches.
    """
    hidden = thinker(batch).last[:, :-1]
    targets = batch["labels"][:, 1:]
    order = jnp.argsort(targets < 0, axis=1, stable=True)
    pad = -targets.shape[1] % _CHUNK
    targets = jnp.pad(jnp.take_along_axis(targets, order, axis=1), ((0, 0), (0, pad)), constant_values=-1)
    hidden = jnp.pad(jnp.take_along_axis(hidden, order[..., None], axis=1), ((0, 0), (0, pad), (0, 0)))

    def parts(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T / chunk, B, chunk, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, _CHUNK, *x.shape[2:]), 1, 0)

    log_probs = token_log_probs(thinker, parts(hidden), parts(targets), chunk=targets.shape[0] * _CHUNK)
    return -jnp.sum(log_probs), jnp.sum(targets >= 0, dtype=jnp.float32)
