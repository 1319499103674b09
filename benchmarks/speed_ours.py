"""Our side of `speed.py`: `python speed_ours.py FOLDER`, a Hugging Face directory with `lora.npz` beside the weights.

Everything runs as the jobs run it on a CPU: prefill and decoding on the unrolled view, training under the scan.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import speed_child as shared
from flax import nnx
from ml_collections import ConfigDict
from speed_child import Case

from omnisapiens_jax import defaults
from omnisapiens_jax.convert.checkpoint import put_params
from omnisapiens_jax.convert.huggingface import open_huggingface
from omnisapiens_jax.convert.source import read_params
from omnisapiens_jax.generation.sampling import Generator, Sampling, rollout_keys
from omnisapiens_jax.models.classifier import Classifier
from omnisapiens_jax.models.layers import LORA_TARGETS, LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker, last_token
from omnisapiens_jax.processing.example import Bucket, collate, lay_out
from omnisapiens_jax.training.losses import ANSWERS, CLASSES, Objective
from omnisapiens_jax.training.sft import sft_step
from omnisapiens_jax.training.state import TrainState, make_optimizer


def main(folder: Path) -> None:
    """Serves the cases."""
    tasks = {"prefill": prefill, "train": train, "heads": classify, "decode": decode}
    shared.serve(lambda case: tasks[case.task](folder, case))


def prefill(folder: Path, case: Case) -> Callable[[], np.ndarray]:
    """The keys and values of the prompt, and the logits of its last token `[B, V]`."""
    thinker = load(folder)
    thinker.decoder.layers.unroll()
    graph, params = nnx.split(thinker)
    batch = text_batch(thinker, case)

    @jax.jit
    def compiled(params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, object]:
        thinker: Thinker = nnx.merge(graph, params)
        hidden, cache = thinker.decoder.prefill(thinker.embed(batch), batch["positions"], batch["segment_ids"])
        return thinker.logits(last_token(hidden.last, batch["prompt_length"])), cache

    return lambda: np.asarray(jax.block_until_ready(compiled(params, batch))[0])


def decode(folder: Path, case: Case) -> Callable[[], np.ndarray]:
    """Greedy tokens `[B, new]`."""
    thinker = load(folder)
    batch = text_batch(thinker, case)
    generator = Generator(thinker, Sampling(rollouts=1, max_tokens=case.new, temperature=0.0, eos=(), pad=0), unroll=True)
    view = generator.view(nnx.state(thinker))
    keys = rollout_keys(0, 0, jnp.arange(case.batch), 1)
    return lambda: np.asarray(generator(view, batch, keys).tokens)[:, 0]


def train(folder: Path, case: Case) -> Callable[[], np.ndarray]:
    """One update of the LoRA factors on the cross-entropy of every token; gives the loss."""
    thinker = load(folder, LoraConfig(shared.LORA_RANK, shared.LORA_ALPHA, {"decoder": LORA_TARGETS["decoder"]}))
    optim = defaults.optimizer(lr=shared.LEARNING_RATE, weight_decay=shared.WEIGHT_DECAY, clip=shared.CLIP)
    return steps(thinker, LoraParam, optim, text_batch(thinker, case), ANSWERS)


def classify(folder: Path, case: Case) -> Callable[[], np.ndarray]:
    """One update of the LoRA factors and the heads on the cross-entropy of every row's class; gives the loss."""
    thinker = load(folder, LoraConfig(shared.HEADS_RANK, shared.HEADS_ALPHA, {"decoder": LORA_TARGETS["decoder"]}))
    classifier = Classifier(thinker, shared.LABELS, rngs=nnx.Rngs(0))
    classifier.heads.affine.kernel.set_value(jnp.asarray(shared.heads(folder).T))
    optim = defaults.optimizer(lr=shared.LEARNING_RATE, weight_decay=0.0, clip=0.0)
    batch = text_batch(thinker, case) | dict(zip(("domain", "label"), map(jnp.asarray, case.classes()), strict=True))
    return steps(classifier, nnx.Any(LoraParam, nnx.PathContains("heads")), optim, batch, CLASSES)


def steps(
    model: nnx.Module, trained: Any, optim: ConfigDict, batch: dict[str, jax.Array], objective: Objective
) -> Callable[[], np.ndarray]:
    """Updates of what is `trained` of a model, again and again on one batch; each gives the loss."""
    optimizer = make_optimizer(optim, 0)
    graph, trainable, frozen = nnx.split(model, trained, ...)
    states = [TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))]
    compiled = jax.jit(functools.partial(sft_step, graph, optimizer, 1, objective=objective), donate_argnums=0)

    def run() -> np.ndarray:
        state, metrics = compiled(states.pop(), batch)
        states.append(jax.block_until_ready(state))
        return np.asarray(metrics["loss"])

    return run


def load(folder: Path, lora: LoraConfig | None = None) -> Thinker:
    """The thinker of the directory; LoRA's A factors as given, B zero."""
    source = open_huggingface(folder)
    thinker = nnx.eval_shape(lambda: Thinker(source.config, rngs=nnx.Rngs(0), lora=lora))
    put_params(thinker, read_params(source))
    given = shared.factors(folder, lora.rank) if lora else {}
    for path, variable in nnx.to_flat_state(nnx.state(thinker, LoraParam)):
        first = given[str(path[-2])] if path[-1] == "lora_a" else np.zeros(variable.shape, np.float32)
        variable.set_value(jnp.asarray(first))
    return thinker


def text_batch(thinker: Thinker, case: Case) -> dict[str, jax.Array]:
    """The rows of a case, every token of them a target."""
    positions = np.tile(np.arange(case.length, dtype=np.int32), (3, 1))
    rows = [lay_out(row, row, positions, case.length, [], [], thinker.config) for row in case.ids()]
    return {name: jnp.asarray(value) for name, value in collate(rows, Bucket(case.length, 0, 0, 0, 0, 0), thinker.config).items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
