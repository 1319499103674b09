"""The policy loss against two independent evaluations, one term at a time, and micro-batches against the whole."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnisapiens_jax.rl.loss import PolicyLossConfig, PolicyStats, loss_denominator, policy_loss
from tests.oracle import run_oracle

AGGREGATIONS = ("token_mean", "seq_mean_token_mean")


@functools.partial(jax.jit, static_argnums=5)
def loss_and_gradient(log_probs, old, advantages, mask, denominator, config):
    return jax.value_and_grad(policy_loss, has_aux=True)(log_probs, old, advantages, mask, denominator, config)


def case(seed: int, groups: int = 4, rollouts: int = 5, length: int = 17) -> tuple[np.ndarray, ...]:
    """Every branch is taken: far and near ratios of both signs, empty and full rows, and rubbish where masked."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.5, (groups, rollouts, length)).astype(np.float32)
    new = old + rng.choice([0.02, 0.3, 1.5, 12.0], old.shape).astype(np.float32) * rng.standard_normal(old.shape).astype(np.float32)
    advantages = rng.standard_normal((groups, rollouts)).astype(np.float32)
    lengths = rng.integers(1, length + 1, (groups, rollouts))
    lengths[0, 0], lengths[0, 1], lengths[-1, -1] = 0, 1, length
    return new, old, advantages, np.arange(length) < lengths[..., None]


def by_hand(new, old, advantages, mask, config: PolicyLossConfig) -> tuple[float, np.ndarray]:
    """The formula in float64, one token at a time, with its derivative written out."""
    loss, gradient = 0.0, np.zeros(new.shape)
    whole = mask.sum() if config.aggregation == "token_mean" else mask.any(-1).sum()
    for g, i, t in zip(*np.nonzero(mask), strict=True):
        weight = 1 / whole if config.aggregation == "token_mean" else 1 / whole / mask[g, i].sum()
        advantage = float(advantages[g, i])
        delta = float(new[g, i, t]) - float(old[g, i, t])
        ratio = np.exp(np.clip(delta, -20, 20))
        slope = ratio if abs(delta) < 20 else 0.0
        if advantage >= 0:
            free = ratio <= 1 + config.clip_high
            loss -= weight * advantage * (ratio if free else 1 + config.clip_high)
        else:
            free = 1 - config.clip_low <= ratio <= config.dual_clip
            loss -= weight * advantage * np.clip(ratio, 1 - config.clip_low, config.dual_clip)
        gradient[g, i, t] = -weight * advantage * slope if free else 0.0
    return loss, gradient


def assert_close(loss, gradient, expected_loss, expected_gradient) -> None:
    # The loss is a mean of terms of order 1 that cancel, hence absolute; the gradient is held to its largest element.
    assert abs(float(loss) - float(expected_loss)) <= 1e-6
    error = np.max(np.abs(np.asarray(gradient, np.float64) - expected_gradient)) / np.max(np.abs(expected_gradient))
    assert error <= 3e-6, f"gradient: {error:.1e} of its largest element"


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_formula(aggregation, seed: int) -> None:
    config = PolicyLossConfig(aggregation=aggregation)
    new, old, advantages, mask = case(seed)
    (loss, _), gradient = loss_and_gradient(new, old, advantages, mask, loss_denominator(jnp.asarray(mask), aggregation), config)
    expected_loss, expected_gradient = by_hand(new, old, advantages, mask, config)
    assert_close(loss, gradient, expected_loss, expected_gradient)
    assert not np.asarray(gradient)[~mask].any()


