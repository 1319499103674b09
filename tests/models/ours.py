"""Our side of the comparison with transformers: a thinker filled from a Hugging Face directory, run on a batch of `cases`."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.convert import huggingface
from omnisapiens_jax.convert.checkpoint import put_params
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.decoder import KeyValue
from omnisapiens_jax.models.layers import LoraConfig
from omnisapiens_jax.models.thinker import Thinker, last_token, response_positions
from omnisapiens_jax.processing.example import Batch
from tests.models import cases

GREEDY = 16


@functools.cache
def thinker(config_name: str, lora: LoraConfig | None = None) -> Thinker:
    """The random model of `cases`, brought in through the converter."""
    with tempfile.TemporaryDirectory() as folder:
        cases.write_checkpoint(cases.CONFIGS[config_name], Path(folder))
        imported = huggingface.read(folder)
    return make(imported.config, imported.params, lora)


def make(config: ThinkerConfig, params: huggingface.Params, lora: LoraConfig | None = None) -> Thinker:
    """A thinker with these parameters."""
    made = nnx.jit(lambda: Thinker(config, rngs=nnx.Rngs(0), lora=lora))()
    put_params(made, params)
    return made


def _forward(model: Thinker, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    hidden = model(batch)
    out = {"logits": model.logits(hidden.last), "last": hidden.last, "penultimate": hidden.penultimate}
    if batch["audio_pairs"].shape[1]:
        out["audio"] = model.audio(batch["audio_chunks"], batch["audio_frames"], batch["audio_pairs"])
    if batch["patches"].shape[1]:
        out["vision"] = model.vision(batch["patches"], batch["patch_mask"], batch["patch_coords"])
    return out


def _greedy(model: Thinker, batch: dict[str, jax.Array]) -> jax.Array:
    """`[B, GREEDY]` tokens after right-padded prompts."""
    hidden, prompt_kv = model.decoder.prefill(model.embed(batch), batch["positions"], batch["segment_ids"])
    first = jnp.argmax(model.logits(last_token(hidden.last, batch["prompt_length"])), axis=-1)
    layers, rows, _, heads, width = prompt_kv.key.shape
    cache = KeyValue(*(jnp.zeros((layers, rows, GREEDY, heads, width)) for _ in range(2)))

    def step(carry: tuple[jax.Array, KeyValue], index: jax.Array) -> tuple[tuple[jax.Array, KeyValue], jax.Array]:
        token, cache = carry
        at = response_positions(batch["prompt_length"], batch["rope_delta"], index[None])[:, 0]
        state, cache = model.decoder.decode(model.decoder.embed(token[:, None]), at, prompt_kv, batch["segment_ids"], cache, index)
        return (jnp.argmax(model.logits(state[:, 0]), axis=-1), cache), token

    _, tokens = jax.lax.scan(step, (first, cache), jnp.arange(GREEDY))
    return tokens.T


forward = nnx.jit(_forward)
greedy = nnx.jit(_greedy)


def answers(model: Thinker, config_name: str, case_name: str, *, made: Batch | None = None) -> dict[str, np.ndarray]:
    """What the oracle answers for a case, from our model: only real tokens `[n, ...]`, media in reading order.

    `made` replaces the batch, for mutations of the input.
    """
    made = cases.batch(config_name, case_name) if made is None else made
    out = {name: np.asarray(value) for name, value in forward(model, {name: jnp.asarray(value) for name, value in made.items()}).items()}
    real = made["segment_ids"] == 1
    found = {name: out[name][real] for name in ("logits", "last", "penultimate")}
    rows, index = np.arange(len(made["tokens"]))[:, None], made["media_index"]
    audio_tokens = made["audio_pairs"].shape[1]
    for name, which in (("audio", cases.IDS.audio), ("image", cases.IDS.image), ("video", cases.IDS.video)):
        places = made["tokens"] == which
        if places.any():
            values = out["audio" if name == "audio" else "vision"]
            found[name] = values[np.broadcast_to(rows, index.shape)[places], index[places] - (0 if name == "audio" else audio_tokens)]
    return found
