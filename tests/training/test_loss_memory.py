"""What the language-model loss keeps for its backward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.training.losses import lm_loss
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
