"""What supervised training minimises: the language-model loss on responses, and the classification loss of the heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from omnisapiens_jax.models.layers import shard
from omnisapiens_jax.models.thinker import Batch, Thinker, token_log_probs

_CHUNK = 64  # places of every row whose logits may be needed together


@dataclasses.dataclass(frozen=True)
class Objective:
    """A mean over the parts of a batch that count.

    Attributes:
      loss: of a model on a batch: the sum, and how many parts it is of, float32 scalars that add up over micro-batches.
      count: how many parts of a batch count, known without the model.
      unit: what these parts are.
    """

    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    count: Callable[[Batch], jax.Array]
    unit: str


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


def class_loss(classifier: Callable[[Batch], jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the samples that have a class, over the labels of their domain: those of the others are out of reach.

    Args:
      classifier: gives the logits, as `models.classifier.Classifier` does.
      batch: as `processing.example.collate` makes it, of prompts alone; `label` is a class among those of all domains, negative for a
        sample that has none and does not count.

    Returns: as `lm_loss`, the sum and the number of classified samples.
    """
    classified = batch["label"] >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(classifier(batch), jnp.maximum(batch["label"], 0))
    return jnp.sum(jnp.where(classified, losses, 0.0)), jnp.sum(classified, dtype=jnp.float32)


def share_loss(classifier: Callable[[Batch], jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
    """As `class_loss`, against the `shares` of each class among a sample's raters, `[B, C]` (packed: `[B, S, C]`), that a batch has too."""
    classified = batch["label"] >= 0
    losses = optax.softmax_cross_entropy(classifier(batch), batch["shares"])
    return jnp.sum(jnp.where(classified, losses, 0.0)), jnp.sum(classified, dtype=jnp.float32)


def confusion(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How often samples of a class (row) were taken for each (column), `[C, C + 1]`; they add up over batches.

    Args:
      logits: `[..., C]`; the largest is what a sample is taken for.
      labels: `[...]`, negative for a sample that has no class and does not count.

    Returns: float32 counts; the last column, of no class at all, stays empty. See `evaluation.metrics`.
    """
    classes = logits.shape[-1]
    gold = jax.nn.one_hot(labels.reshape(-1), classes)
    found = jax.nn.one_hot(jnp.argmax(logits, axis=-1).reshape(-1), classes + 1)
    return shard(gold.T @ found, None, None)


def mean(sums: Iterable[tuple[jax.Array, jax.Array]]) -> float:
    """Of batches whose sums and counts a loss has given; 0 of none that count."""
    loss, count = (sum(float(part) for part in column) for column in zip(*[*sums], strict=True))  # all are launched, then fetched
    return loss / max(count, 1.0)


ANSWERS = Objective(lm_loss, lambda batch: jnp.sum(batch["labels"][:, 1:] >= 0), "tokens")
CLASSES = Objective(class_loss, lambda batch: jnp.sum(batch["label"] >= 0), "samples")
SHARES = dataclasses.replace(CLASSES, loss=share_loss)
