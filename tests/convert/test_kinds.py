"""What the original trainers left and released is told apart by its files and computes what it did there: pooled states and logits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import omnisapiens_jax
from omnisapiens_jax.convert.checkpoint import write_checkpoint
from omnisapiens_jax.convert.huggingface import copy_companions, write_thinker
from omnisapiens_jax.convert.kinds import canonical, open_source
from omnisapiens_jax.convert.loading import Loaded
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.models.heads import pool
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.parallel.mesh import make_mesh
from omnisapiens_jax.processing.example import Bucket
from omnisapiens_jax.processing.tensors import ConversionError, Tensor
from omnisapiens_jax.processing.torch_files import write_torch_file
from omnisapiens_jax.resources import resource
from tests import pickles
from tests.models import cases
from tests.oracle import run_oracle

CONFIG, CASE = "uneven", "texts_right"  # the original trainers gave their model no media
BOUND = 1e-5  # of the largest value; float32 sums in another order, which grow with what is summed
LABELS = [3, 4, 2]  # of each head
DOMAINS = np.array([2, 0, 1], np.int32)
WIDTHS = {"video": 13, "audio": 9}  # of the descriptors
# By name: what it is, and the modalities of its adapters.
KINDS = {
    "sft": ("an SFT checkpoint of the original trainers", ()),
    "full": ("an SFT checkpoint of the original trainers", ()),
    "audio": ("a BAM checkpoint of the original trainers", ("audio",)),
    "video_and_audio": ("a BAM checkpoint of the original trainers", ("video", "audio")),
    "released": ("a thinker of Hugging Face", ("video", "audio")),
}


def descriptors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {modality: random.standard_normal((cases.ROWS, width)).astype(np.float32) for modality, width in WIDTHS.items()}


@dataclasses.dataclass(frozen=True)
class Scene:
    """The thinker that everything was trained from, what was left, and what torch answers."""

    base: Path
    left: Path
    answer: dict[str, np.ndarray]


def with_tokenizer(folder: Path) -> Path:
    shutil.copy(resource("data/mini/tokenizer.model"), folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    cases.write_checkpoint(cases.CONFIGS[CONFIG], folder)
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def scene(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """One process of the oracle trains, so to speak, all of them."""
    left = tmp_path_factory.mktemp("left")
    given: dict[str, Any] = cases.for_transformers(CONFIG, CASE) | descriptors() | {"domains": DOMAINS}
    del given["labels"]
    answer = run_oracle("trained", folder=str(base), target=str(left), counts=LABELS, **given)
    with_tokenizer(left / "released")
    return Scene(base, left, answer)


@nnx.jit
def pooled_states(model: Thinker, batch: dict[str, jax.Array]) -> jax.Array:
    return pool(model(batch).penultimate, batch["segment_ids"] == 1)


def answers(loaded: Loaded) -> dict[str, np.ndarray]:
    """Pooled states with all deltas, and the logits of all labels."""
    rows = cases.examples(CONFIG, CASE)
    made = cases.batch(CONFIG, CASE, shape=Bucket(tokens=max(len(row.tokens) for row in rows)))
    pooled = pooled_states(loaded.model, {name: jnp.asarray(value) for name, value in made.items()})
    for modality, adapter in loaded.adapters.items():
        pooled += adapter(jnp.asarray(descriptors()[modality]), jnp.ones(cases.ROWS, bool))
    assert loaded.heads is not None
    return {"pooled": np.asarray(pooled), "logits": np.asarray(loaded.heads(pooled, jnp.asarray(DOMAINS)))}


def load(folder: Path, base: Path | None, **options: Any) -> Loaded:
    return omnisapiens_jax.load(folder, base=base, mesh=make_mesh(1, devices=jax.devices()[:1]), **options)


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_pooled_states_and_logits_are_those_of_the_original(scene: Scene, name: str) -> None:
    kind, modalities = KINDS[name]
    base = None if name == "released" else scene.base
    opened = open_source(scene.left / name, base=base)
    assert opened.kind == kind and opened.part_shapes.heads == tuple(LABELS)
    loaded = load(scene.left / name, base, dtype=jnp.float32)
    assert tuple(loaded.adapters) == modalities
    found = answers(loaded)
    other = found["logits"] == np.finfo(np.float32).min / 2
    np.testing.assert_array_equal(other, scene.answer[f"{name}/logits"] == np.finfo(np.float32).min / 2)
    for what, value in found.items():
        wanted = np.where(other, 0, scene.answer[f"{name}/{what}"]) if what == "logits" else scene.answer[f"{name}/{what}"]
        error = np.abs(np.where(other, 0, value) - wanted if what == "logits" else value - wanted).max() / np.abs(wanted).max()
        print(f"{name} {what}: {error:.1e} of the largest value")
        assert error <= BOUND


def same_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name].read(), tensor.read(), err_msg=name, strict=True)


@pytest.mark.oracle
def test_no_two_checkpoints_compute_the_same(scene: Scene) -> None:
    """Else the comparisons above would not tell them apart."""
    pooled = [scene.answer[f"{name}/pooled"] for name in KINDS if name != "released"]  # which is another one, rounded
    least = min(np.abs(one - other).max() for number, one in enumerate(pooled) for other in pooled[:number])
    assert least > 100 * BOUND * max(np.abs(value).max() for value in pooled)


@pytest.mark.oracle
@pytest.mark.parametrize("wrapper", ["fsdp", "compiled", "ddp"])
def test_what_wrappers_add_to_the_names_is_taken_off(scene: Scene, wrapper: str) -> None:
    found, wanted = (open_source(scene.left / name, base=scene.base) for name in (wrapper, "sft"))
    assert found.lora and wanted.lora and found.lora.config == wanted.lora.config
    for tensors in ("tensors", "parts"):
        same_tensors(getattr(found, tensors), getattr(wanted, tensors))
    same_tensors(found.lora.factors, wanted.lora.factors)


@pytest.mark.oracle
def test_factors_of_a_trainer_have_the_scale_of_its_runs_or_the_one_given(scene: Scene) -> None:
    """Its state dict does not say alpha."""
    for alpha, scale in ((None, 2.0), (4.0, 1.0)):
        lora = open_source(scene.left / "sft", base=scene.base, lora_alpha=alpha).lora
        assert lora and lora.config.rank == 4 and lora.config.scale == scale
        assert lora.config.targets["audio"] == ("q_proj", "k_proj", "v_proj")
        assert lora.config.targets["vision"] == ("gate_proj", "up_proj", "down_proj")


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["attached_only", "files_only"])
def test_adapters_are_found_in_the_state_dict_or_in_files_of_their_own(scene: Scene, name: str) -> None:
    """In the files in the order that meta.json says."""
    found, wanted = (open_source(scene.left / each, base=scene.base) for each in (name, "video_and_audio"))
    assert found.kind == wanted.kind
    same_tensors(found.parts, wanted.parts)


@pytest.mark.oracle
def test_adapters_in_files_of_their_own_come_before_those_attached(scene: Scene, tmp_path: Path) -> None:
    """The optimizer of the adapters stepped those."""
    folder = tmp_path / "step"
    shutil.copytree(scene.left / "audio", folder)
    stepped = {name.removeprefix("audio_adapter."): tensor.read() + 1 for name, tensor in opened_parts(scene, "audio").items()}
    write_torch_file(folder / "pytorch_model_fsdp_1.bin", stepped)
    found = open_source(folder, base=scene.base).parts
    for name, value in stepped.items():
        np.testing.assert_array_equal(found[f"audio_adapter.{name}"].read(), value)


def opened_parts(scene: Scene, name: str) -> dict[str, Tensor]:
    parts = open_source(scene.left / name, base=scene.base).parts
    return {part: tensor for part, tensor in parts.items() if "_adapter." in part}


@pytest.mark.oracle
@pytest.mark.parametrize("place", ["global_step_3", "global_step_3/actor"])
def test_shards_of_verl_make_the_thinker_again(scene: Scene, place: str) -> None:
    """Config and tokenizer lie beside them."""
    source = open_source(scene.left / place)
    source.check()
    assert source.kind == "verl's shards of 2 ranks" and source.lora is None and source.companions.name == "huggingface"
    same_tensors(source.tensors, open_source(scene.base).tensors)


@pytest.mark.oracle
def test_missing_shards_are_told(scene: Scene, tmp_path: Path) -> None:
    actor = tmp_path / "actor"
    shutil.copytree(scene.left / "global_step_3" / "actor", actor)
    (actor / "model_world_size_2_rank_0.pt").unlink()
    with pytest.raises(ConversionError, match=r"actor has the shards of ranks 1 of world size 2; all of one are needed"):
        open_source(tmp_path)
    shutil.copy(scene.left / "global_step_3" / "actor" / "model_world_size_2_rank_0.pt", actor)
    shutil.rmtree(actor / "huggingface")
    with pytest.raises(
        ConversionError, match=r"actor does not say the shapes of its model; name a directory that has its config.json: base=DIR"
    ):
        open_source(tmp_path)


@pytest.mark.oracle
def test_a_released_checkpoint_keeps_its_label_scheme(scene: Scene, tmp_path: Path) -> None:
    """Beside the heads, through a checkpoint of ours and back."""
    source = open_source(scene.left / "released")
    for step, write in (("ours", write_checkpoint), ("back", write_thinker)):
        with whole_or_nothing(tmp_path / step, None) as (folder, journal):
            write(source, folder, journal)
            copy_companions(source.companions, folder)
        assert (tmp_path / step / "label_scheme.json").is_file()
        found = open_source(tmp_path / step)
        same_tensors(found.tensors, source.tensors)
        same_tensors(found.parts, source.parts)
        source = found


def step(folder: Path, files: list[str], meta: str | None = None, names: Sequence[str] = ("backbone.model.norm.weight",)) -> Path:
    """A trainer's directory with next to nothing in it."""
    folder.mkdir()
    for file in files:
        write_torch_file(folder / file, {name: np.ones(3, np.float32) for name in names})
    if meta is not None:
        (folder / "meta.json").write_text(meta)
    return folder


