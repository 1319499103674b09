"""A run's parts at the smallest size: the tiny thinker, the committed clips of the miniature atlas, a mesh."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnisapiens_jax.atlas.recipe import target_text
from omnisapiens_jax.generation.sampling import rollout_keys
from omnisapiens_jax.models.config import PRESETS
from omnisapiens_jax.parallel.mesh import local_rows, make_mesh, on_mesh, put_batch
from omnisapiens_jax.resources import resource
from omnisapiens_jax.rl.advantages import grpo_advantages
from omnisapiens_jax.rl.replay import Rollout
from omnisapiens_jax.rl.rewards import RewardConfig
from omnisapiens_jax.training import rl
from omnisapiens_jax.training.data import Atlas
from omnisapiens_jax.training.jobs import Run
from omnisapiens_jax.training.state import TrainState, create_state, parameters, thinker_config
from tests import tiny

PRESETS["tiny"] = tiny.TINY

Mesh3 = tuple[int, int, int]


def config(job: str = "rl", mesh: Mesh3 = (1, 1, 1), **changes: Any) -> ConfigDict:
    """A run of a few seconds; `changes` are dotted names with `__` for the dot."""
    made = runpy.run_path(str(resource(f"configs/{job}.py")))["get_config"]("mini")
    made.model.preset = "tiny"
    made.mesh = ConfigDict(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    made.atlas.path = str(resource("data/mini"))
    made.eval_batch = 8
    made.generation.max_tokens = 8
    made.generation.chunk = 4
    stage = made.warm_start if job == "rl" else made[made.job]
    stage.update({"rows": "all", "batch_size": 8, "steps": 4, "eval_every": 2})
    if job == "rl":
        made.rl.update({"rows": "all", "prompts": 8, "rollouts": 2, "steps": 4, "save_every": 2, "record_every": 0})
        made.rl.reward.similarity = 0.0
    made.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return made


def mesh_of(shape: Mesh3) -> Mesh:
    """A mesh of that shape over the first virtual devices."""
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


@dataclasses.dataclass(frozen=True)
class World:
    """A mesh with a fresh state on it."""

    config: ConfigDict
    mesh: Mesh
    graph: nnx.GraphDef
    state: TrainState

    def run(self, workdir: Path) -> Run:
        return Run(self.config, workdir, self.mesh, Atlas(self.config, thinker_config(self.config.model)), self.graph)


def world(made: ConfigDict) -> World:
    """The start of a run with that config."""
    mesh = mesh_of((made.mesh.data, made.mesh.fsdp, made.mesh.tensor))
    return World(made, mesh, *create_state(made.model, made.seed, mesh))


@functools.cache
def batch(*, target: bool) -> dict[str, np.ndarray]:
    """The first eight rows of the training split: audio, video and text alone among them."""
    made = config()
    split = Atlas(made, tiny.TINY).split(made.atlas.train, batch_size=8, target=target_text if target else None, shuffle=True)
    found = next(split.pipeline.batches(0, 1))[1]
    assert (found["audio_frames"].sum(-1) > 0).any() and found["patch_mask"].any()
    return found


def rollout(here: World, seed: int = 0) -> Rollout:
    """What the policy samples for `batch`, with made-up rewards and another policy's log-probabilities, so that clips are at work."""
    prompts, random = batch(target=False), np.random.default_rng(seed)
    with on_mesh(here.mesh):
        generator = here.run(Path()).generator(here.config.rl.rollouts, 1.0)
        on_device = put_batch(prompts, here.mesh)
        keys = rollout_keys(seed, 0, on_device["index"], here.config.rl.rollouts)
        responses = generator(generator.view(parameters(here.state)), on_device, keys).map(local_rows)
    samples = [None] * len(responses.tokens)
    texts, rewards = rl.score(responses, samples, here.run(Path()).atlas.tokenizer, None, RewardConfig(similarity=0.0))
    counted = np.repeat(prompts["row_mask"][:, None], here.config.rl.rollouts, axis=1)
    rewards = dataclasses.replace(rewards, score=random.standard_normal(counted.size).astype(np.float32))
    advantages = np.asarray(jax.jit(grpo_advantages)(rewards.score.reshape(counted.shape), counted))
    old = responses._replace(log_probs=responses.log_probs + 0.3 * random.standard_normal(responses.mask.shape).astype(np.float32))
    return rl.recorded(prompts, samples, old, rewards, advantages, counted, texts, 0, 1.0)