@pytest.mark.oracle
@pytest.mark.parametrize("clips", [(0.2, 0.2, 3.0), (0.1, 0.28, 2.0)])
def test_equals_torch_autograd(clips: tuple[float, float, float]) -> None:
    new, old, advantages, mask = case(7)
    names = dict(zip(("clip_low", "clip_high", "dual_clip"), clips, strict=True))
    truth = run_oracle("policy_loss", log_probs=new, old_log_probs=old, advantages=advantages, mask=mask, **names)
    for aggregation in AGGREGATIONS:
        config = PolicyLossConfig(**names, aggregation=aggregation)
        (loss, _), gradient = loss_and_gradient(new, old, advantages, mask, loss_denominator(jnp.asarray(mask), aggregation), config)
        assert_close(loss, gradient, truth[f"{aggregation}_loss"], truth[f"{aggregation}_gradient"])


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (1.0, 1.0, -1.0, -1.0),
        (1.0, 1.1, -1.1, -1.1),
        (1.0, 1.5, -1.2, 0.0),  # already likelier: no more
        (1.0, 0.5, -0.5, -0.5),  # made unlikelier by mistake: the full pull back
        (-1.0, 0.5, 0.8, 0.0),
        (-1.0, 1.5, 1.5, 1.5),
        (-1.0, 5.0, 3.0, 0.0),  # the dual clip
        (0.0, 5.0, 0.0, 0.0),
    ],
)
def test_each_region_of_one_token(advantage: float, ratio: float, loss: float, slope: float) -> None:
    one = np.ones((1, 1, 1), np.float32)
    (value, _), gradient = loss_and_gradient(np.log(ratio) * one, 0 * one, advantage * one[0], one > 0, jnp.float32(1), PolicyLossConfig())
    assert float(value) == pytest.approx(loss, rel=1e-6)
    assert float(gradient[0, 0, 0]) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole(aggregation) -> None:
    config = PolicyLossConfig(aggregation=aggregation)
    data = case(3, groups=6)
    denominator = loss_denominator(jnp.asarray(data[-1]), aggregation)
    (loss, stats), gradient = loss_and_gradient(*data, denominator, config)
    total, summed, parts = 0.0, PolicyStats.zero(), []
    for piece in (slice(0, 2), slice(2, 4), slice(4, 6)):  # of very different token counts
        (share, some), part = loss_and_gradient(*(array[piece] for array in data), denominator, config)
        total, summed = total + share, summed + some
        parts.append(part)
    np.testing.assert_allclose(total, loss, rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate(parts), gradient)
    for name, value in stats.metrics().items():
        np.testing.assert_allclose(summed.metrics()[name], value, rtol=1e-6, err_msg=name)


def test_masked_places_may_hold_anything() -> None:
    new, old, advantages, mask = case(5)
    config = PolicyLossConfig()
    denominator = loss_denominator(jnp.asarray(mask), config.aggregation)
    clean = loss_and_gradient(np.where(mask, new, 0), np.where(mask, old, 0), advantages, mask, denominator, config)
    for rubbish in (np.nan, np.inf, -np.inf, 1e30):
        dirty = loss_and_gradient(np.where(mask, new, rubbish), np.where(mask, old, -rubbish), advantages, mask, denominator, config)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_diagnostics_count_what_happened() -> None:
    ratios = np.array([[[1.0, 1.5, 1.1, 7.0]], [[0.5, 5.0, 0.9, 1.0]]], np.float32)
    advantages = np.array([[1.0], [-1.0]], np.float32)
    mask = np.array([[[1, 1, 1, 0]], [[1, 1, 1, 1]]], bool)
    new, weights, live = jnp.log(ratios), jnp.asarray(advantages), jnp.asarray(mask)
    _, stats = policy_loss(new, 0 * new, weights, live, jnp.float32(7), PolicyLossConfig())
    metrics = (PolicyStats.zero() + stats).metrics()
    kept = ratios[mask].astype(np.float64)
    assert metrics["clip_fraction"] == pytest.approx(2 / 7)  # 1.5 up, 0.5 down
    assert metrics["dual_clip_fraction"] == pytest.approx(1 / 7)  # 5.0
    assert metrics["approx_kl"] == pytest.approx(np.mean(kept - 1 - np.log(kept)), rel=1e-5)
    assert metrics["ratio_max"] == pytest.approx(5.0, rel=1e-6)


def test_nothing_flows_into_the_sampler_or_the_advantages() -> None:
    new, old, advantages, mask = map(jnp.asarray, case(1))
    gradients = jax.grad(lambda o, a: policy_loss(new, o, a, mask, jnp.float32(9), PolicyLossConfig())[0], argnums=(0, 1))(old, advantages)
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("clip_low", 1.0, "clip_low"), ("clip_high", -0.1, "clip_high"), ("dual_clip", 1.0, "dual_clip"), ("aggregation", "mean", "'mean'")],
)
def test_a_wrong_setting_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PolicyLossConfig(), **{field: value})
