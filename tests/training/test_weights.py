"""A run begins with exactly the weights that `config.model.weights` names, whatever kind of checkpoint that is."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax.convert.checkpoint import write_checkpoint
from omnisapiens_jax.convert.huggingface import copy_companions
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.names import lora_mappings
from omnisapiens_jax.convert.source import read_params
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.parallel.mesh import shardings
from omnisapiens_jax.processing.tensors import ConversionError
from omnisapiens_jax.processing.tokenizers import MiniTokenizer
from omnisapiens_jax.training.checkpoints import Checkpoints
from omnisapiens_jax.training.data import Atlas
from omnisapiens_jax.training.jobs import claim
from omnisapiens_jax.training.state import create_state, parameters, thinker_config
from tests import tiny
from tests.checkpoints import tiny_thinker, with_factors
from tests.training import world

LORA: dict[str, Any] = {"model__lora__rank": 2, "model__lora__alpha": 8.0, "model__lora__targets__decoder": ("q_proj",)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thinker of Hugging Face with a tokenizer, of the tiny shape."""
    return tiny_thinker(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def adapted(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with trained factors beside the weights."""
    target = tmp_path_factory.mktemp("adapted") / "checkpoint"
    with whole_or_nothing(target, None) as (folder, journal):
        write_checkpoint(with_factors(open_source(theirs), LoraConfig(2, 8.0, {"decoder": ("q_proj",)})), folder, journal)
        copy_companions(theirs, folder)
    return target


def same_bits(found: nnx.State, wanted: Any) -> None:
    def equal(a: jax.Array, b: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(a), b, strict=True)

    jax.tree.map(equal, nnx.to_pure_dict(found), wanted)


def test_imported_weights_with_new_factors(theirs: Path) -> None:
    """Straight from Hugging Face's directory onto eight devices; B is zero, so the run begins as the imported model."""
    here = world.world(world.config(mesh=(1, 4, 2), model__weights=str(theirs), **LORA))
    same_bits(here.state.frozen, read_params(open_source(theirs)))
    (first, second) = (
        nnx.to_pure_dict(here.state.trainable)["decoder"]["layers"]["block"]["self_attn"]["q_proj"][f"lora_{x}"] for x in "ab"
    )
    assert np.abs(first).max() > 0 and not np.abs(second).max()
    assert jax.tree.map(lambda leaf: leaf.sharding, here.state.frozen) == shardings(here.state.frozen, here.mesh)
    assert isinstance(here.run(Path()).atlas.tokenizer, MiniTokenizer)


def test_factors_that_the_checkpoint_has_go_on(adapted: Path, tmp_path: Path) -> None:
    """Also when the checkpoint is the stage of another run; its tokenizer is that of the weights beneath."""
    made = world.config(model__weights=str(adapted), **LORA)
    here = world.world(made)
    source = open_source(adapted)
    same_bits(here.state.frozen, read_params(source))
    assert source.lora
    rows = lora_mappings(tiny.TINY, source.lora.config)
    found = nnx.to_pure_dict(here.state.trainable)["decoder"]["layers"]["block"]["self_attn"]["q_proj"]
    for row in rows:
        np.testing.assert_array_equal(found[row.ours[-1]], [row.to_ours(source.lora.factors[name].read()) for name in row.their_names])

    claim(tmp_path, made)
    learnt = jax.tree.map(lambda leaf: leaf + 1, here.state.trainable)
    with Checkpoints(tmp_path / "sft" / "best") as checkpoints:
        checkpoints.save(1, here.state._replace(trainable=learnt), {})
    made = world.config(model__weights=str(tmp_path / "sft"), **LORA)
    there = world.world(made)
    same_bits(parameters(there.state), nnx.to_pure_dict(parameters(here.state._replace(trainable=learnt))))
    assert isinstance(Atlas(made, thinker_config(made.model)).tokenizer, MiniTokenizer)


@pytest.mark.parametrize(
    "change", [{"model__lora__rank": 0}, {"model__lora__alpha": 4.0}, {"model__lora__targets__audio": ("fc1",)}], ids=str
)
def test_factors_other_than_the_config_asks_for_are_refused(adapted: Path, change: dict[str, Any]) -> None:
    made = world.config(model__weights=str(adapted), **(LORA | change))
    with pytest.raises(
        ValueError, match=r"checkpoint has LoRA factors \(LoraConfig\(rank=2, alpha=8.0.* set config.model.lora to what is there, or merge"
    ):
        create_state(made.model, 0, world.mesh_of((1, 1, 1)))


def test_the_weights_are_cast_to_what_the_run_stores(theirs: Path) -> None:
    here = world.world(world.config(model__weights=str(theirs), model__param_dtype="bfloat16", **LORA))
    same_bits(here.state.frozen, read_params(open_source(theirs), dtype=jnp.dtype(jnp.bfloat16)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.filter_state(here.state.trainable, LoraParam))} == {jnp.dtype(jnp.float32)}


def test_weights_without_a_vocabulary_or_with_another_are_told(theirs: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(theirs, bare)
    (bare / "tokenizer.model").unlink()
    made = world.config(model__weights=str(bare))
    with pytest.raises(FileNotFoundError, match=r"bare has neither tokenizer\.json nor tokenizer\.model"):
        Atlas(made, thinker_config(made.model))
    other = dataclasses.replace(tiny.TINY, tokens=dataclasses.replace(tiny.TINY.tokens, pad=11))
    made = world.config(model__weights=str(theirs))
    with pytest.raises(ValueError, match=r"the vocabulary of .*theirs\d+ is not that of the model"):
        Atlas(made, other)


def test_weights_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"nowhere is not a directory"):
        thinker_config(world.config(model__weights=str(tmp_path / "nowhere")).model)
