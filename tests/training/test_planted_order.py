"""A label that lives in the order of a clip's frames alone: behaviour attention learns it, the pooled adapter cannot."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.models.behaviour import media_starts
from omnisapiens_jax.models.heads import DomainHeads, pool
from omnisapiens_jax.training import bam
from omnisapiens_jax.training.bam import Learner
from omnisapiens_jax.training.frozen import Site
from omnisapiens_jax.training.state import TrainState, fresh_optimizer
from tests import parts, tiny
from tests.training import world

WIDTH, FRAMES, ROWS, STEPS = 6, 8, 64, 400
HUMOUR = 6  # the domain, whose two labels are the last of all
CHANCE = (0.4, 0.6)  # of 512 samples: four standard deviations


def clips(random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames `[B, T, d]` and labels `[B]`: one feature rises through the clip or falls, by the label; the frames themselves say nothing."""
    frames = random.standard_normal((rows, FRAMES, WIDTH)).astype(np.float32)
    labels = random.integers(0, 2, rows)
    order = np.argsort(frames[..., 0], axis=1)
    order = np.where(labels[:, None] == 1, order, order[:, ::-1])
    return np.take_along_axis(frames, order[..., None], axis=1), labels


def batch(random: np.random.Generator, rows: int) -> dict[str, jax.Array]:
    """Prompts of words with clips: states after the first of two layers, and the same pooled."""
    frames, labels = clips(random, rows)
    prompts = tiny.text_prompts(tuple(random.integers(6, 13, rows).tolist()), 12, seed=int(random.integers(1 << 30)))
    states = tiny.thinker().decoder.embed_tokens[...][prompts["tokens"]]
    pooled = np.concatenate([frames.mean(1), frames.std(1)], axis=1)
    given: dict[str, Any] = {name: prompts[name] for name in ("positions", "segment_ids", "labels") if name in prompts}
    given |= {
        "states": states,
        "pooled": pool(states, jnp.asarray(prompts["segment_ids"] == 1)),
        "media_starts": media_starts(jax.tree.map(jnp.asarray, prompts)),
    }
    given |= {"domain": np.full(rows, HUMOUR, np.int32), "label": (sum(parts.LABELS) - 2 + labels).astype(np.int32)}
    given |= {"landmarks": frames, "landmarks_mask": np.ones(frames.shape[:2], bool)}
    given["landmarks_times"] = np.tile(np.arange(FRAMES, dtype=np.float32) / 20, (rows, 1))
    given |= {"video_descriptor": pooled, "video_present": np.ones(rows, bool)}
    return jax.tree.map(jnp.asarray, given)


def learnt(kind: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy on clips that were not trained on."""
    made = world.config("bam", bam__kind=kind, bam__adapter_lr=5e-3, bam__lr=5e-3)
    made.bam.attention.update({"depths": (1,), "width": 16, "heads": 4, "head_dim": 8})
    made.bam.hidden.video = 64
    monkeypatch.setattr(bam, "FEATURES", {"video": 2 * WIDTH, "audio": 1})
    monkeypatch.setattr(bam, "FRAME_WIDTH", WIDTH)
    behaviour = bam.make_behaviour(made.bam, tiny.TINY, ("video",), "cls", nnx.Rngs(0))
    learner = Learner(behaviour, DomainHeads(32, parts.LABELS, rngs=nnx.Rngs(1)))
    graph, trained, rest = nnx.split(learner, bam.trainable("adapters+heads"), ...)
    optimizer = bam.make_optimizer(made.bam, double_step=False)
    state = fresh_optimizer(TrainState(jnp.zeros((), jnp.int32), trained, rest, ()), optimizer, world.mesh_of((1, 1, 1)))
    site = bam.site_of(made.bam, "cls", tiny.TINY, jnp.float32)
    assert site == (Site("pooled" if kind == "adapter" else "depth", 1, 32, np.dtype(np.float32)))
    below, params = nnx.split(tiny.thinker())
    step = functools.partial(bam.step, (site, graph, below), "cls", optimizer, (0, 1, (0.0, 0.0)))
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        state, _ = step(state, params, batch(random, ROWS))
    held_out = batch(np.random.default_rng(1), 512)
    logits = nnx.merge(graph, state.trainable, state.frozen).logits(site, tiny.thinker(), held_out)
    return float((logits.argmax(-1) == held_out["label"]).mean())


@pytest.mark.slow
def test_attention_learns_what_lies_in_the_order_and_the_pooled_adapter_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, adapter = (learnt(kind, monkeypatch) for kind in ("attention", "adapter"))
    print(f"attention {attention:.3f}, adapter {adapter:.3f}")
    assert attention > 0.9 and CHANCE[0] < adapter < CHANCE[1]


def test_the_clips_say_nothing_but_by_their_order() -> None:
    """Turning a clip round turns its label and leaves mean and spread, to the rounding of their sums."""
    frames, labels = clips(np.random.default_rng(0), 200)
    rising = np.sign(np.diff(frames[..., 0], axis=1))
    assert (rising == np.where(labels[:, None] == 1, 1, -1)).all()
    turned = frames[:, ::-1]
    np.testing.assert_allclose(turned.mean(1), frames.mean(1), atol=1e-6)
    np.testing.assert_allclose(turned.std(1), frames.std(1), atol=1e-6)
