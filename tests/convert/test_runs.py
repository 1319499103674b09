"""A stage of a run of ours is a checkpoint like any other: its tensors are those of the state that the run saved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from omnisapiens_jax.convert.checkpoint import write_checkpoint
from omnisapiens_jax.convert.huggingface import write_thinker
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.names import lora_mappings, mappings
from omnisapiens_jax.convert.source import Source
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.parallel.mesh import shardings
from omnisapiens_jax.processing.tensors import ConversionError, HeldTensor, Tensor
from omnisapiens_jax.training.checkpoints import Checkpoints
from omnisapiens_jax.training.jobs import claim
from omnisapiens_jax.training.state import TrainState, lora_config, make_thinker, trainable_filter
from tests import tiny
from tests.models import cases
from tests.training import world

LORA: dict[str, Any] = {
    "lora__rank": 3,
    "lora__alpha": 6.0,
    "lora__targets__decoder": ("q_proj", "down_proj"),
    "lora__targets__audio": ("fc1",),
}
UNUSED = "audio_tower.audio_bos_eos_token.weight"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thinker of Hugging Face, of the tiny shape."""
    folder = tmp_path_factory.mktemp("weights")
    cases.write_checkpoint(tiny.TINY, folder)
    return folder


def learn(stage: Path, *steps: int, kept: str = "state", mesh: world.Mesh3 = (1, 1, 1), seed: int = 0, **model: Any) -> Tensors:
    """A run that has learnt random numbers in a stage; returns those of its last step by Hugging Face's names, or PEFT's for factors."""
    made = world.config(mesh=mesh, **{f"model__{name}": value for name, value in model.items()})
    claim(stage.parent, made)
    thinker = nnx.eval_shape(lambda: make_thinker(made.model, 0))
    _, trainable, frozen = nnx.split(thinker, trainable_filter(made.model), ...)
    places, random = shardings(trainable, world.mesh_of(mesh)), np.random.default_rng(seed)

    def learnt(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
        return jax.device_put(random.standard_normal(leaf.shape).astype(leaf.dtype), place)

    with Checkpoints(stage / kept) as checkpoints:
        for step in steps:
            trainable = jax.tree.map(learnt, trainable, places)
            checkpoints.save(step, TrainState(jnp.int32(step), trainable, frozen, ()), {"next_step": step})
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(nnx.to_pure_dict(trainable))
    lora = lora_config(made.model)
    return {
        name: row.to_theirs(np.asarray(flat[row.ours] if row.layers is None else flat[row.ours][layer]))
        for row in (lora_mappings(tiny.TINY, lora) if lora else mappings(tiny.TINY))
        for layer, name in enumerate(row.their_names)
        if name != UNUSED
    }


def same(found: Mapping[str, Tensor], wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name].read(), value, err_msg=name, strict=True)
        np.testing.assert_array_equal(found[name].read(1, 3), value[1:3], err_msg=name, strict=True)


def stored(folder: Path) -> Tensors:
    return {name: tensor.read() for name, tensor in open_source(folder).tensors.items()}


def saved(source: Source, folder: Path, write: Any) -> Source:
    with whole_or_nothing(folder, None) as (made, journal):
        write(source, made, journal)
    return open_source(folder)


def test_training_of_random_weights(tmp_path: Path) -> None:
    """On eight devices, each of which wrote its own part. What no run trains is zero."""
    learnt = learn(tmp_path / "run" / "rl", 1, 3, mesh=(2, 2, 2), preset="tiny")
    source = open_source(tmp_path / "run" / "rl")
    source.check()
    assert source.kind == "step 3 of a run of ours" and source.lora is None and (source.companions / "tokenizer.model").is_file()
    learnt[UNUSED] = np.zeros((2, tiny.TINY.audio.output_dim), np.float32)
    same(source.tensors, learnt)
    same(saved(source, tmp_path / "exported", write_thinker).tensors, learnt)


def test_training_of_imported_weights(tmp_path: Path, weights: Path) -> None:
    learnt = learn(tmp_path / "run" / "rl", 2, weights=str(weights), param_dtype="bfloat16")
    source = open_source(tmp_path / "run" / "rl")
    source.check()
    assert source.companions == weights
    same(source.tensors, learnt | {UNUSED: stored(weights)[UNUSED]})


