"""Samples that share a row are trained exactly as if each had a row of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.atlas.recipe import Recipe, target_text
from omnisapiens_jax.generation.sampling import Generator, Sampling
from omnisapiens_jax.parallel.mesh import on_mesh
from omnisapiens_jax.processing.chat import FORMAT_PROMPTS
from omnisapiens_jax.processing.example import Batch, Bucket, Example, collate, collate_packed
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.training.data import Atlas
from omnisapiens_jax.training.jobs import check
from omnisapiens_jax.training.journal import read_metrics
from omnisapiens_jax.training.losses import lm_loss
from tests import tiny
from tests.training import world

ROWS = ((0, 1, 2), (3, 4))  # samples of each packed row; another place of the first stays unused


@functools.cache
def examples() -> list[Example]:
    """Five samples of the committed clips, text alone, with sound and with pictures among them."""
    made = world.config("generative")
    atlas = Atlas(made, tiny.TINY)
    options = ProcessingConfig(**{**made.processing.to_dict(), "format_prompt": FORMAT_PROMPTS[made.processing.format_prompt]})
    recipe = Recipe(atlas.tokenizer, tiny.TINY, options, max_tokens=256, target=target_text)
    source = atlas.source(made.atlas.train)
    by_signature: dict[str, list[int]] = {}
    for i in range(len(source)):
        by_signature.setdefault(source[i].modality_signature, []).append(i)
    found = [ids[k] for k in (0, 1) for ids in by_signature.values()][:5]
    built = [recipe.build(source[i]) for i in found]
    assert {(len(e.audio_chunks) > 0, len(e.patches) > 0) for e in built} == {(False, False), (True, False), (True, True)}
    return built


def packed() -> Batch:
    bucket = Bucket.together(example.size() for example in examples())
    rows = [[examples()[i] for i in row] for row in ROWS]
    return collate_packed([[*rows[0][:1], None, *rows[0][1:]], rows[1]], bucket, tiny.TINY)


@functools.cache
def gradient() -> Callable[[Batch], tuple[float, float, nnx.State]]:
    graph, params = nnx.split(tiny.thinker())

    def loss(params: nnx.State, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return lm_loss(nnx.merge(graph, params), batch)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def call(batch: Batch) -> tuple[float, float, nnx.State]:
        (total, tokens), grads = step(params, batch)
        return float(total), float(tokens), grads

    return call


@functools.cache
def alone() -> tuple[float, float, nnx.State]:
    return gradient()(collate(examples(), Bucket.covering(example.size() for example in examples()), tiny.TINY))


def distance(grads: nnx.State) -> float:
    """How far a gradient is from that of the samples alone, beside the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(alone()[2]), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs)


def test_loss_and_gradient_of_packed_rows_are_those_of_the_samples_alone() -> None:
    loss, tokens, grads = gradient()(packed())
    assert tokens == alone()[1] > 20
    np.testing.assert_allclose(loss, alone()[0], rtol=1e-6)
    assert distance(grads) < 2e-5


def _leak(batch: Batch) -> Batch:
    return {**batch, "segment_ids": np.minimum(batch["segment_ids"], 1)}


def _running_positions(batch: Batch) -> Batch:
    return {**batch, "positions": batch["positions"] + 40 * np.maximum(batch["segment_ids"] - 1, 0)[:, None]}


def _media_of_a_neighbour(batch: Batch) -> Batch:
    """Every media token reads the place before its own, so that a sample's first reads the last of the sample before it."""
    return {**batch, "media_index": np.where(batch["media_index"] > 0, batch["media_index"] - 1, batch["media_index"])}


@pytest.mark.parametrize("defect", [_leak, _media_of_a_neighbour])
def test_a_leak_between_samples_would_be_seen(defect: Callable[[Batch], Batch]) -> None:
    loss, _, grads = gradient()(defect(packed()))
    assert abs(loss / alone()[0] - 1) > 1e-4 and distance(grads) > 1e-2


def test_positions_may_begin_anywhere_but_not_at_the_same_place_as_a_neighbours() -> None:
    """The decoder's positions are relative: a defect there cannot be seen in the loss, so the batch itself is looked at."""
    np.testing.assert_allclose(gradient()(_running_positions(packed()))[0], alone()[0], rtol=1e-4)
    batch = packed()
    for row, segments in enumerate(((1, 3, 4), (1, 2))):
        for number, example in zip(segments, (examples()[i] for i in ROWS[row]), strict=True):
            own = batch["segment_ids"][row] == number
            np.testing.assert_array_equal(batch["positions"][row][:, own], example.positions)
            assert batch["prompt_length"][row, number - 1] == example.prompt_length and batch["row_mask"][row, number - 1]
    assert batch["row_mask"].sum() == 5


def test_packing_what_is_sampled_from_is_refused() -> None:
    with pytest.raises(ValueError, match="packed is for supervised training"):
        check(world.config("rl", atlas__batches="packed"), world.mesh_of((1, 1, 1)))
    with pytest.raises(ValueError, match="unknown config.atlas.batches 'pack'"):
        check(world.config("generative", atlas__batches="pack"), world.mesh_of((1, 1, 1)))
    sampling = Sampling(rollouts=1, max_tokens=4, temperature=0.0, eos=(tiny.TINY.tokens.im_end,), pad=tiny.TINY.tokens.pad, chunk=4)
    generator = Generator(tiny.thinker(), sampling, unroll=False)
    with pytest.raises(ValueError, match="packed rows cannot be continued"):
        generator(nnx.state(tiny.thinker()), jax.tree.map(jnp.asarray, packed()), jnp.zeros((2, 1)))


@pytest.mark.slow
def test_a_run_trains_on_packed_rows_and_answers_prompts(tmp_path: Path) -> None:
    made = world.config("generative", atlas__batches="packed", atlas__training__temperature=2.0, atlas__training__audio_dropout=0.2)
    made.generative.batch_size = 2
    here = world.world(made)
    with on_mesh(here.mesh):
        job = here.run(tmp_path)
        state = job.fit(made.generative, "generative", here.state)
        assert int(state.step) > 0 and read_metrics(tmp_path / "generative" / "metrics.jsonl")
        assert len(job.evaluate("generative", state, job.held_out())) == len(job.atlas.source(made.atlas.test))
