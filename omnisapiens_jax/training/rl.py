"""GRPO on the device: sample, score, compare within the group, update. The loop in `improve` is the whole algorithm."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.evaluation.evaluate import decode_response
from omnisapiens_jax.generation.sampling import Generator, Responses, rollout_keys
from omnisapiens_jax.models.thinker import token_log_probs
from omnisapiens_jax.parallel.mesh import all_rows, divided, local_rows, put_batch
from omnisapiens_jax.processing.tokenizers import Tokenizer
from omnisapiens_jax.rl.advantages import grpo_advantages
from omnisapiens_jax.rl.loss import PolicyLossConfig, PolicyStats, loss_denominator, policy_loss
from omnisapiens_jax.rl.replay import Rollout, save_rollout
from omnisapiens_jax.rl.rewards import RewardConfig, Rewards, Similarity, score_responses
from omnisapiens_jax.training.checkpoints import Checkpoints
from omnisapiens_jax.training.data import Split
from omnisapiens_jax.training.journal import Bar, Journal
from omnisapiens_jax.training.state import (
    TrainState,
    apply_gradients,
    check_finite,
    fresh_optimizer,
    make_optimizer,
    micro_gradients,
    parameters,
)


def improve(
    config: ml_collections.ConfigDict,
    seed: int,
    workdir: Path,
    graph: nnx.GraphDef,
    state: TrainState,
    generator: Generator,
    prompts: Split,
    tokenizer: Tokenizer,
    similarity: Similarity | None,
    mesh: Mesh,
) -> TrainState:
    """Trains the policy for `config.steps` rollouts and returns it.

    Args:
      config: the stage's part of the run's config (`config.rl`).
      seed: of the sampling keys.
      workdir: of this stage; a run found there goes on where it stopped, to the same numbers.
      graph: the thinker's structure.
      state: the policy to start from.
      generator: samples `config.rollouts` responses a prompt.
      prompts: batches that end at the assistant header.
      tokenizer: turns responses into text.
      similarity: of the reward; None when its weight is 0.
      mesh: everything lies on it.
    """
    optimizer = make_optimizer(config.optim, config.steps * config.updates)
    state = fresh_optimizer(state, optimizer, mesh)
    loss_config = PolicyLossConfig(**config.loss)
    update = jax.jit(
        functools.partial(grpo_step, graph, optimizer, loss_config, config.temperature, config.micro_batches), donate_argnums=0
    )
    compare = jax.jit(grpo_advantages, out_shardings=divided(mesh))
    reward_config = RewardConfig(**config.reward)
    blocks = max(mesh.shape["data"] * mesh.shape["fsdp"] // jax.process_count(), 1)  # that this process's rows are divided into

    with Checkpoints(workdir / "state") as checkpoints:
        start = 0
        if checkpoints.latest is not None:
            state, facts = checkpoints.restore(state)
            start = facts["next_step"]
        with Journal(workdir, start=start) as journal, Bar("GRPO", total=config.steps, start=start) as bar:
            for step, batch in prompts.pipeline.batches(start, config.steps):
                samples = prompts.samples(batch)
                on_device = put_batch(batch, mesh)
                keys = rollout_keys(seed, step, on_device["index"], config.rollouts)
                responses = generator(generator.view(parameters(state)), on_device, keys).map(local_rows)
                texts, rewards = score(responses, samples, tokenizer, similarity, reward_config)
                scores = rewards.score.reshape(responses.mask.shape[:2])
                counted = np.repeat(batch["row_mask"][:, None], config.rollouts, axis=1)
                advantages = local_rows(compare(*put_batch({"rewards": scores, "mask": counted}, mesh).values()))

                for part in range(config.updates):
                    mine = np.arange(part, len(scores), config.updates)
                    mine = mine[live_first(advantages[mine], blocks, config.micro_batches)]
                    parts = {**{name: array[mine] for name, array in batch.items()}, **_learner(responses, advantages, counted, mine)}
                    state, metrics = update(state, put_batch(parts, mesh))

                written = journal.write(step, metrics | summary(responses, rewards, counted) | prompts.pipeline.fault_metrics())
                check_finite(step, written)
                if config.record_every and step % config.record_every == 0:
                    record = recorded(batch, samples, responses, rewards, advantages, counted, texts, step, config.temperature)
                    save_rollout(workdir / "rollouts" / f"{step:06d}{_of_process()}.npz", record)
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    checkpoints.save(step + 1, state, {"next_step": step + 1})
                bar.advance(reward=written["reward"], accuracy=written["accuracy"], tokens=written["response_length"])
    return state


def score(
    responses: Responses[np.ndarray], samples: list[Any], tokenizer: Tokenizer, similarity: Similarity | None, config: RewardConfig
) -> tuple[list[tuple[str, ...]], Rewards]:
    """Texts of the responses `[G, n]` and their rewards, flattened to `[G * n]`; masked groups score as empty."""
    texts = [
        tuple(decode_response(tokenizer, tokens, mask) for tokens, mask in zip(*group, strict=True))
        for group in zip(responses.tokens, responses.mask, strict=True)
    ]
    golds = ["" if sample is None else sample.answer for sample in samples]
    flat_golds = [gold for gold, group in zip(golds, texts, strict=True) for _ in group]
    lengths = responses.mask.sum(axis=-1).reshape(-1)
    return texts, score_responses([text for group in texts for text in group], flat_golds, similarity, config, lengths)


def grpo_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: PolicyLossConfig,
    temperature: float,
    micro_batches: int,
    state: TrainState,
    batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, Any]]:
    """One update on the clipped policy loss; `batch` as `grpo_gradients` takes it."""
    loss, stats, grads = grpo_gradients(graph, config, temperature, micro_batches, state, batch)
    state, metrics = apply_gradients(state, grads, optimizer)
    return state, metrics | {"loss": loss} | stats.metrics()


def grpo_gradients(
    graph: nnx.GraphDef, config: PolicyLossConfig, temperature: float, micro_batches: int, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[jax.Array, PolicyStats, nnx.State]:
    """Policy loss, its diagnostics, and the gradient of the trainable parameters.

    `batch` holds the prompts and `responses [G, n, R]`, `response_mask [G, n, R]`, `old_log_probs [G, n, R]` and `advantages [G, n]`.
    The sampler's own log-probabilities are the old ones: both share one forward and one position function. A micro-batch in which no
    response has an advantage is not run (`live_first` makes such micro-batches), and the diagnostics are of those that were.
    """
    denominator = loss_denominator(batch["response_mask"], config.aggregation)

    def share(trainable: nnx.State, part: dict[str, jax.Array]) -> tuple[jax.Array, PolicyStats]:
        thinker = nnx.merge(graph, trainable, state.frozen)
        hidden = thinker.grouped(part, part["responses"], part["response_mask"])
        log_probs = token_log_probs(thinker, hidden, part["responses"], temperature=temperature)
        return policy_loss(log_probs, part["old_log_probs"], part["advantages"], part["response_mask"], denominator, config)

    return micro_gradients(share, state.trainable, batch, micro_batches, wanted=lambda part: jnp.any(part["advantages"] != 0))


def live_first(advantages: np.ndarray, blocks: int, micro_batches: int) -> np.ndarray:
    """An order of the groups in which those that have a signal fill the first micro-batches, so that the last need not be run.

    Args:
      advantages: `[G, n]`, of this process's groups.
      blocks: that the groups are divided into, one after the other, over this process's devices; a group stays in its block.
      micro_batches: each takes every `micro_batches`-th group of a block (see `micro_gradients`).

    Returns: `[G]` indices of groups.
    """
    live = (advantages != 0).any(axis=1)
    order = np.arange(len(live))
    for block in np.array_split(order.copy(), blocks):
        places = block[np.lexsort((block, block % micro_batches))]
        order[places] = block[np.argsort(~live[block], kind="stable")]
    return order


def summary(responses: Responses[np.ndarray], rewards: Rewards, counted: np.ndarray) -> dict[str, float]:
    """What a step's rollouts earned on all processes, as means over those that count (`counted [G, n]` of this process)."""
    own = {
        "reward": rewards.score,
        "accuracy": rewards.accuracy,
        "format": rewards.format,
        "similarity": rewards.similarity,
        "overlong": rewards.overlong,
        "response_length": responses.mask.sum(axis=-1),
        "surprise": -responses.log_probs.sum(axis=-1),
    }
    earned, counted = all_rows(({name: values.reshape(counted.shape) for name, values in own.items()}, counted))
    spread = earned["reward"].std(axis=1)[counted[:, 0]]
    means = {name: float(values[counted].mean()) for name, values in earned.items()}
    # Of the policy, estimated from what it sampled itself: minus the mean log-probability of a token.
    entropy = means.pop("surprise") / max(means["response_length"], 1.0)
    return means | {"entropy": entropy, "groups_without_signal": float((spread < 1e-6).mean())}