def test_lora_on_imported_weights(tmp_path: Path, weights: Path) -> None:
    """Through a checkpoint of ours, which keeps the factors beside the weights."""
    learnt = learn(tmp_path / "run" / "rl", 2, weights=str(weights), mesh=(1, 4, 2), **LORA)
    source = open_source(tmp_path / "run" / "rl")
    assert source.kind == "step 2 of a run of ours on a thinker of Hugging Face"
    for found in (source, saved(source, tmp_path / "ours", write_checkpoint)):
        found.check()
        assert found.lora and found.lora.config.rank == 3 and found.lora.config.scale == 2.0
        assert found.lora.config.targets == {"decoder": ("q_proj", "down_proj"), "audio": ("fc1",)}
        same(found.tensors, stored(weights))
        same(found.lora.factors, learnt)


def test_a_run_on_the_stage_of_another(tmp_path: Path, weights: Path) -> None:
    learn(tmp_path / "first" / "sft", 1, weights=str(weights), **LORA)
    learnt = learn(tmp_path / "second" / "rl", 1, weights=str(tmp_path / "first" / "sft"), seed=1, **LORA)
    source = open_source(tmp_path / "second" / "rl")
    assert source.kind == "step 1 of a run of ours on step 1 of a run of ours on a thinker of Hugging Face" and source.lora
    same(source.lora.factors, learnt)
    same(source.tensors, stored(weights))


def test_the_best_step_of_an_sft_stage_is_taken(tmp_path: Path, weights: Path) -> None:
    best = learn(tmp_path / "run" / "sft", 1, kept="best", weights=str(weights), **LORA)
    learn(tmp_path / "run" / "sft", 2, weights=str(weights), seed=1, **LORA)
    source = open_source(tmp_path / "run" / "sft")
    assert source.kind.startswith("step 1 of") and source.lora
    same(source.lora.factors, best)


def test_heads_of_the_weights_stay_behind(tmp_path: Path, weights: Path) -> None:
    """They read states that the run has changed."""
    parts = {"heads.0.weight": np.ones((3, 32), np.float32), "heads.0.bias": np.ones(3, np.float32)}
    source = dataclasses.replace(open_source(weights), parts={name: HeldTensor(name, value) for name, value in parts.items()})
    found = saved(source, tmp_path / "ours", write_checkpoint)
    assert found.parts.keys() == parts.keys()
    learn(tmp_path / "run" / "rl", 1, weights=str(tmp_path / "ours"), **LORA)
    stage = open_source(tmp_path / "run" / "rl")
    assert not stage.parts
    assert [(left.name, left.why) for left in stage.skipped] == [(name, "it reads states that the run has changed") for name in found.parts]
    assert {tmp_path / "run" / "config.json", tmp_path / "ours" / "manifest.json", tmp_path / "ours" / "params"} < stage.files


def test_what_is_no_whole_stage_is_told(tmp_path: Path, weights: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(weights, moved)
    learn(tmp_path / "run" / "rl", 1, weights=str(moved), **LORA)
    with pytest.raises(ConversionError, match=r"run is a run of ours; name one of its stages: .*run/rl"):
        open_source(tmp_path / "run")
    shutil.rmtree(moved)
    with pytest.raises(ConversionError, match=r"run began with the weights .*moved \(config\.model\.weights\): .*moved is not a directory"):
        open_source(tmp_path / "run" / "rl")
    shutil.copytree(weights, moved)
    config = tmp_path / "run" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({"model": json.loads(text)["model"] | {"weights": ""}}))
    with pytest.raises(ConversionError, match=r"config\.json: the run trained LoRA factors on random weights, which it did not keep"):
        open_source(tmp_path / "run" / "rl")
    config.write_text("{}")
    with pytest.raises(ConversionError, match=r"config\.json is not the config of a run \(KeyError\('model'\)\)"):
        open_source(tmp_path / "run" / "rl")
    config.write_text(text.replace('"rank": 3', '"rank": 4'))
    with pytest.raises(ConversionError, match=r"state: .*lora_a has shape .*, the config says "):
        open_source(tmp_path / "run" / "rl")
    config.write_text(text)
    shutil.rmtree(tmp_path / "run" / "rl" / "state" / "1")
    with pytest.raises(ConversionError, match=r"rl has no whole checkpoint yet"):
        open_source(tmp_path / "run" / "rl")


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    """Not as a URL, in which some letters mean others: %41 is A."""
    other = tmp_path / "A #?" / "rl"
    learn(other, 1, preset="tiny", seed=1)
    learnt = learn(tmp_path / "%41 #?" / "rl", 1, preset="tiny")
    found = open_source(tmp_path / "%41 #?" / "rl").tensors
    same({name: found[name] for name in learnt}, learnt)
