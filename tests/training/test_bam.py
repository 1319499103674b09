"""The BAM job at the smallest size, on the committed clips and their descriptors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnisapiens_jax import resources
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.convert.behaviour import read_behaviour, released_parts, write_behaviour
from omnisapiens_jax.convert.checkpoint import take_params
from omnisapiens_jax.convert.source import Params
from omnisapiens_jax.models.bam import ResidualAdapters
from omnisapiens_jax.models.behaviour import AttentionConfig, BehaviourAttention, Statistic
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.heads import DomainHeads
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.parallel.mesh import on_mesh
from omnisapiens_jax.processing.descriptors.batch import collate_descriptors
from omnisapiens_jax.processing.tensors import ConversionError, read_safetensors
from omnisapiens_jax.processing.torch_files import read_torch_file
from omnisapiens_jax.training import adapt, bam, frozen
from omnisapiens_jax.training.bam import Learner
from omnisapiens_jax.training.jobs import check
from omnisapiens_jax.training.journal import read_metrics
from omnisapiens_jax.training.state import TrainState, fresh_optimizer, parameters
from tests import parts, tiny
from tests.checkpoints import tiny_thinker
from tests.oracle import run_oracle
from tests.training import world

SMALL = {
    "bam__hidden__video": 6,
    "bam__hidden__audio": 6,
    "bam__batch_size": 8,
    "bam__epochs": 2,
    "bam__datasets": "meld_emotion",
    "bam__attention__depths": (1,),
    "bam__attention__width": 8,
    "bam__attention__heads": 2,
    "bam__attention__head_dim": 4,
    "bam__attention__landmarks": 4,
    "bam__attention__low_level": 4,
    "generation__max_tokens": 4,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place of its own for what is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield resources.cache()


def run(folder: Path, **changes: Any) -> world.World:
    made = world.config("bam", **{**SMALL, **changes})
    check(made, world.mesh_of((1, 1, 1)))
    here = world.world(made)
    with on_mesh(here.mesh):
        whole = here.run(folder)
        adapt.adapt(made, folder, here.mesh, whole.atlas, here.graph, parameters(here.state))
    return here


def started() -> Params:
    """The thinker that runs begin with."""
    here = world.world(world.config("bam", **SMALL))
    return take_params(nnx.merge(here.graph, parameters(here.state)).thinker)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets and one without any descriptor, in one job."""
    folder = tmp_path_factory.mktemp("first")
    run(folder, bam__datasets="all", bam__stage="adapters+heads")
    return folder / "bam"


@pytest.mark.slow
def test_every_dataset_with_descriptors_gets_adapters_of_its_own(first: Path) -> None:
    seen = {"meld_emotion", "meld_senti", "mmsd", "urfunny", "mimeqa", "siq2"}
    heard = seen | {"cremad", "daicwoz"}
    assert {path.name for path in first.iterdir()} == heard
    adapters = {name: read_torch_file(first / name / "adapters.bin") for name in heard}
    for modality, wanted in (("video", seen), ("audio", heard)):
        assert {name for name, found in adapters.items() if f"{modality}_adapter.alpha" in found} == wanted
        weights = [adapters[name][f"{modality}_adapter.mlp.0.weight"].read() for name in sorted(wanted)]
        assert all(not np.array_equal(one, other) for one, other in zip(weights, weights[1:], strict=False))
    for name in heard:
        scores = json.loads((first / name / "scores.json").read_text())
        assert {*scores} == {"with", "without", "shuffled"} and all(np.isfinite(losses(first / name)))
        assert (first / name / "heads.bin").exists() == (HBA.dataset(name).kind == "cls")


