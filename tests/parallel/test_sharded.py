"""The same loss and the same gradients on one device, on 2 data x 2 fsdp x 2 tensor of them, and in micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.models.thinker import Thinker, token_log_probs
from omnisapiens_jax.parallel.mesh import divided, make_mesh, on_mesh, put_batch, shardings
from omnisapiens_jax.rl.loss import PolicyLossConfig
from omnisapiens_jax.rl.replay import load_rollout, save_rollout
from omnisapiens_jax.training import rl, sft
from tests import tiny
from tests.training import world

BOUND = 1e-5  # times the largest gradient of a leaf
ONE, EIGHT = (1, 1, 1), (2, 2, 2)

Gradients = dict[str, np.ndarray]


@functools.cache
def here(mesh: world.Mesh3) -> world.World:
    return world.world(world.config(mesh=mesh))


def flat(tree: Any) -> Gradients:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def sft_gradients(mesh: world.Mesh3, micro_batches: int = 1) -> tuple[float, Gradients]:
    at = here(mesh)
    with on_mesh(at.mesh):
        step = jax.jit(functools.partial(sft.sft_gradients, at.graph, micro_batches))
        loss, tokens, grads = step(at.state, put_batch(world.batch(target=True), at.mesh))
    assert float(tokens) > 50
    return float(loss), flat(grads)


@functools.cache
def lora_gradients(mesh: world.Mesh3) -> tuple[float, Gradients]:
    """With dropout, of factors that are not their beginning: B = 0 would hide what is dropped."""
    at = world.world(world.config(mesh=mesh, model__lora__rank=2, model__lora__targets__decoder=("q_proj", "down_proj")))
    state = at.state._replace(trainable=jax.tree.map(lambda leaf: jnp.where(leaf == 0, 0.1, leaf), at.state.trainable))
    with on_mesh(at.mesh):
        step = jax.jit(functools.partial(sft.sft_gradients, at.graph, 2, dropout=sft.Dropout(0.5, 0)))
        loss, _, grads = step(state, put_batch(world.batch(target=True), at.mesh))
    return float(loss), flat(grads)


@functools.cache
def grpo_gradients(
    mesh: world.Mesh3, path: Path, micro_batches: int = 1, order: tuple[int, ...] = ()
) -> tuple[tuple[float, Gradients], float]:
    at = here(mesh)
    rows = {name: array[list(order)] if order else array for name, array in rl.learner_batch(load_rollout(path)).items()}
    with on_mesh(at.mesh):
        step = jax.jit(functools.partial(rl.grpo_gradients, at.graph, PolicyLossConfig(), 1.0, micro_batches))
        loss, stats, grads = step(at.state, put_batch(rows, at.mesh))
    assert float(stats.clipped) > 0
    return (float(loss), flat(grads)), float(stats.tokens)


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "rollout.npz"
    save_rollout(path, world.rollout(here(ONE)))
    return path


def check(found: tuple[float, Gradients], wanted: tuple[float, Gradients]) -> None:
    assert abs(found[0] - wanted[0]) <= BOUND * max(abs(wanted[0]), 0.1)
    scales = {name: np.abs(gradient).max() for name, gradient in wanted[1].items()}
    errors = {name: np.abs(found[1][name] - gradient).max() / scales[name] for name, gradient in wanted[1].items() if scales[name]}
    name, worst = max(errors.items(), key=lambda item: item[1])
    print(f"loss {found[0]:.7f} / {wanted[0]:.7f}; of {len(errors)} leaves {name} differs most: {worst:.1e} of its largest gradient")
    assert worst <= BOUND, name
    silent = [name for name, scale in scales.items() if not scale]
    assert all(not np.abs(found[1][name]).max() for name in silent) and len(silent) < 3, silent


def test_a_seed_is_the_same_policy_on_any_mesh() -> None:
    one, eight = flat(here(ONE).state), flat(here(EIGHT).state)
    assert all(np.array_equal(one[name], eight[name]) for name in one)
    divided = [leaf for leaf in jax.tree.leaves(here(EIGHT).state.trainable) if leaf.addressable_shards[0].data.size < leaf.size]
    assert len(divided) > 20


def test_an_sft_step_is_the_same_on_eight_devices() -> None:
    check(sft_gradients(EIGHT), sft_gradients(ONE))


@pytest.mark.slow
def test_lora_drops_the_same_on_eight_devices() -> None:
    check(lora_gradients(EIGHT), lora_gradients(ONE))


def test_an_sft_step_is_the_same_in_micro_batches() -> None:
    check(sft_gradients(ONE, 2), sft_gradients(ONE))


def test_a_grpo_step_is_the_same_on_eight_devices(replay: Path) -> None:
    check(grpo_gradients(EIGHT, replay)[0], grpo_gradients(ONE, replay)[0])


def test_a_grpo_step_is_the_same_in_micro_batches(replay: Path) -> None:
    check(grpo_gradients(ONE, replay, 2)[0], grpo_gradients(ONE, replay)[0])


@pytest.mark.parametrize("mesh", [ONE, EIGHT])
def test_groups_without_signal_are_not_run_and_change_nothing(mesh: world.Mesh3, replay: Path, tmp_path: Path) -> None:
    rollout = load_rollout(replay)
    advantages = rollout.advantages.copy()
    advantages[[0, 3, 4, 5, 6]] = 0.0
    path = tmp_path / "quiet.npz"
    save_rollout(path, dataclasses.replace(rollout, advantages=advantages))
    order = tuple(rl.live_first(advantages, mesh[0] * mesh[1], 2).tolist())
    assert sorted(order) == list(range(8))
    (whole, all_tokens), (parted, tokens) = grpo_gradients(ONE, path), grpo_gradients(mesh, path, 2, order)
    check(parted, whole)
    assert tokens == rollout.mask[list(order)][::2].sum() < all_tokens  # every second group: the first micro-batch alone


def test_no_device_makes_the_logits_of_a_whole_chunk() -> None:
    vocabulary, chunk, mesh = 16_384, 1024, world.mesh_of((1, 4, 1))
    config = dataclasses.replace(tiny.TINY, text=dataclasses.replace(tiny.TINY.text, vocab_size=vocabulary))
    graph, params = nnx.split(nnx.eval_shape(lambda: Thinker(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params, shardings(params, mesh))

    def loss(params: nnx.State, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return token_log_probs(nnx.merge(graph, params), hidden, targets, chunk=chunk).sum()

    shape = (8, 4, 128)
    hidden = jax.ShapeDtypeStruct((*shape, config.text.hidden_size), jnp.float32, sharding=divided(mesh))
    targets = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=divided(mesh))
    with on_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(params, hidden, targets).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < chunk * vocabulary * 4


def test_a_wrong_mesh_is_named() -> None:
    with pytest.raises(ValueError, match="fsdp=0 x tensor=1: every axis must be at least 1"):
        make_mesh(-1, 0, 1)
    with pytest.raises(ValueError, match="mesh data=2 x fsdp=3 x tensor=1 needs 6 devices; there are 8"):
        make_mesh(2, 3, 1)
