"""What the losses keep for their backward pass."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.models.classifier import Classifier
from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.training.losses import class_loss, lm_loss
from tests.tiny import TINY, text_prompts

VOCAB = 2**16
HEAD_BYTES = VOCAB * TINY.text.hidden_size * 4


def test_longer_rows_do_not_keep_the_head_again_for_every_chunk_of_logits() -> None:
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab_size=VOCAB))
    thinker = nnx.eval_shape(lambda: Thinker(config, rngs=nnx.Rngs(0), lora=LoraConfig(2, 2.0, {"decoder": ("q_proj",)})))
    graph, trainable, frozen = nnx.split(thinker, LoraParam, ...)

    def temporaries(length: int) -> int:
        batch = text_prompts((length,), length)
        batch["labels"] = batch["tokens"]
        shapes = {name: jax.ShapeDtypeStruct(np.shape(value), jnp.asarray(value).dtype) for name, value in batch.items()}

        def loss(trainable: nnx.State, frozen: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
            return lm_loss(nnx.merge(graph, trainable, frozen), batch)[0]

        analysis = jax.jit(jax.grad(loss)).lower(trainable, frozen, shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporaries(128), temporaries(1024)  # 2 chunks and 16
    assert long - short < 4 * HEAD_BYTES, f"{short:,} bytes for 128 tokens, {long:,} for 1024, a head being {HEAD_BYTES:,}"


@pytest.mark.parametrize("remat", ["none", "full"])
def test_heads_read_the_stack_where_it_lies(remat: Literal["none", "full"]) -> None:
    """All layers but the last are run; neither forwards nor backwards are their weights copied, which would be nearly all there is."""
    config = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, num_layers=8, intermediate_size=4096))

    def make() -> Classifier:
        thinker = Thinker(config, rngs=nnx.Rngs(0), lora=LoraConfig(2, 2.0, {"decoder": ("q_proj", "down_proj")}), remat=remat)
        return Classifier(thinker, (2, 3), rngs=nnx.Rngs(0))

    graph, trainable, frozen = nnx.split(nnx.eval_shape(make), nnx.Any(LoraParam, nnx.PathContains("heads")), ...)
    batch = text_prompts((2,), 2) | {"domain": np.zeros(1, np.int32), "label": np.ones(1, np.int32)}

    def loss(trainable: nnx.State, frozen: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        return class_loss(nnx.merge(graph, trainable, frozen), batch)[0]

    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}
    analysis = jax.jit(jax.grad(loss)).lower(trainable, frozen, shapes).compile().memory_analysis()
    stack = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.filter_state(frozen, nnx.PathContains("mlp"))))
    assert analysis is not None
    print(f"{remat}: {analysis.temp_size_in_bytes:,} bytes of temporaries, {stack:,} of weights in 8 layers")
    assert analysis.temp_size_in_bytes < stack / 2
