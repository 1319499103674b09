"""What is trained keeps float32, whatever the base is stored in."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from omnisapiens_jax import defaults
from omnisapiens_jax.models.layers import LoraParam
from omnisapiens_jax.training.state import make_thinker


def test_lora_factors_of_a_bfloat16_model_are_float32() -> None:
    model: ConfigDict = defaults.base("7b").model
    thinker = nnx.eval_shape(lambda: make_thinker(model, 0))
    factors = jax.tree.leaves(nnx.state(thinker, LoraParam))
    assert len(factors) == 14 and {leaf.dtype for leaf in factors} == {jnp.dtype(jnp.float32)}
    base = jax.tree.leaves(nnx.state(thinker, nnx.All(nnx.Param, nnx.Not(LoraParam))))
    assert {leaf.dtype for leaf in base} == {jnp.dtype(jnp.bfloat16)}
