"""Our side of the comparison with transformers: a thinker filled from a Hugging Face directory, run on a batch of `cases`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from omnisapiens_jax.convert.checkpoint import put_params
from omnisapiens_jax.convert.huggingface import open_huggingface
from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.convert.source import Params, read_params
from omnisapiens_jax.generation.sampling import Generator, Sampling, rollout_keys
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.layers import LoraConfig
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.processing.example import Batch
from tests.models import cases, references

GREEDY = 16
_FACTORS = (("lora_A", "lora_a"), ("lora_B", "lora_b"))


@functools.cache
def thinker(config_name: str, lora: LoraConfig | None = None) -> Thinker:
    """The random model of `cases`, brought in through the converter."""
    with tempfile.TemporaryDirectory() as folder:
        cases.write_checkpoint(cases.CONFIGS[config_name], Path(folder))
        params = read_params(open_huggingface(folder))
    return make(cases.CONFIGS[config_name], params, lora)


def make(config: ThinkerConfig, params: Params, lora: LoraConfig | None = None) -> Thinker:
    """A thinker with these parameters; the factors of its adapters, if any, are random."""

    def build() -> Thinker:
        return Thinker(config, rngs=nnx.Rngs(0), lora=lora)

    made = nnx.jit(build)() if lora else nnx.eval_shape(build)  # random weights that are all replaced need not be computed
    put_params(made, params)
    return made


def put_factors(model: Thinker, config_name: str) -> None:
    """Gives a thinker with `references.LORA` the factors of the oracle's."""
    factors = references.lora_factors(config_name)
    for theirs, path, layer in _adapted(config_name):
        module = model
        for part in path:
            module = getattr(module, part)
        for name, ours_name in _FACTORS:
            variable = getattr(module, ours_name)
            variable.set_value(variable.get_value().at[layer].set(factors[f"{theirs}/{name}"].T))


def named_factors(adapters: dict[str, Any], config_name: str) -> dict[str, np.ndarray]:
    """Arrays in the places of factors, as a nested dict, by the names and in the axes of the oracle."""
    flat = traverse_util.flatten_dict(adapters)
    return {
        f"{theirs}/{name}": np.asarray(flat[(*path, ours_name)])[layer].T
        for theirs, path, layer in _adapted(config_name)
        for name, ours_name in _FACTORS
    }


def _adapted(config_name: str) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Their module, our module and the layer of every adapter."""
    modules = {name.split("/")[0] for name in references.lora_factors(config_name)}
    for row in mappings(cases.CONFIGS[config_name]):
        for layer, name in enumerate(row.their_names):
            if name.removesuffix(".weight") in modules and name.endswith(".weight"):
                yield name.removesuffix(".weight"), row.ours[:-1], layer


def forward(model: Thinker, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """All that is compared, in the batch's own layout."""
    hidden = model(batch)
    out = {"logits": model.logits(hidden.last), "last": hidden.last, "penultimate": hidden.penultimate}
    if batch["audio_pairs"].shape[1]:
        out["audio"] = model.audio(batch["audio_chunks"], batch["audio_frames"], batch["audio_pairs"])
    if batch["patches"].shape[1]:
        out["vision"] = model.vision(batch["patches"], batch["patch_mask"], batch["patch_coords"])
    return out


@functools.cache
def _generator(config_name: str, unroll: bool) -> Generator:
    sampling = Sampling(rollouts=1, max_tokens=GREEDY, temperature=0.0, eos=(), pad=cases.IDS.pad)
    return Generator(thinker(config_name), sampling, unroll=unroll)


def greedy(config_name: str, case_name: str, *, unroll: bool = False) -> np.ndarray:
    """`[rows, GREEDY]` tokens that continue the rows of a case; our prompts are padded on the right."""
    case_name = case_name.replace("left", "right")
    generate = _generator(config_name, unroll)
    made = {name: jnp.asarray(value) for name, value in cases.batch(config_name, case_name).items()}
    keys = rollout_keys(0, 0, jnp.arange(cases.ROWS), 1)
    responses = generate(generate.view(nnx.state(thinker(config_name))), made, keys)
    return np.asarray(responses.tokens)[: len(cases.CASES[case_name].rows), 0]


compiled_forward = nnx.jit(forward)


def answers(model: Thinker, made: Batch, *, run: Callable[..., dict[str, jax.Array]] = compiled_forward) -> dict[str, np.ndarray]:
    """What the oracle answers, from our model: only real tokens `[n, ...]`, media in reading order. `run` is a compiled `forward`."""
    out = {name: np.asarray(value) for name, value in run(model, {name: jnp.asarray(value) for name, value in made.items()}).items()}
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