@pytest.mark.slow
def test_one_job_gives_each_dataset_what_a_run_of_its_own_gives(first: Path, tmp_path: Path) -> None:
    """And the second run, another one, finds the states that the first has computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "progress", lambda *_, **__: pytest.fail("the thinker was run again"))
        run(tmp_path, bam__datasets="urfunny")
    assert losses(tmp_path / "bam/urfunny") == losses(first / "urfunny")
    for file in ("adapters.bin", "heads.bin", "scores.json"):
        assert (tmp_path / "bam/urfunny" / file).read_bytes() == (first / "urfunny" / file).read_bytes()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_end(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of its first epoch, its checkpoint written or not."""

    class Killed(Exception):
        pass

    def killed(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bam, "check_finite", lambda number, _: killed() if number == 1 else None)
        with pytest.raises(Killed):
            run(tmp_path, bam__datasets="urfunny")
    run(tmp_path, bam__datasets="urfunny")
    assert losses(tmp_path / "bam/urfunny") == losses(first / "urfunny")
    assert (tmp_path / "bam/urfunny/adapters.bin").read_bytes() == (first / "urfunny/adapters.bin").read_bytes()


@pytest.mark.slow
def test_a_damaged_state_is_computed_again(first: Path, tmp_path: Path, cache: Path) -> None:
    for file in (cache / "states").glob("*/*.records"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    run(tmp_path, bam__datasets="urfunny")
    np.testing.assert_allclose(losses(tmp_path / "bam/urfunny"), losses(first / "urfunny"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dataset"), [("adapter", "urfunny"), ("adapter", "siq2"), ("attention", "siq2")])
def test_without_the_store_the_losses_are_the_same(kind: str, dataset: str, tmp_path: Path) -> None:
    """Rows are then encoded in other batches, of other lengths: equal to the rounding of float32."""
    changes = {"bam__kind": kind, "bam__datasets": dataset}
    for cached in (True, False):
        run(tmp_path / str(cached), bam__cached=cached, **changes)
    found = [losses(tmp_path / str(cached) / "bam" / dataset) for cached in (True, False)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert found[0][-1] != found[0][0]


def test_other_weights_have_other_states() -> None:
    """A single bit anywhere is enough, in any dtype; where they lie is not."""
    params = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5, jnp.bfloat16)}

    def identity(params: dict[str, jax.Array]) -> str:
        return frozen.identity(nnx.State(params))

    whole = identity(params)
    spread = jax.device_put(params, jax.sharding.NamedSharding(world.mesh_of((1, 1, 1)), jax.sharding.PartitionSpec()))
    assert identity(spread) == whole and identity({"c": params["a"], "b": params["b"]}) != whole
    random = np.random.default_rng(0)
    for name, kind in (("a", np.uint32), ("b", np.uint16)):
        for _ in range(20):
            bits = np.array(params[name]).view(kind)
            bits.reshape(-1)[random.integers(bits.size)] ^= kind(1 << random.integers(8 * bits.itemsize))
            changed = jnp.asarray(bits.view(params[name].dtype))
            assert identity({**params, name: changed}) != whole
    swapped = params["a"].at[0, 0].set(params["a"][2, 3]).at[2, 3].set(params["a"][0, 0])
    assert identity({**params, "a": swapped}) != whole


ORDER, LR, ADAPTER_LR = ("video", "audio"), 1e-4, 5e-4
# float32: Adam divides a gradient by its own size, so its rounding (1e-7 of sums of 24 products) shows as a part of a step of 5e-4.
STEP_TOLERANCE = 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("twice", [False, True])
def test_steps_equal_torchs(twice: bool, tmp_path: Path) -> None:
    """Two steps of heads and both adapters, some descriptors missing; also with the adapters stepped twice, as published: not the same."""
    made = world.config("bam", **SMALL)
    random = np.random.default_rng(0)
    rngs = nnx.Rngs(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bam, "FEATURES", {"video": 40, "audio": 60})
        behaviour = bam.make_behaviour(made.bam, tiny.TINY, ORDER, "cls", rngs)
    heads = DomainHeads(32, parts.LABELS, rngs=rngs)
    write_behaviour(tmp_path, behaviour, heads)
    batch = {
        "pooled": random.standard_normal((8, 32)).astype(np.float32),
        "domain": parts.DOMAINS.astype(np.int32),
        "label": parts.TARGETS.astype(np.int32),
        "video_descriptor": random.standard_normal((8, 40)).astype(np.float32),
        "audio_descriptor": random.standard_normal((8, 60)).astype(np.float32),
        "video_present": np.array([1, 1, 0, 1, 1, 0, 1, 1], bool),
        "audio_present": np.array([1, 0, 0, 1, 1, 1, 1, 1], bool),
    }
    wanted = run_oracle(
        "bam_steps",
        folder=str(tmp_path),
        labels=parts.LABELS,
        pooled=batch["pooled"],
        modalities=ORDER,
        **{f"{name}_descriptors": batch[f"{name}_descriptor"] for name in ORDER},
        **{f"{name}_present": batch[f"{name}_present"].astype(np.float32) for name in ORDER},
        domains=parts.DOMAINS,
        targets=parts.TARGETS,
        lr=LR,
        adapter_lr=ADAPTER_LR,
        steps=2,
        twice=twice,
    )

    def stepped(double_step: bool) -> tuple[list[float], dict[str, np.ndarray]]:
        learner = Learner(behaviour, heads)
        graph, trained, rest = nnx.split(learner, bam.trainable("adapters+heads"), ...)
        trained = jax.tree.map(jnp.copy, trained)  # a step donates them, and they are stepped from twice
        optimizer = bam.make_optimizer(made.bam, double_step=double_step)
        state = fresh_optimizer(TrainState(jnp.zeros((), jnp.int32), trained, rest, ()), optimizer, world.mesh_of((1, 1, 1)))
        below, params = nnx.split(tiny.thinker())
        site = bam.site_of(made.bam, "cls", tiny.TINY, jnp.float32)
        found = []
        for _ in range(2):
            state, metrics = bam.step((site, graph, below), "cls", optimizer, (0, 2, (0.0, 0.0)), state, params, batch)
            found.append(float(metrics["loss"]))
        after = nnx.merge(graph, state.trainable, state.frozen)
        assert isinstance(after.behaviour, ResidualAdapters)
        return found, {name: tensor.read() for name, tensor in released_parts(after.heads, after.behaviour, tmp_path).items()}

    found, after = stepped(twice)
    np.testing.assert_allclose(found, wanted["losses"], atol=1e-5)
    errors = {name: float(np.abs(value - wanted[name]).max()) for name, value in after.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= STEP_TOLERANCE
    other = stepped(not twice)[1]
    assert np.abs(other["video_adapter.mlp.0.weight"] - wanted["video_adapter.mlp.0.weight"]).max() > 10 * STEP_TOLERANCE


def test_a_withheld_descriptor_is_zeros_before_the_norm_and_none_is_scaled_up() -> None:
    """Reference 4.1: the drop comes first, so that the norm's bias still speaks."""
    made = world.config("bam", **SMALL)
    behaviour = bam.make_behaviour(made.bam, tiny.TINY, ("video",), "cls", nnx.Rngs(0))
    assert isinstance(behaviour, ResidualAdapters) and behaviour.video is not None and behaviour.video.norm is not None
    behaviour.video.norm.bias.set_value(jnp.ones_like(behaviour.video.norm.bias[...]))
    given = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3318)), jnp.float32)
    batch = {"video_descriptor": given, "video_present": jnp.array([True, True, False])}
    (dropped,) = behaviour.remember(batch, {"video": jnp.array([True, False, True])})
    (zeros,) = behaviour.remember({**batch, "video_descriptor": jnp.zeros_like(given)})
    (whole,) = behaviour.remember(batch)
    np.testing.assert_array_equal(dropped[0], zeros[0])
    np.testing.assert_array_equal(dropped[1], whole[1])
    assert np.abs(dropped[0]).max() > 0 and not np.asarray(dropped[2]).any()


