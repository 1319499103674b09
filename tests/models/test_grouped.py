"""Three ways through the decoder are one function: prompts with grouped responses, prefill and decode, and plain rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.models import decoder, thinker
from omnisapiens_jax.models.attention import Attended, attend, join
from omnisapiens_jax.models.decoder import KeyValue
from omnisapiens_jax.models.thinker import Thinker, last_token, response_positions, token_log_probs
from omnisapiens_jax.training.losses import lm_loss
from tests import tiny

LENGTHS, SLOTS, ROLLOUTS, RESPONSE, JUMP = (7, 10, 4), 10, 2, 5, 6
GRAPH, PARAMS = nnx.split(tiny.thinker())
PROMPTS = {name: jnp.asarray(array) for name, array in tiny.text_prompts(LENGTHS, SLOTS, jump=JUMP).items()}
RESPONSES = jnp.asarray(np.random.default_rng(1).integers(10, 1024, (len(LENGTHS), ROLLOUTS, RESPONSE)), jnp.int32)
SIZES = np.array([[5, 3], [1, 5], [4, 2]])
MASK = jnp.asarray(np.arange(RESPONSE) < SIZES[..., None])
WEIGHTS = jnp.asarray(np.random.default_rng(2).standard_normal(MASK.shape), jnp.float32) * MASK


def rows_of_prompt_and_response() -> dict[str, jax.Array]:
    """Every response behind its own copy of the prompt, without a gap: what one would write without groups."""
    total = SLOTS + RESPONSE
    rows = {"tokens": [], "segment_ids": [], "positions": []}
    for i, length in enumerate(LENGTHS):
        for j in range(ROLLOUTS):
            tokens = [*np.asarray(PROMPTS["tokens"])[i, :length], *np.asarray(RESPONSES)[i, j, : SIZES[i, j]]]
            places = np.arange(total) + np.where(np.arange(total) >= 3, JUMP, 0)
            rows["tokens"].append(np.pad(tokens, (0, total - len(tokens))))
            rows["segment_ids"].append(np.arange(total) < len(tokens))
            rows["positions"].append(np.broadcast_to(places, (3, total)))
    made = {name: jnp.asarray(np.stack(column), jnp.int32) for name, column in rows.items()}
    batch = len(LENGTHS) * ROLLOUTS
    media = {"media_index": jnp.full((batch, total), -1), "audio_pairs": jnp.zeros((batch, 0, 2), jnp.int32)}
    return made | media | {"patches": jnp.zeros((batch, 0, 1, 4, tiny.TINY.vision.patch_dim))}


def grouped_log_probs(params: nnx.State) -> jax.Array:
    model: Thinker = nnx.merge(GRAPH, params)
    return token_log_probs(model, model.grouped(PROMPTS, RESPONSES, MASK), RESPONSES)


def separate_log_probs(params: nnx.State) -> jax.Array:
    model: Thinker = nnx.merge(GRAPH, params)
    rows = rows_of_prompt_and_response()
    log_probs = jax.nn.log_softmax(model.logits(model(rows).last), axis=-1).reshape(len(LENGTHS), ROLLOUTS, SLOTS + RESPONSE, -1)
    places = jnp.asarray(LENGTHS)[:, None] + jnp.arange(RESPONSE) - 1  # the state before each response token
    chosen = jnp.take_along_axis(log_probs, places[:, None, :, None], axis=2)
    return jnp.take_along_axis(chosen, RESPONSES[..., None], axis=-1)[..., 0]


def with_gradient(log_probs: Callable[[nnx.State], jax.Array]) -> tuple[np.ndarray, nnx.State]:
    """The log-probabilities of all response tokens, and the gradient of a weighted sum of them."""

    def weighted(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        found = log_probs(params)
        return jnp.sum(WEIGHTS * found), found

    (_, found), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(PARAMS)
    return np.asarray(found)[np.asarray(MASK)], gradient


@functools.cache
def separate() -> tuple[np.ndarray, nnx.State]:
    return with_gradient(separate_log_probs)


def assert_close_leaves(found: nnx.State, wanted: nnx.State, bound: float) -> None:
    """Every leaf within `bound` times its largest value."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, ours), theirs in pairs:
        error, scale = np.abs(np.asarray(ours) - np.asarray(theirs)).max(), np.abs(np.asarray(theirs)).max()
        assert error <= bound * scale, f"{jax.tree_util.keystr(path)}: {error:.2e} of {scale:.2e}"


