"""How much better a rollout is than the others of its prompt. Pure and jittable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EPSILON = 1e-6


def grpo_advantages(rewards: jax.Array, mask: jax.Array) -> jax.Array:
    """GRPO: `(r - mean) / (unbiased std + 1e-6)` within each prompt's group.

    A group with one live rollout keeps its reward (mean 0, std 1), as in verl. Equal rewards give exactly 0.

    Args:
        rewards: [G, n] rewards of n rollouts of G prompts; may hold anything where masked.
        mask: [G, n] bool, False for rollouts (or whole groups) that do not count: they neither enter the statistics nor get an advantage.

    Returns:
        [G, n] float32, 0 where masked.
    """
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    # Measured from the group's first live reward: without it the rounding of the mean turns equal rewards into advantages of about 1e-2.
    first = jnp.take_along_axis(rewards, jnp.argmax(mask, axis=-1, keepdims=True), axis=-1)
    offset = jnp.where(mask, rewards - first, 0.0)
    mean = jnp.sum(offset, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(mask, offset - mean, 0.0)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)
    alone = count == 1
    return jnp.where(alone, rewards, centred) / (jnp.where(alone, 1.0, jnp.sqrt(variance)) + EPSILON)
