"""GRPO advantages: the golden of the published runs, the corner cases, and laws."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from omnisapiens_jax.rl.advantages import grpo_advantages

advantages = jax.jit(grpo_advantages)
GOLDEN_REWARDS = [1.7, 1.2, 0.2, 0.2, 0.7]
GOLDEN = [1.380535, 0.613571, -0.920357, -0.920357, -0.153393]


def run(rewards, mask=None) -> np.ndarray:
    rewards = np.asarray(rewards, np.float32)
    return np.asarray(advantages(rewards, np.ones(rewards.shape, bool) if mask is None else np.asarray(mask, bool)))


def test_golden() -> None:
    np.testing.assert_allclose(run([GOLDEN_REWARDS, GOLDEN_REWARDS[::-1]]), [GOLDEN, GOLDEN[::-1]], atol=6e-7)


def test_masked_rollouts_neither_count_nor_learn() -> None:
    rewards = [[*GOLDEN_REWARDS[:2], 99.0, np.nan, *GOLDEN_REWARDS[2:]], [np.inf] * 7]
    mask = [[1, 1, 0, 0, 1, 1, 1], [0] * 7]
    np.testing.assert_allclose(run(rewards, mask), [[*GOLDEN[:2], 0, 0, *GOLDEN[2:]], [0] * 7], atol=6e-7)


def test_a_group_of_one_keeps_its_reward() -> None:
    np.testing.assert_allclose(run([[1.7], [-0.3]]), [[1.7], [-0.3]], rtol=2e-6)
    np.testing.assert_allclose(run([[5.0, 1.7, 5.0]], [[0, 1, 0]]), [[0, 1.7, 0]], rtol=2e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, 1.2, 1.7, 1e6])
def test_equal_rewards_teach_exactly_nothing(value: float) -> None:
    for size in (2, 3, 5, 7):
        assert not run([[value] * size]).any()


groups = hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(2, 6)), elements=st.integers(-40, 40))


@given(groups, st.integers(-50, 50), st.integers(1, 20))
def test_shift_and_scale_of_a_group_do_not_matter(tenths: np.ndarray, shift: int, scale: int) -> None:
    base = run(tenths / 10)
    np.testing.assert_allclose(run(tenths / 10 + shift), base, atol=2e-4)
    np.testing.assert_allclose(run(tenths / 10 * scale), base, atol=1e-4)  # the std's epsilon is all that scales
    np.testing.assert_allclose(base.sum(-1), 0, atol=1e-5)


@given(groups)
def test_equals_numpy(tenths: np.ndarray) -> None:
    rewards = tenths / 10
    expected = (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(run(rewards), expected, atol=1e-5)
