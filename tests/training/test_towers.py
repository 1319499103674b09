"""LoRA on the decoder behind frozen towers, which are run once over every sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.parallel.mesh import on_mesh
from omnisapiens_jax.training import frozen, jobs
from omnisapiens_jax.training.frozen import Site, identity
from omnisapiens_jax.training.journal import read_metrics
from omnisapiens_jax.training.state import parameters, thinker_of
from tests.checkpoints import tiny_thinker
from tests.training import world

LORA: dict[str, Any] = {"model__lora__rank": 2, "model__lora__targets__decoder": ("q_proj", "down_proj")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_thinker(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """States of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def fit(folder: Path, job: str, **changes: Any) -> list[dict[str, float]]:
    made = world.config(job, atlas__training__word_dropout=0.0, **LORA, **changes)
    jobs.check(made, world.mesh_of((1, 1, 1)))
    here = world.world(made)
    with on_mesh(here.mesh):
        here.run(folder).fit(made[job], job, jax.tree.map(jnp.copy, here.state), jobs._LESSONS[job])
    return read_metrics(folder / job / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["sft", "generative"])
def test_kept_embeddings_give_the_same_losses(job: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout and all. Towers see rows in other batches, of other shapes, so the losses are equal to the rounding of float32."""
    found = {
        cached: fit(tmp_path / str(cached), job, model__weights=str(weights), **{f"{job}__cached": cached}) for cached in (True, False)
    }
    for name in ("loss", "validation_loss"):
        values = [[row[name] for row in found[cached] if name in row] for cached in (True, False)]
        np.testing.assert_allclose(*values, rtol=1e-5)
        assert len(values[0]) > 1 and len({*values[0]}) > 1

    # Another run on the same weights, with other factors, finds all of it.
    monkeypatch.setattr(frozen, "progress", lambda *_, **__: pytest.fail("the towers were run again"))
    again = fit(tmp_path / "again", job, model__weights=str(weights), seed=1, **{f"{job}__cached": True})
    assert [row["loss"] for row in again] != [row["loss"] for row in found[True]]


def test_a_batch_of_kept_embeddings_has_no_media(weights: Path, tmp_path: Path) -> None:
    """Nothing is decoded, and no tower can be run."""
    here = world.world(made := world.config("sft", model__weights=str(weights), sft__cached=True, **LORA))
    with on_mesh(here.mesh):
        train, _ = here.run(tmp_path).splits(made.sft, here.state, jobs.LABELS)
        plain = dict(train.pipeline.batches(0, 3))
        for step, batch in train.batches(0, 3):
            assert not {"tokens", "audio_chunks", "patches", "media_index"} & {*batch}
            for name in ("positions", "segment_ids", "labels", "domain", "label", "index"):
                np.testing.assert_array_equal(batch[name], plain[step][name])
            thinker = thinker_of(nnx.merge(here.graph, parameters(here.state)))
            embedded = thinker.embed({name: jnp.asarray(array) for name, array in plain[step].items()})
            wanted = np.asarray(embedded) * (batch["segment_ids"] > 0)[..., None]
            np.testing.assert_allclose(batch["embedded"], wanted, atol=1e-5 * np.abs(wanted).max())


def test_embeddings_depend_on_the_towers_and_the_table_alone(weights: Path) -> None:
    here = world.world(world.config("sft", model__weights=str(weights), **LORA))
    params = nnx.state(thinker_of(nnx.merge(here.graph, parameters(here.state))))
    site = Site("embeddings", 0, 32, np.float32)
    wanted = identity(site.reads(params))
    read = 0
    for path, leaf in (flat := nnx.to_flat_state(params)):
        changed = [(name, other.replace(other[...] + 1) if name == path else other) for name, other in flat]
        other = identity(site.reads(nnx.from_flat_state(changed))) != wanted
        assert other == (path[0] != "lm_head" and (path[0] != "decoder" or path[1] == "embed_tokens")), path
        read += other
        assert leaf.size
    assert read > 30


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__lora__rank": 0}, r"config.sft.cached keeps what frozen towers give, but every parameter is trained"),
        ({"model__lora__targets__vision": ("q",)}, r"but vision is trained: it is for LoRA on the decoder alone"),
        ({"compat__lora_scope": "suffix"}, r"but audio, vision is trained"),
        ({"atlas__training__audio_dropout": 0.1}, r"config.atlas.training.audio_dropout .* but rows are encoded once"),
        ({"atlas__training__word_dropout": 0.1}, r"config.atlas.training.word_dropout .* set config.sft.cached=False"),
        ({"atlas__batches": "packed"}, r"config.sft.cached keeps rows of one sample: config.atlas.batches homogeneous or mixed"),
    ],
)
def test_what_cannot_be_kept_is_told(changes: dict[str, Any], told: str) -> None:
    made = world.config("sft", sft__cached=True, **{**LORA, **changes})
    with pytest.raises(ValueError, match=told):
        jobs.check(jobs.defaults.with_compat(made), world.mesh_of((1, 1, 1)))