def test_behaviour_attention_is_written_and_read(tmp_path: Path) -> None:
    shapes = AttentionConfig((1,), 8, 2, 4, (("landmarks", 10), ("low_level", 6)))
    made = BehaviourAttention(shapes, tiny.TINY, rngs=nnx.Rngs(0))
    made.encoders["landmarks"].mean.set_value(jnp.arange(10.0))
    write_behaviour(tmp_path, made, DomainHeads(32, parts.LABELS, rngs=nnx.Rngs(1)))
    found = read_behaviour(tmp_path, tiny.TINY)
    assert found.config == shapes
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(made))
    assert isinstance(found.encoders["landmarks"].mean, Statistic)
    with pytest.raises(ConversionError, match="another thinker"):
        read_behaviour(tmp_path, ThinkerConfig.preset("mini"))
    file = tmp_path / "behaviour.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConversionError, match="truncated"):
        read_behaviour(tmp_path, tiny.TINY)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bam__datasets": "mmpsy_anxiety"}, "no training sample of mmpsy_anxiety has a descriptor of video or audio"),
        ({"bam__datasets": "cremad", "bam__modalities": ("video",)}, "no training sample of cremad has a descriptor of video"),
        ({"bam__datasets": "tess"}, "train has no rows of tess"),
        ({"bam__datasets": "mead"}, "unknown dataset 'mead' .* cremad"),
        ({"bam__datasets": ""}, "unknown dataset ''"),
        ({"bam__datasets": "mmsd,mmsd"}, "twice"),
        ({"bam__datasets": "mmsd+siq2"}, "no adapters in common"),
        ({"bam__stage": "heads"}, r"unknown config.bam.stage 'heads'; known: adapters, "),
        ({"bam__kind": "prompt"}, r"unknown config.bam.kind 'prompt'; known: adapter, attention"),
        ({"bam__stage": "adapters"}, "random weights bring none"),
        ({"bam__stage": "adapters+lm_head+last_block"}, "free-form datasets, not for meld_emotion"),
        ({"bam__kind": "attention", "bam__attention__depths": (2,)}, "after layer 2 of 2"),
        ({"bam__drop__video": 1.0}, "probability"),
        ({"bam__epochs": -1}, "negative"),
        ({"bam__hidden__audio": 0}, "at least 1"),
        ({"bam__modalities": ()}, "video or audio, or both"),
        ({"atlas__batches": "packed"}, "packed is not for bam"),
        ({"atlas__training__audio_dropout": 0.5}, "bam.cached=False"),
        ({"atlas__training__word_dropout": 0.5}, "word_dropout .*bam.cached=False"),
        ({"bam__kind": "attention", "bam__epochs": 0}, "none bring behaviour attention"),
        ({"blanked": ("text",)}, "blanked is not for bam"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        run(tmp_path, **changes)


def test_the_control_gives_every_sample_the_descriptors_of_another_of_its_dataset() -> None:
    ids, datasets = np.arange(10, 21), np.array([0, 0, 1, 0, 1, 2, 0, 1, 0, 1, 0])
    given = adapt.others(ids, datasets)
    assert sorted(given) == [*ids] and (given != ids)[datasets != 2].all() and given[5] == ids[5]
    assert all(datasets[given - 10] == datasets)


@pytest.mark.parametrize("kind", ["adapter", "attention"])
def test_the_real_shapes_fit(kind: str) -> None:
    """At 7B: a step is traced, nothing is computed."""
    made = world.runpy.run_path(str(world.resource("configs/bam.py")))["get_config"]("7b")
    made.bam.kind = kind
    thinker_shapes = ThinkerConfig.preset("7b")
    bam.check(made.bam, thinker_shapes)
    site = bam.site_of(made.bam, "cls", thinker_shapes, jnp.bfloat16)
    below, params = nnx.split(
        nnx.eval_shape(lambda: Thinker(thinker_shapes, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    )
    learner = nnx.eval_shape(
        lambda: Learner(
            bam.make_behaviour(made.bam, thinker_shapes, ORDER, "cls", nnx.Rngs(0)), DomainHeads(3584, parts.LABELS, rngs=nnx.Rngs(1))
        )
    )
    graph, trained, rest = nnx.split(learner, bam.trainable("adapters+heads"), ...)
    optimizer = bam.make_optimizer(made.bam, double_step=False)
    state = TrainState(jnp.zeros((), jnp.int32), trained, rest, jax.eval_shape(optimizer.init, trained))
    batch = {**collate_descriptors([None] * 4, bam.descriptor_config(made.bam, trailing_pad=False)), **site.collate([None] * 4, 512)}
    after, metrics = jax.eval_shape(
        lambda *given: bam.step((site, graph, below), "cls", optimizer, (0, 2, (0.2, 0.2)), *given), state, params, batch
    )
    assert metrics["loss"].shape == () and jax.tree.map(lambda leaf: leaf.shape, after.trainable) == jax.tree.map(
        lambda leaf: leaf.shape, trained
    )
    if kind == "adapter":
        assert sum(leaf.size for leaf in jax.tree.leaves(trained["behaviour"])) == 1_777_389 + 5_114_827


@pytest.mark.slow
def test_free_form_answers_can_train_the_last_block_and_the_head(tmp_path: Path) -> None:
    """Of two datasets together; what is written goes into the thinker's place, and answers come from it."""
    run(tmp_path, bam__datasets="siq2+mimeqa", bam__stage=bam.LAST_BLOCK, bam__lr=1e-2)
    folder = tmp_path / "bam/siq2+mimeqa"
    found, start = read_safetensors(folder / "tail.safetensors"), started()
    assert {name for name in found if not name.startswith("model.layers.1.")} == {"lm_head.weight"} and len(found) == 13
    assert np.abs(found["lm_head.weight"].read() - np.asarray(start["lm_head"]["kernel"]).T).max() > 1e-3
    first = np.asarray(start["decoder"]["layers"]["block"]["mlp"]["up_proj"]["kernel"])
    assert np.abs(found["model.layers.1.mlp.up_proj.weight"].read() - first[1].T).max() > 1e-3
    assert losses(folder)[-1] < losses(folder)[0]


@pytest.mark.slow
def test_released_adapters_are_evaluated_as_they_are(tmp_path: Path) -> None:
    """A folder as the released ones are: a thinker, heads and adapters; nothing is trained, and only descriptors make a difference."""
    theirs = tiny_thinker(tmp_path / "theirs")
    made = world.config("bam", **SMALL)
    adapters = bam.make_behaviour(made.bam, tiny.TINY, ("video",), "cls", nnx.Rngs(0))
    write_behaviour(theirs, adapters, DomainHeads(32, parts.LABELS, rngs=nnx.Rngs(1)))
    changes = {"model__weights": str(theirs), "bam__epochs": 0, "bam__stage": "adapters", "compat__media_inputs": "text_only"}
    changes["bam__modalities"] = ("video",)
    run(tmp_path / "run", **changes)
    folder = tmp_path / "run/bam/meld_emotion"
    for file in ("adapters.bin", "heads.bin"):
        assert (folder / file).read_bytes() == (theirs / file).read_bytes()
    assert not (folder / "best").exists() and {*json.loads((folder / "scores.json").read_text())} == {*adapt.CONTROLS}
    for changes_too, says in (
        ({"bam__hidden__video": 7}, "has a video adapter .*config.bam asks for"),
        ({"bam__datasets": "meld_emotion, mmsd"}, "adapters of one dataset"),
        ({"bam__kind": "attention", "bam__epochs": 1}, "would leave them out"),
    ):
        with pytest.raises(ValueError, match=says):
            run(tmp_path / "wrong", **{**changes, **changes_too})
