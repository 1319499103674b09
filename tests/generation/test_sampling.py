"""What is sampled: the learner's own log-probabilities, the same whatever it is batched with, ended and masked right, truly distributed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.generation import sampling
from omnisapiens_jax.generation.sampling import Generator, Responses, Sampling, rollout_keys
from omnisapiens_jax.models.thinker import Thinker, token_log_probs
from tests import tiny
from tests.training import world

FREE = Sampling(rollouts=8, max_tokens=32, temperature=0.7, eos=(), pad=0, chunk=8)  # no end: every token counts
ENDED = dataclasses.replace(FREE, eos=tuple(range(10, 60)))  # about every twentieth token is an end
GRAPH, PARAMS = nnx.split(tiny.thinker())


def media() -> dict[str, jax.Array]:
    """Eight prompts with audio, video and words, out of the real pipeline."""
    return {name: jnp.asarray(array) for name, array in world.batch(target=False).items()}


@functools.cache
def generator(settings: Sampling, unroll: bool = True) -> Generator:
    return Generator(tiny.thinker(), settings, unroll=unroll)


def sample(settings: Sampling, batch: dict[str, jax.Array], *, step: int = 0, unroll: bool = True) -> Responses[np.ndarray]:
    generate = generator(settings, unroll)
    return generate(generate.view(PARAMS), batch, rollout_keys(0, step, batch["index"], settings.rollouts)).map(np.asarray)


@functools.cache
def free() -> Responses[np.ndarray]:
    return sample(FREE, media())


def learner(model: Thinker, batch: dict[str, jax.Array], responses: Responses[np.ndarray], temperature: float) -> np.ndarray:
    """The log-probabilities that the update computes."""

    def forward(params: nnx.State) -> jax.Array:
        thinker: Thinker = nnx.merge(nnx.graphdef(model), params)
        hidden = thinker.grouped(batch, jnp.asarray(responses.tokens), jnp.asarray(responses.mask))
        return token_log_probs(thinker, hidden, jnp.asarray(responses.tokens), temperature=temperature)

    return np.asarray(jax.jit(forward)(nnx.state(model)))


def test_log_probs_are_the_learners() -> None:
    responses = free()
    assert responses.mask.sum() == 8 * 8 * 32 >= 1000
    wanted = learner(tiny.thinker(), media(), responses, FREE.temperature)
    error = np.abs(responses.log_probs - wanted)
    print(f"{error.size} tokens behind media, float32: sampled and teacher-forced log-probabilities differ by at most {error.max():.1e}")
    assert error.max() <= 5e-5
    # ... and a position off by one, or the other temperature, would not pass for it.
    assert np.abs(responses.log_probs - learner(tiny.thinker(), media(), responses, 1.0)).max() > 0.1
    late = {**media(), "rope_delta": media()["rope_delta"] + 1}
    assert np.abs(responses.log_probs - learner(tiny.thinker(), late, responses, FREE.temperature)).max() > 5e-3


@pytest.mark.slow
def test_log_probs_in_bfloat16() -> None:
    """Sampler and learner round differently there; what that comes to is stated, and bounded."""
    model = nnx.jit(lambda: Thinker(tiny.TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))()
    tiny.loud(model)
    generate, batch = Generator(model, FREE, unroll=False), media()
    keys = rollout_keys(0, 0, batch["index"], FREE.rollouts)
    responses = generate(generate.view(nnx.state(model)), batch, keys).map(np.asarray)
    error = np.abs(responses.log_probs - learner(model, batch, responses, FREE.temperature))
    print(f"{error.size} tokens, bfloat16: sampled and teacher-forced differ by {error.mean():.1e} in the mean, {error.max():.1e} at most")
    assert error.mean() <= 1e-3 and error.max() <= 0.1


def test_a_sample_does_not_depend_on_its_company() -> None:
    batch, wanted = media(), free()
    order = jnp.asarray([5, 2, 7, 0, 3, 6, 1, 4])
    shuffled = {name: array[order] for name, array in batch.items()}
    found = sample(FREE, shuffled)
    np.testing.assert_array_equal(found.tokens, wanted.tokens[np.asarray(order)])
    np.testing.assert_allclose(found.log_probs, wanted.log_probs[np.asarray(order)], atol=5e-5)

    # Fewer neighbours, more padding.
    few = {name: array[2:5] for name, array in batch.items()}
    for name, filler in (("tokens", 0), ("segment_ids", 0), ("media_index", -1)):
        few[name] = jnp.pad(few[name], ((0, 0), (0, 24)), constant_values=filler)
    few["positions"] = jnp.pad(few["positions"], ((0, 0), (0, 0), (0, 24)))
    np.testing.assert_array_equal(sample(FREE, few).tokens, wanted.tokens[2:5])

    # Another step is another draw, and so is another rollout of the same prompt.
    assert (sample(FREE, batch, step=1).tokens != wanted.tokens).mean() > 0.5
    assert len({row.tobytes() for row in wanted.tokens[0]}) == FREE.rollouts


def test_stacked_layers_sample_the_same() -> None:
    np.testing.assert_array_equal(sample(FREE, media(), unroll=False).tokens, free().tokens)


def test_responses_end_once() -> None:
    batch = {**media(), "row_mask": jnp.arange(8) != 3}
    found, endless = sample(ENDED, batch), free()
    ends = np.isin(endless.tokens, ENDED.eos)
    wanted = np.cumsum(ends, axis=-1) - ends == 0  # up to and with the first end
    wanted[3] = False  # a masked slot
    np.testing.assert_array_equal(found.mask, wanted)
    np.testing.assert_array_equal(found.tokens, np.where(wanted, endless.tokens, ENDED.pad))
    assert not found.log_probs[~wanted].any()
    np.testing.assert_allclose(found.log_probs[wanted], endless.log_probs[wanted], atol=5e-5)
    lengths = wanted.sum(-1)
    assert lengths.max() == FREE.max_tokens and 1 in lengths  # never ended, and ended at once


def test_greedy_takes_the_likeliest() -> None:
    greedy, batch = dataclasses.replace(FREE, rollouts=1, temperature=0.0, max_tokens=8), media()
    found = sample(greedy, batch)

    def full(params: nnx.State, tokens: jax.Array) -> jax.Array:
        thinker: Thinker = nnx.merge(GRAPH, params)
        return thinker.logits(thinker.grouped(batch, tokens, jnp.ones(tokens.shape, bool)))

    logits = np.asarray(jax.jit(full)(PARAMS, jnp.asarray(found.tokens)))
    np.testing.assert_array_equal(found.tokens, logits.argmax(-1))
    top = np.sort(logits, axis=-1)
    assert (top[..., -1] - top[..., -2]).min() > 1e-4  # no closer race, which rounding might decide


def test_draws_follow_the_distribution() -> None:
    logits = jnp.asarray([1.0, 0.0, -1.0, 2.0, -30.0]) * 0.5
    count, temperature = 4000, 0.5
    keys = rollout_keys(7, 0, jnp.arange(count), 2)
    draw = jax.jit(sampling._draw, static_argnums=3)
    tokens, log_probs = draw(jnp.broadcast_to(logits, (count, 2, 5)), keys, jnp.asarray(3), temperature)
    expected = np.exp(np.asarray(logits, np.float64) / temperature)
    expected /= expected.sum()
    seen = np.bincount(np.asarray(tokens).ravel(), minlength=5)
    assert seen[4] == 0
    chi_square = (((seen - 2 * count * expected) ** 2) / (2 * count * expected))[:4].sum()
    assert chi_square < 16.3  # three degrees of freedom, one in a thousand
    np.testing.assert_allclose(np.asarray(log_probs), np.log(expected)[np.asarray(tokens)], atol=1e-5)
    # The rollouts of a prompt are independent: equal as often as two draws of that distribution are.
    together = np.mean(np.asarray(tokens)[:, 0] == np.asarray(tokens)[:, 1])
    assert abs(together - (expected**2).sum()) < 4 * np.sqrt(0.25 / count)


def test_the_cache_is_written_in_place() -> None:
    settings = Sampling(rollouts=16, max_tokens=512, temperature=1.0, eos=(), pad=0)
    batch = {name: jnp.asarray(array) for name, array in tiny.text_prompts((9, 12), 16).items()}
    config = dataclasses.replace(tiny.TINY, text=dataclasses.replace(tiny.TINY.text, num_layers=8))
    model = nnx.eval_shape(lambda: Thinker(config, rngs=nnx.Rngs(0)))
    generate, view, keys = Generator(model, settings, unroll=False), nnx.state(model), rollout_keys(0, 0, batch["index"], settings.rollouts)
    state = jax.eval_shape(generate._prefill, view, batch, keys)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    memory = generate._decode.lower(view, state).compile().memory_analysis()
    assert memory is not None and cache > 2e6
    assert memory.alias_size_in_bytes >= cache  # the donated cache is the result's
    print(f"cache {cache / 1e6:.1f} MB, temporaries of a decode chunk {memory.temp_size_in_bytes / 1e6:.1f} MB")
    assert memory.temp_size_in_bytes < cache
