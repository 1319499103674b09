"""Supervised fine-tuning, on responses or on classes, media really fed, to the minimum of the validation loss or the best of a metric."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.models.layers import drop_lora
from omnisapiens_jax.parallel.mesh import put_batch
from omnisapiens_jax.training.checkpoints import Checkpoints
from omnisapiens_jax.training.data import Split
from omnisapiens_jax.training.journal import Bar, Journal, console
from omnisapiens_jax.training.losses import ANSWERS, Objective, confusion
from omnisapiens_jax.training.selection import BY_LOSS, Selection
from omnisapiens_jax.training.state import (
    TrainState,
    apply_gradients,
    check_finite,
    fresh_optimizer,
    make_optimizer,
    micro_gradients,
    parameters,
)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """What LoRA branches drop in training: each number that they read with odds `rate`, others in every step, as `seed` says."""

    rate: float
    seed: int

    def key(self, step: jax.Array) -> jax.Array:
        """The key of a step: a run that goes on drops what it would have dropped."""
        return jax.random.fold_in(jax.random.key(self.seed), step)


def fit(
    config: ml_collections.ConfigDict,
    workdir: Path,
    graph: nnx.GraphDef,
    state: TrainState,
    train: Split,
    validation: Split,
    mesh: Mesh,
    objective: Objective = ANSWERS,
    dropout: Dropout | None = None,
    selection: Selection = BY_LOSS,
) -> TrainState:
    """Trains until the validation loss has not fallen for `patience` evaluations, and returns the state of its minimum.

    Likewise until a metric has not risen, where the best state is selected by one.

    Args:
      config: the stage's part of the run's config (`config.sft`).
      workdir: of this stage; a run found there goes on where it stopped.
      graph: the model's structure.
      state: where to start.
      train: batches with what the objective reads.
      validation: likewise, in fixed order.
      mesh: everything lies on it.
      objective: what is minimised.
      dropout: in training, not in validation; None drops nothing, and costs nothing.
      selection: what the best state is; by a metric only where classes are learnt.

    Raises:
      FloatingPointError: too many updates in a row had gradients that are not finite, or what the best state is selected by never was.
    """
    optimizer = make_optimizer(config.optim, config.steps)
    state = fresh_optimizer(state, optimizer, mesh)
    step_fn = functools.partial(sft_step, graph, optimizer, config.micro_batches, objective=objective, dropout=dropout)
    step_fn = jax.jit(step_fn, donate_argnums=0)
    sums_fn = jax.jit(functools.partial(loss_sum if selection == BY_LOSS else class_sums, graph, objective))
    progress: dict[str, Any] = {"best": selection.worst, "best_step": 0, "finished": False}

    with Checkpoints(workdir / "best", keep=1) as best, Checkpoints(workdir / "state") as checkpoints:
        if checkpoints.latest is not None:
            state, progress = checkpoints.restore(state)
        start = int(state.step)
        with Journal(workdir, start=start) as journal, Bar("SFT", total=config.steps, start=start) as bar:
            for step, batch in train.batches(start, 0 if progress["finished"] else config.steps):
                state, metrics = step_fn(state, put_batch(batch, mesh))
                metrics |= train.pipeline.fault_metrics()
                if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                    metrics |= validate(sums_fn, state, validation, mesh, selection)
                    if selection.better(metrics[selection.key], progress["best"]):
                        progress |= {"best": metrics[selection.key], "best_step": step + 1}
                        best.save(step + 1, state, progress)
                    waited = (step + 1 - progress["best_step"]) // config.eval_every
                    progress["finished"] = waited >= config.patience or step + 1 == config.steps
                written = journal.write(step, metrics)
                check_finite(step, written)
                if selection.key in metrics:
                    checkpoints.save(step + 1, state, progress)  # after the line of this step, which a kill in between would lose
                bar.advance(loss=written["loss"], best=progress["best"])
                if progress["finished"]:
                    break
        if best.latest is None:
            raise FloatingPointError(
                f"the validation {selection.by} was never finite in {int(state.step)} steps, so no state is the best one: start again with "
                "a lower optim.lr, or look for a broken sample in the validation split"
            )
        state, progress = best.restore(state)
    console.print(f"SFT: validation {selection.by} {progress['best']:.4f} at step {progress['best_step']}")
    return state


def sft_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
    state: TrainState,
    batch: dict[str, jax.Array],
    objective: Objective = ANSWERS,
    dropout: Dropout | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One update on the mean loss of what counts in `batch`."""
    loss, count, grads = sft_gradients(graph, micro_batches, state, batch, objective, dropout)
    state, metrics = apply_gradients(state, grads, optimizer)
    return state, metrics | {"loss": loss, objective.unit: count}


def sft_gradients(
    graph: nnx.GraphDef,
    micro_batches: int,
    state: TrainState,
    batch: dict[str, jax.Array],
    objective: Objective = ANSWERS,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array, nnx.State]:
    """Mean loss, how many tokens or samples it is of, and the gradient of the trainable parameters."""
    total = jnp.maximum(objective.count(batch), 1)
    if dropout is not None:
        batch = {**batch, "dropout_key": jax.random.split(dropout.key(state.step), micro_batches)}  # one for each part

    def share(trainable: nnx.State, part: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, trainable, state.frozen)
        if dropout is not None:
            drop_lora(model, dropout.rate, part["dropout_key"][0])
        loss, count = objective.loss(model, part)
        return loss / total, count

    return micro_gradients(share, state.trainable, batch, micro_batches)


def loss_sum(graph: nnx.GraphDef, objective: Objective, params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Summed loss of a batch, and of how many tokens or samples."""
    return objective.loss(nnx.merge(graph, params), batch)


def class_sums(graph: nnx.GraphDef, objective: Objective, params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """As `loss_sum`, of a model of classes, and the `confusion` of the batch."""
    logits = nnx.merge(graph, params)(batch)
    return *objective.loss(lambda _: logits, batch), confusion(logits, batch["label"])


def validate(sums_fn: Any, state: TrainState, validation: Split, mesh: Mesh, selection: Selection) -> dict[str, float]:
    """What `Selection.validate` finds over everything that counts in the validation split."""
    params, batches = parameters(state), validation.batches(0, validation.steps_per_epoch)
    return selection.validate(sums_fn(params, put_batch(batch, mesh)) for _, batch in batches)
