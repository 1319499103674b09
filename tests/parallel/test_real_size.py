"""The steps of a run, traced at 7B on 2 x 2 x 2 devices without a single weight: the same code, the real shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.core import jaxprs_in_params

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.parallel.mesh import divided, make_mesh, on_mesh, shardings
from omnisapiens_jax.processing.example import Bucket, collate
from omnisapiens_jax.rl.loss import PolicyLossConfig
from omnisapiens_jax.training import rl, sft
from omnisapiens_jax.training.losses import ANSWERS, CLASSES
from omnisapiens_jax.training.state import TrainState, make_model, make_optimizer, trainable_filter
from tests.training import world

ROWS, ROLLOUTS, RESPONSE, TOKENS, VOCABULARY, WIDTH = 8, 5, 2048, 4096, 152_064, 3584


def sizes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every value of a program, of those inside its loops too."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("job", ["generative", "sft", "qa", "rl"])
def test_a_step_at_7b(job: str) -> None:
    made = world.runpy.run_path(str(world.resource(f"configs/{job}.py")))["get_config"]("7b")
    mesh, optimizer = make_mesh(2, 2, 2), make_optimizer(made[job].optim, 10)
    model = nnx.eval_shape(lambda: make_model(made.model, 0))
    graph, trainable, frozen = nnx.split(model, trainable_filter(made.model), ...)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, frozen, jax.eval_shape(optimizer.init, trainable))  # pyright: ignore
    state = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings(state, mesh))
    bucket = Bucket(TOKENS, audio_chunks=4, audio_tokens=200, frames=2, windows=12, window_patches=64)
    arrays = collate([None] * ROWS, bucket, ThinkerConfig.preset("7b"))
    if job == "rl":
        drawn = (ROWS, ROLLOUTS, RESPONSE)
        arrays |= {"responses": np.zeros(drawn, np.int32), "response_mask": np.zeros(drawn, bool)}
        arrays |= {"old_log_probs": np.zeros(drawn, np.float32), "advantages": np.zeros(drawn[:2], np.float32)}
        step = functools.partial(rl.grpo_step, graph, optimizer, PolicyLossConfig(), 1.0, 2)
    else:
        step = functools.partial(sft.sft_step, graph, optimizer, 2, objective=CLASSES if job == "sft" else ANSWERS)
    batch = {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=divided(mesh)) for name, array in arrays.items()}
    with on_mesh(mesh):
        traced = jax.jit(step, donate_argnums=0).trace(state, batch)
        traced.lower()
    still, learning = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (frozen, trainable))
    factors, head, heads = 80_740_352, WIDTH * VOCABULARY, 25 * (WIDTH + 1)
    trained = {"generative": factors, "sft": factors + heads, "qa": head, "rl": factors}[job]
    assert learning == trained and still + learning == 8_931_813_888 + factors + (heads if job == "sft" else 0)
    wide = {shape for shape in sizes(traced.jaxpr.jaxpr) if VOCABULARY in shape}
    logits = wide - {(VOCABULARY,), (WIDTH, VOCABULARY), (VOCABULARY, WIDTH)}
    if job == "sft":
        assert not logits  # heads make none
        return
    largest = max(int(np.prod(shape)) // VOCABULARY for shape in logits)
    print(f"7B {job}: logits are made for at most {largest} tokens at once, {sorted(logits)}")
    assert largest <= 1024 < ROWS // 2 * TOKENS