def test_a_group_equals_separate_rows() -> None:
    (found, ours), (wanted, theirs) = with_gradient(grouped_log_probs), separate()
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.ptp(wanted) > 3  # the weights are such that the prompt and the order of the tokens matter
    assert_close_leaves(ours, theirs, 2e-5)
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(ours["decoder"]))


DEFECTS = {
    "parts joined without their weights": (decoder, "join", lambda first, second: (first.out + second.out) / 2),
    "responses one position late": (thinker, "response_positions", lambda length, delta, step: response_positions(length, delta, step + 1)),
    "rope delta forgotten": (thinker, "response_positions", lambda length, delta, step: response_positions(length, 0 * delta, step)),
    "first token predicted from the padding": (thinker, "last_token", lambda states, lengths: states[:, -1]),
    "padding of the prompt attended to": (
        decoder,
        "attend",
        lambda q, k, v, own, other, causal: attend(q, k, v, own, other if causal else jnp.ones_like(other), causal=causal),
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_show(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = separate()
    monkeypatch.setattr(*DEFECTS[defect])
    found = np.asarray(jax.jit(lambda params: grouped_log_probs(params))(PARAMS))[np.asarray(MASK)]
    assert np.abs(found - wanted).max() > 2e-3  # a hundred times the bound


@pytest.mark.parametrize("unroll", [False, True])
def test_decoding_equals_teacher_forcing(unroll: bool) -> None:
    graph, params = GRAPH, PARAMS
    if unroll:
        model: Thinker = nnx.merge(GRAPH, jax.tree.map(jnp.copy, PARAMS))
        model.decoder.layers.unroll()
        graph, params = nnx.split(model)

    def decoded(params: nnx.State) -> jax.Array:
        model: Thinker = nnx.merge(graph, params)
        text = model.config.text
        hidden, prompt_kv = model.decoder.prefill(model.embed(PROMPTS), PROMPTS["positions"], PROMPTS["segment_ids"])
        assert prompt_kv is not None
        first = last_token(hidden.last, PROMPTS["prompt_length"])
        empty = jnp.zeros((len(LENGTHS) * ROLLOUTS, RESPONSE, text.num_kv_heads, text.head_dim))
        stacked = KeyValue(*(jnp.zeros((text.num_layers, *empty.shape)) for _ in range(2)))
        cache = [KeyValue(empty, empty) for _ in range(text.num_layers)] if unroll else stacked
        states = [jnp.broadcast_to(first[:, None], (len(LENGTHS), ROLLOUTS, text.hidden_size))]
        for step in range(RESPONSE - 1):
            x = model.decoder.embed(RESPONSES[:, :, step])
            positions = PROMPTS["prompt_length"] + PROMPTS["rope_delta"] + step
            out, cache = model.decoder.decode(x, positions, prompt_kv, PROMPTS["segment_ids"], cache, jnp.asarray(step))
            states.append(out)
        return token_log_probs(model, jnp.stack(states, axis=2), RESPONSES)

    found = np.asarray(jax.jit(decoded)(params))[np.asarray(MASK)]
    np.testing.assert_allclose(found, separate()[0], atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_attention_equal_one_block(causal: bool) -> None:
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((2, 13, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.array([[1] * 8 + [2] * 5, [1] * 11 + [0] * 2]))
    real = np.asarray(segments > 0)[..., None]

    def both(q: jax.Array, k: jax.Array, v: jax.Array, block: int) -> tuple[jax.Array, Attended]:
        done = attend(q, k, v, segments, segments, causal=causal, block=block)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(done.out), 0)) + jnp.sum(jnp.where(real, done.lse, 0)), done

    gradient = jax.jit(jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (_, one), whole = gradient(q, k, v, 13)
    (_, many), parts = gradient(q, k, v, 4)
    np.testing.assert_allclose(np.where(real[..., None], many.out, 0), np.where(real[..., None], one.out, 0), atol=1e-6)
    np.testing.assert_allclose(np.where(real, many.lse, 0), np.where(real, one.lse, 0), atol=1e-6)
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    scores = np.einsum("btkgh,bskh->btkgs", np.reshape(q, (2, 13, 2, 2, 4)), k).reshape(2, 13, 4, 13) / 2
    allowed = (segments[:, :, None] == segments[:, None]) & (np.tril(np.ones((13, 13), bool)) if causal else True)
    weights = np.exp(scores) * np.asarray(allowed)[:, :, None]
    plain = np.einsum("btns,bsnh->btnh", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(np.where(real[..., None], one.out, 0), np.where(real[..., None], plain, 0), atol=1e-5)
    np.testing.assert_allclose(np.where(real, one.lse, 0), np.where(real, np.log(weights.sum(-1)), 0), atol=1e-5)


def test_parts_join_to_the_whole() -> None:
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(3 * random.standard_normal((1, 6, heads, 4)), jnp.float32) for heads in (2, 1, 1))
    ones = jnp.ones((1, 6), jnp.int32)

    def over(part: slice) -> Attended:
        return attend(q, k[:, part], v[:, part], ones, ones[:, part], causal=False)

    joined, whole = jax.jit(lambda: (join(over(slice(0, 2)), over(slice(2, 6))), over(slice(0, 6)).out))()
    np.testing.assert_allclose(joined, whole, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_log_probs_and_their_gradient_are_the_plain_formula_whatever_the_chunk(tied: bool) -> None:
    random = np.random.default_rng(0)
    config = dataclasses.replace(tiny.TINY, tie_head=tied)
    graph, params = nnx.split(Thinker(config, rngs=nnx.Rngs(0)))
    hidden, targets = jnp.asarray(random.standard_normal((3, 7, 32)), jnp.float32), random.integers(0, 1024, (3, 7))
    targets[1], targets[2, 5:] = -1, -1  # not asked for; at 4 a chunk, one chunk whole
    head = np.asarray(nnx.merge(graph, params).head(), np.float64)

    def ours(params: nnx.State, hidden: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
        log_probs = token_log_probs(nnx.merge(graph, params), hidden, jnp.asarray(targets), temperature=0.7, chunk=chunk)
        return jnp.sum(jnp.sin(log_probs)), log_probs

    def plain(params: nnx.State, hidden: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(nnx.merge(graph, params).logits(hidden) / 0.7, axis=-1)
        picked = jnp.take_along_axis(log_probs, jnp.maximum(jnp.asarray(targets), 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.sin(jnp.where(jnp.asarray(targets) >= 0, picked, 0.0)))

    wanted = jax.jit(jax.grad(plain, argnums=(0, 1)))(params, hidden)
    logits = np.asarray(hidden, np.float64) @ head / 0.7
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = np.where(targets >= 0, np.take_along_axis(log_probs, np.maximum(targets, 0)[..., None], -1)[..., 0], 0)
    gradient = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True), static_argnums=2)
    by_hidden = jax.jit(jax.grad(ours, argnums=1, has_aux=True), static_argnums=2)  # the head frozen
    for chunk in (1024, 4):
        grads, found = gradient(params, hidden, chunk)
        np.testing.assert_allclose(found, log_probs, atol=1e-5)
        assert_close_leaves(grads, wanted, 1e-5)
        assert_close_leaves(by_hidden(params, hidden, chunk)[0], wanted[1], 1e-5)


def test_the_language_loss_is_the_plain_formula() -> None:
    random = np.random.default_rng(3)
    slots, lengths = 150, (150, 90, 20)  # more than one chunk of 64 labelled places, and rows with few or none
    batch = tiny.text_prompts(lengths, slots)
    labels = np.where(random.random((3, slots)) < 0.6, batch["tokens"], -100)
    labels[batch["segment_ids"] == 0] = -100
    labels[2] = -100
    batch["labels"] = labels.astype(np.int32)
    on_device = {name: jnp.asarray(array) for name, array in batch.items()}

    def ours(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        return lm_loss(nnx.merge(GRAPH, params), on_device)

    def plain(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        model: Thinker = nnx.merge(GRAPH, params)
        log_probs = jax.nn.log_softmax(model.logits(model(on_device).last[:, :-1]), axis=-1)
        wanted = on_device["labels"][:, 1:]
        picked = jnp.take_along_axis(log_probs, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * (wanted >= 0)), jnp.sum(wanted >= 0)

    ((loss, tokens), grads), ((wanted, count), whole) = (jax.jit(jax.value_and_grad(f, has_aux=True))(PARAMS) for f in (ours, plain))
    assert int(tokens) == int(count) > 100
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert_close_leaves(grads["decoder"], whole["decoder"], 1e-5)