def recorded(
    batch: dict[str, np.ndarray],
    samples: list[Any],
    responses: Responses[np.ndarray],
    rewards: Rewards,
    advantages: np.ndarray,
    counted: np.ndarray,
    texts: list[tuple[str, ...]],
    step: int,
    temperature: float,
) -> Rollout:
    """This step's rollout as a record that the learner can be run on again."""
    return Rollout(
        batch={name: array for name, array in batch.items() if name != "index"},
        sample_ids=batch["index"],
        tokens=responses.tokens,
        mask=responses.mask,
        log_probs=responses.log_probs,
        rewards=rewards.score.reshape(counted.shape),
        advantages=advantages,
        row_mask=counted,
        texts=tuple(texts),
        golds=tuple("" if sample is None else sample.answer for sample in samples),
        tasks=tuple("" if sample is None else sample.task for sample in samples),
        step=step,
        temperature=temperature,
    )


def _of_process() -> str:
    """Each process records its own prompts; the name says whose, where there are several."""
    return f"-{jax.process_index()}" if jax.process_count() > 1 else ""


def learner_batch(rollout: Rollout) -> dict[str, np.ndarray]:
    """A recorded rollout as `grpo_gradients` takes it."""
    responses = Responses(rollout.tokens, rollout.log_probs, rollout.mask)
    return {**rollout.batch, **_learner(responses, rollout.advantages, rollout.row_mask, np.arange(len(rollout.tokens)))}


def _learner(responses: Responses[np.ndarray], advantages: np.ndarray, counted: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "responses": responses.tokens[rows],
        "old_log_probs": responses.log_probs[rows],
        "response_mask": (responses.mask & counted[..., None])[rows],
        "advantages": advantages[rows],
    }
