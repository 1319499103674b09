"""The clipped policy-gradient loss of PPO and GRPO, with a dual clip, over groups of responses. Pure and jittable.

Everything is returned as a sum over a denominator given from outside, so that micro-batches of any split add up to one big batch:

    denominator = loss_denominator(mask_of_the_whole_batch, config.aggregation)
    loss = sum(policy_loss(..., denominator, config)[0] for each micro-batch)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Aggregation = Literal["token_mean", "seq_mean_token_mean"]

LOG_RATIO_LIMIT = 20.0


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """The policy loss; the defaults are those of the published runs.

    Attributes:
        clip_low: a token stops lowering its probability ratio below `1 - clip_low`.
        clip_high: and raising it above `1 + clip_high`.
        dual_clip: a negative advantage never costs more than this many times itself.
        aggregation: `token_mean`: every token of the global batch weighs the same. `seq_mean_token_mean`: every sequence weighs
            the same, which is what a token mean per micro-batch of one sequence (the published runs) comes to.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    aggregation: Aggregation = "token_mean"

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(f"need 0 <= clip_low < 1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, or it would clip unchanged tokens; got {self.dual_clip}")
        if self.aggregation not in ("token_mean", "seq_mean_token_mean"):
            raise ValueError(f"unknown aggregation {self.aggregation!r}: use 'token_mean' or 'seq_mean_token_mean'")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyStats:
    """Diagnostics of some micro-batches as sums over response tokens, added with `+` (a legal carry of `jax.lax.scan`)."""

    tokens: jax.Array
    clipped: jax.Array
    dual_clipped: jax.Array
    kl: jax.Array
    ratio_max: jax.Array

    @classmethod
    def zero(cls) -> PolicyStats:
        """What to add to."""
        zero = jnp.zeros((), jnp.float32)
        return cls(tokens=zero, clipped=zero, dual_clipped=zero, kl=zero, ratio_max=zero)

    def __add__(self, other: PolicyStats) -> PolicyStats:
        return PolicyStats(
            tokens=self.tokens + other.tokens,
            clipped=self.clipped + other.clipped,
            dual_clipped=self.dual_clipped + other.dual_clipped,
            kl=self.kl + other.kl,
            ratio_max=jnp.maximum(self.ratio_max, other.ratio_max),
        )

    def metrics(self) -> dict[str, jax.Array]:
        """Means over tokens: `clip_fraction`, `dual_clip_fraction`, `approx_kl` (old against new, k3); and `ratio_max`."""
        tokens = jnp.maximum(self.tokens, 1.0)
        return {
            "clip_fraction": self.clipped / tokens,
            "dual_clip_fraction": self.dual_clipped / tokens,
            "approx_kl": self.kl / tokens,
            "ratio_max": self.ratio_max,
        }


def loss_denominator(mask: jax.Array, aggregation: Aggregation) -> jax.Array:
    """What the summed loss of the whole batch is divided by: its tokens, or its sequences that have any; at least 1.

    Args:
        mask: [..., R] bool, response tokens of the *whole* batch, all micro-batches and hosts.
        aggregation: see `PolicyLossConfig`.

    Returns:
        A float32 scalar.
    """
    counted = mask if aggregation == "token_mean" else jnp.any(mask, axis=-1)
    return jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


def policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    denominator: jax.Array,
    config: PolicyLossConfig,
) -> tuple[jax.Array, PolicyStats]:
    """The clipped surrogate of verl 0.5: ratio = exp(clamp(log_probs - old_log_probs, ±20)), clip, dual clip, aggregate.

    Args:
        log_probs: [G, n, R] of the response tokens under the policy that learns.
        old_log_probs: [G, n, R] under the policy that sampled; no gradient flows through them.
        advantages: [G, n], one for each response.
        mask: [G, n, R] bool, True on response tokens up to and including the end token. Masked places may hold anything, NaN too.
        denominator: `loss_denominator` of the whole batch.
        config: clips and aggregation.

    Returns:
        This micro-batch's share of the loss, a float32 scalar, and its diagnostics.
    """
    delta = jnp.where(mask, log_probs.astype(jnp.float32) - jax.lax.stop_gradient(old_log_probs).astype(jnp.float32), 0.0)
    delta = jnp.clip(delta, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(delta)
    advantage = jax.lax.stop_gradient(advantages).astype(jnp.float32)[..., None]
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    pessimistic = jnp.maximum(plain, clipped)
    ceiling = -advantage * config.dual_clip
    losses = jnp.where(mask, jnp.where(advantage < 0, jnp.minimum(pessimistic, ceiling), pessimistic), 0.0)
    if config.aggregation == "seq_mean_token_mean":
        losses = losses / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)

    def count(chosen: jax.Array) -> jax.Array:
        return jnp.sum(mask & chosen, dtype=jnp.float32)

    stats = PolicyStats(
        tokens=jnp.sum(mask, dtype=jnp.float32),
        clipped=count(clipped > plain),
        dual_clipped=count((advantage < 0) & (pessimistic > ceiling)),
        kl=jnp.sum(jnp.expm1(delta) - delta),  # masked places are 0
        ratio_max=jnp.max(ratio, where=mask, initial=0.0),
    )
    return jnp.sum(losses) / denominator, jax.lax.stop_gradient(stats)