WHOLE, FIRST, SECOND = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_1.bin", "pytorch_model_fsdp_2.bin"


@pytest.mark.parametrize(
    "order", ['"base"', '["video", "base"]', '["base", "base"]', '["base", "face"]', '["base", ["video"]]', "null", "3"]
)
def test_an_order_of_models_that_cannot_be_is_refused(base: Path, tmp_path: Path, order: str) -> None:
    with pytest.raises(ConversionError, match=r"meta\.json: model_order .* is not 'base', then 'video' or 'audio' or both"):
        open_source(step(tmp_path / "step", [WHOLE, FIRST], f'{{"model_order": {order}}}'), base=base)


@pytest.mark.parametrize(
    ("files", "meta", "said"),
    [
        (
            [WHOLE, FIRST],
            '{"model_order": ["base", "video", "audio"]}',
            rf"lie in {WHOLE}, {FIRST}, {SECOND}, but there are {WHOLE}, {FIRST};",
        ),
        (
            [WHOLE, SECOND],
            '{"model_order": ["base", "audio"]}',
            rf"the models base, audio .* but there are {WHOLE}, {SECOND}; copy all files",
        ),
        ([WHOLE, FIRST], '{"epoch": 3}', rf"the models base .* lie in {WHOLE}, but there are {WHOLE}, {FIRST}"),
        ([WHOLE, FIRST], None, rf"the models base .* lie in {WHOLE}, but there are {WHOLE}, {FIRST}"),
        ([WHOLE], "[]", r"meta\.json is not a JSON object"),
        ([WHOLE], '{"model', r"meta\.json cannot be read"),
    ],
    ids=["second is missing", "first is missing", "not said", "no meta", "no object", "cut off"],
)
def test_files_that_do_not_fit_the_order_are_told(base: Path, tmp_path: Path, files: list[str], meta: str | None, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        open_source(step(tmp_path / "step", files, meta), base=base)


def test_a_state_dict_needs_the_shapes_of_its_model(tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"step does not say the shapes of its model; name a directory that has its config\.json: base=DIR"
    ):
        open_source(step(tmp_path / "step", [WHOLE]))


def test_a_state_dict_that_says_a_name_twice_is_refused(base: Path, tmp_path: Path) -> None:
    names = ("module.backbone.model.norm.weight", "backbone.base_model.model.model.norm.weight")
    with pytest.raises(
        ConversionError, match=r"module\.backbone\.model\.norm\.weight and backbone\.base_model.* are both model\.norm\.weight"
    ):
        open_source(step(tmp_path / "step", [WHOLE], names=names), base=base)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"nowhere is not a directory; name the one that holds the checkpoint's files"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("thinker.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("backbone.base_model.model.lm_head.weight", "lm_head.weight"),
        ("backbone.base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("_orig_mod.module.backbone._fsdp_wrapped_module.model.language_model.norm.weight", "model.norm.weight"),
        ("base_model.model.thinker.model.visual.blocks.1.mlp.up_proj.lora_B.default.weight", "visual.blocks.1.mlp.up_proj.lora_B.weight"),
        ("module.heads.3.bias", "heads.3.bias"),
        ("visual.merger.mlp.0.weight", "visual.merger.mlp.0.weight"),
        ("submodule.x", "submodule.x"),
    ],
)
def test_names_without_what_wrappers_put_around_them(name: str, bare: str) -> None:
    assert canonical(name) == bare


def verl_shard(folder: Path, content: Any) -> Path:
    """A run of one rank, with its config beside it."""
    (folder / "huggingface").mkdir(parents=True)
    (folder / "huggingface" / "config.json").write_text(json.dumps(cases.CONFIGS[CONFIG].to_hf()))
    pickles.archive(folder / "model_world_size_1_rank_0.pt", content)
    return folder


def test_a_shard_with_a_number_for_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"rank_0\.pt does not hold a dict of tensors by their names"):
        open_source(verl_shard(tmp_path / "actor", {3: pickles.tensor()}))


def test_what_verl_says_of_its_factors_is_read(tmp_path: Path) -> None:
    """It lies beside the shards; without it alpha is twice the rank."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    folder = verl_shard(tmp_path / "actor", {f"{module}.lora_{factor}.default.weight": pickles.tensor() for factor in "AB"})
    lora = open_source(folder).lora
    assert lora and (lora.config.rank, lora.config.alpha, lora.config.stabilised) == (3, 6, False)
    described = folder / "lora_adapter" / "adapter_config.json"
    described.parent.mkdir()
    described.write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 48, "use_rslora": True}))
    source = open_source(folder)
    assert source.lora and (source.lora.config.rank, source.lora.config.alpha, source.lora.config.stabilised) == (3, 48, True)
    assert source.files == {folder / "model_world_size_1_rank_0.pt", described, folder / "huggingface" / "config.json"}
    with pytest.raises(ConversionError, match=r"says that alpha is 48; leave out the 64 that was given"):
        open_source(folder, lora_alpha=64)
