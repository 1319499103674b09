"""What a GRPO step makes of its groups on the host: their order, and what is told of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.generation.sampling import Responses
from omnisapiens_jax.rl.rewards import Rewards
from omnisapiens_jax.training import rl


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_groups_with_signal_fill_the_first_micro_batches_of_their_device(
    blocks: int, micro_batches: int, each: int, data: st.DataObject
) -> None:
    block = micro_batches * each
    live = np.array(data.draw(st.lists(st.booleans(), min_size=blocks * block, max_size=blocks * block)))
    order = rl.live_first(np.where(live[:, None], [[1.0, -1.0]], 0.0), blocks, micro_batches)
    assert sorted(order) == list(range(len(live)))
    assert (order // block == np.arange(len(live)) // block).all(), "a group left its device"
    run = live[order].reshape(blocks, each, micro_batches).any(axis=(0, 1))
    needed = -(-live.reshape(blocks, block).sum(axis=1).max() // each)
    assert run.tolist() == [part < needed for part in range(micro_batches)]


def test_entropy_is_that_of_the_sampled_tokens() -> None:
    mask = np.array([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]], bool)
    chance = np.array([[[0.5, 0.25, 0.5], [0.125, 1, 1]], [[0.01, 0.01, 1], [0.01, 0.01, 0.01]]])
    responses = Responses(np.zeros(mask.shape, np.int32), np.where(mask, np.log(chance), 0.0).astype(np.float32), mask)
    none = np.zeros(4, np.float32)
    counted = np.array([[True, True], [False, False]])  # the second group is a slot without a sample
    told = rl.summary(responses, Rewards(none, none, none, none, none, ("",) * 4), counted)
    np.testing.assert_allclose(told["entropy"], -np.log([0.5, 0.25, 0.5, 0.125]).mean(), rtol=1e-6)
    assert told["response_length"] == 2.0 and "surprise" not in told
