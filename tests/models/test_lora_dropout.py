"""Dropout of LoRA branches: PEFT's formula, its odds, other draws in every place and step, and nothing of it where it is off."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.models.classifier import Classifier
from omnisapiens_jax.models.layers import LORA_TARGETS, Build, DropoutKey, Linear, LoraConfig, LoraParam, drop_lora
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.training.losses import CLASSES
from omnisapiens_jax.training.sft import Dropout, loss_sum, sft_gradients
from omnisapiens_jax.training.state import TrainState
from tests import tiny
from tests.oracle import run_oracle
from tests.training import world

IN, OUT, RANK, RATE = 24, 16, 4, 0.3
LORA = LoraConfig(RANK, 6.0, {"decoder": LORA_TARGETS["decoder"]})


def arrays() -> dict[str, np.ndarray]:
    """Input and parameters in torch's axes."""
    random = np.random.RandomState(5)
    shapes = {"x": (3, 7, IN), "kernel": (OUT, IN), "bias": (OUT,), "a": (RANK, IN), "b": (OUT, RANK)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def linear() -> Linear:
    build = Build("decoder", jnp.dtype(jnp.float32), jnp.dtype(jnp.float32), LORA)
    made, values = Linear(build, "q_proj", (IN, OUT), ("embed", "heads"), bias=True, rngs=nnx.Rngs(0)), arrays()
    for name, place in (("kernel", made.kernel), ("bias", made.bias), ("a", made.lora_a), ("b", made.lora_b)):
        assert place is not None
        place.set_value(jnp.asarray(values[name].T))
    return made


@functools.cache
def theirs() -> dict[str, np.ndarray]:
    given: dict[str, Any] = {"rate": RATE, "alpha": LORA.alpha, **arrays()}
    return run_oracle("lora_dropout", **given)


def ours(kept: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Output and gradients where PEFT's draws are ours."""
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, odds, shape: jnp.asarray(kept).reshape(shape))
    graph, factors, rest = nnx.split(linear(), LoraParam, ...)

    def total(factors: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = nnx.merge(graph, factors, rest)
        drop_lora(made, RATE, jax.random.key(0))
        y = made(x)
        return jnp.sum(y * y), y

    (own, by_x), y = jax.grad(total, argnums=(0, 1), has_aux=True)(factors, jnp.asarray(arrays()["x"]))
    pure: dict[str, Any] = nnx.to_pure_dict(own)
    return {"y": y, "grad/x": by_x, "grad/a": pure["lora_a"].T, "grad/b": pure["lora_b"].T}


@pytest.mark.oracle
def test_equals_peft_where_it_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = theirs()
    assert 0.6 < wanted["kept"].mean() < 0.8
    for name, value in ours(wanted["kept"], monkeypatch).items():
        # float32 sums of a few dozen products
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-5 * np.abs(wanted[name]).max())


@pytest.mark.oracle
def test_one_number_dropped_more_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = theirs()["kept"].copy()
    place = tuple(int(i) for i in np.argwhere(kept)[0])
    kept[place] = False
    apart = np.abs(ours(kept, monkeypatch)["y"] - theirs()["y"]).max()
    assert apart > 1e-3 * np.abs(theirs()["y"]).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_of_what_is_read_stays(dtype: Any) -> None:
    """Of n draws a share of RATE is 0, within five standard deviations, and the others are x / (1 - RATE)."""
    made, x, draws = linear(), jnp.full((50, 40, IN), 2.0, dtype), 50 * 40 * IN
    drop_lora(made, RATE, jax.random.key(1))
    read = np.asarray(made._dropped(x), np.float32)
    assert abs((read == 0).mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / draws)
    np.testing.assert_array_equal(np.unique(read), [0, np.float32(jnp.asarray(2.0, dtype) / (1 - RATE))])


@functools.cache
def parts() -> tuple[nnx.GraphDef, TrainState, dict[str, jax.Array]]:
    """A tiny classifier with LoRA and random factors, and a batch for it."""
    random = np.random.RandomState(0)
    thinker = Thinker(tiny.TINY, rngs=nnx.Rngs(0), lora=LORA)
    made = Classifier(thinker, (7, 8, 2, 2, 2, 2, 2), rngs=nnx.Rngs(1))
    graph, trainable, frozen = nnx.split(made, nnx.Any(LoraParam, nnx.PathContains("heads")), ...)
    trainable = jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape).astype(np.float32)), trainable)
    batch = {name: jnp.asarray(value) for name, value in world.batch(target=False).items()}
    return graph, TrainState(jnp.zeros((), jnp.int32), trainable, frozen, ()), batch


def keys(stack: nnx.Module) -> np.ndarray:
    return np.concatenate([np.asarray(jax.random.key_data(key)).reshape(-1, 2) for key in jax.tree.leaves(nnx.state(stack, DropoutKey))])


def test_every_place_and_every_step_drops_others() -> None:
    graph, state, _ = parts()
    found = []
    for step in range(3):
        made = nnx.merge(graph, state.trainable, state.frozen)
        drop_lora(made, RATE, Dropout(RATE, 0).key(jnp.asarray(step)))
        own = keys(made)
        assert len(own) == len(LORA_TARGETS["decoder"]) * tiny.TINY.text.num_layers
        found.append(own)
    assert len(np.unique(np.concatenate(found), axis=0)) == sum(map(len, found))


def test_nothing_is_drawn_where_it_is_off() -> None:
    """Without dropout a step is the program that it was, and so is validation always."""
    graph, state, batch = parts()

    def program(dropout: Dropout | None) -> str:
        return str(jax.make_jaxpr(functools.partial(sft_gradients, graph, 2, objective=CLASSES, dropout=dropout))(state, batch))

    assert "random_bits" not in program(None) and "random_bits" in program(Dropout(RATE, 0))
    params = nnx.merge_state(state.trainable, state.frozen)
    assert "random_bits" not in str(jax.make_jaxpr(functools.partial(loss_sum, graph, CLASSES))(params, batch))


@pytest.mark.slow
def test_a_step_is_repeated_and_the_next_is_another() -> None:
    graph, state, batch = parts()
    run = jax.jit(functools.partial(sft_gradients, graph, 1, objective=CLASSES, dropout=Dropout(RATE, 0)))
    first, again, later = run(state, batch), run(state, batch), run(state._replace(step=jnp.ones((), jnp.int32)), batch)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert float(first[0]) != float(later[0])
