"""LoRA adapters of PEFT, in and out: they answer as in PEFT, beside the weights and merged, however their keys are spelled."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from omnisapiens_jax.convert import peft
from omnisapiens_jax.convert.checkpoint import put_params, write_checkpoint
from omnisapiens_jax.convert.huggingface import write_thinker
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.loading import read_params_onto
from omnisapiens_jax.convert.source import Lora, Source, read_params
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.models.layers import LORA_TARGETS
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.parallel.mesh import make_mesh
from omnisapiens_jax.processing.tensors import ConversionError, HeldTensor
from tests.models import cases, ours, references
from tests.oracle import run_oracle

CASE = "mixed_right"  # text, image, audio and video: an adapter of any tower shows
BOUND = 1e-5  # of the largest logit; float32 sums in another order, which grow with what is summed
PROJECTIONS = list(LORA_TARGETS["decoder"])
# By name: the config, and PEFT's settings. A list of suffixes finds the projections of all towers, as in the original runs.
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("uneven", {"r": 3, "lora_alpha": 6, "target_modules": r".*language_model.*\.(q_proj|v_proj|o_proj|down_proj)"}),
    "towers": ("uneven", {"r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": PROJECTIONS}),
    "tied": ("tied", {"r": 2, "lora_alpha": 3, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}),
}
TARGETS = {
    "decoder": {"decoder": ("q_proj", "v_proj", "o_proj", "down_proj")},
    "towers": {
        "decoder": LORA_TARGETS["decoder"],
        "audio": ("q_proj", "k_proj", "v_proj"),
        "vision": ("gate_proj", "up_proj", "down_proj"),
    },
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """Thinkers, adapters on them, and what transformers and PEFT answer."""

    bases: dict[str, Path]
    adapters: Path
    answer: dict[str, np.ndarray]

    def open(self, name: str) -> Source:
        return open_source(self.adapters / name, base=self.bases[MADE[name][0]])


def random_lora(config: str) -> Lora:
    """Factors on every projection of every tower, by PEFT's names without prefix."""
    factors = {f"{name.replace('/', '.')}.weight": value for name, value in references.lora_factors(config).items()}
    return Lora(references.LORA, {name: HeldTensor(name, value) for name, value in factors.items()})


def exported(source: Source, folder: Path) -> Path:
    with whole_or_nothing(folder, None) as (made, journal):
        peft.write_adapter(source, made, journal)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {config: tmp_path_factory.mktemp(config) for config in cases.CONFIGS}
    for config, folder in found.items():
        cases.write_checkpoint(cases.CONFIGS[config], folder)
    return found


@pytest.fixture(scope="module")
def scene(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """One process of the oracle makes its adapters and loads ours."""
    root = tmp_path_factory.mktemp("adapters")
    loaded, merged = {}, {}
    for config, folder in bases.items():
        source = dataclasses.replace(open_source(folder), lora=random_lora(config))
        loaded[f"exported_{config}"] = (config, str(exported(source, root / f"exported_{config}")))
        with whole_or_nothing(root / f"merged_{config}", None) as (made, journal):
            write_thinker(source.merged(), made, journal)
        merged[f"merged_{config}"] = (config, str(root / f"merged_{config}"))
    arrays: dict[str, Any] = {f"{config}/{name}": value for config in bases for name, value in cases.for_transformers(config, CASE).items()}
    folders = {config: str(folder) for config, folder in bases.items()}
    answer = run_oracle("peft_adapters", folders=folders, target=str(root), made=MADE, loaded=loaded, merged=merged, **arrays)
    return Scene(bases, root, answer)


def logits(source: Source) -> np.ndarray:
    """Of the real tokens `[n, V]`; factors are kept beside the weights where the source has some."""
    source.check()
    name = next(name for name, config in cases.CONFIGS.items() if config == source.config)
    if source.lora is None:
        model = ours.make(source.config, read_params(source))
    else:
        lora = source.lora.config
        model = nnx.eval_shape(lambda: Thinker(source.config, rngs=nnx.Rngs(0), lora=lora))
        put_params(model, *read_params_onto(source, model, make_mesh(1, devices=jax.devices()[:1])))
    return ours.answers(model, cases.batch(name, CASE))["logits"]


def check(found: np.ndarray, answer: np.ndarray, config: str, label: str) -> None:
    wanted = answer[cases.for_transformers(config, CASE)["attention_mask"] == 1]
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    print(f"{label}: {error:.1e} of the largest logit")
    assert error <= BOUND


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["decoder", "towers"])
def test_an_adapter_beside_the_weights_answers_as_in_peft(scene: Scene, name: str) -> None:
    source = scene.open(name)
    assert source.lora and source.lora.config.targets == TARGETS[name]
    check(logits(source), scene.answer[f"{name}/logits"], MADE[name][0], f"{name}, kept")


@pytest.mark.oracle
@pytest.mark.parametrize("name", MADE)
def test_a_merged_adapter_answers_as_in_peft(scene: Scene, name: str) -> None:
    check(logits(scene.open(name).merged()), scene.answer[f"{name}/logits"], MADE[name][0], f"{name}, merged")


@pytest.mark.oracle
def test_an_adapter_changes_the_answers(scene: Scene) -> None:
    """Else the comparisons above would prove nothing."""
    for name, (config, _) in MADE.items():
        plain = logits(open_source(scene.bases[config]))
        wanted = scene.answer[f"{name}/logits"][cases.for_transformers(config, CASE)["attention_mask"] == 1]
        assert np.abs(plain - wanted).max() > 1000 * BOUND * np.abs(wanted).max()


def renamed(folder: Path, target: Path, change: Callable[[str], str]) -> Path:
    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    save_file({change(name): value for name, value in load_file(file).items()}, file)
    return target


def of_transformers_4(name: str) -> str:
    for memory, disk in (("model.language_model.", "model."), ("model.audio_tower.", "audio_tower."), ("model.visual.", "visual.")):
        name = name.replace(f"base_model.model.{memory}", f"base_model.model.{disk}")
    return name


SPELLINGS: dict[str, Callable[[str], str]] = {
    "transformers 4": of_transformers_4,
    "a full Omni model": lambda name: of_transformers_4(name).replace("base_model.model.", "base_model.model.thinker."),
    "a full Omni model of transformers 5": lambda name: name.replace("base_model.model.", "base_model.model.thinker."),
    "a state dict": lambda name: name.replace(".weight", ".default.weight"),
}


def same(found: Source, wanted: Source) -> None:
    assert found.lora and wanted.lora and found.lora.config == wanted.lora.config
    assert found.lora.factors.keys() == wanted.lora.factors.keys()
    for name, tensor in wanted.lora.factors.items():
        np.testing.assert_array_equal(found.lora.factors[name].read(), tensor.read(), strict=True)


@pytest.mark.oracle
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_keys_is_the_same_adapter(scene: Scene, tmp_path: Path, spelling: str) -> None:
    folder = renamed(scene.adapters / "towers", tmp_path / "renamed", SPELLINGS[spelling])
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert names.isdisjoint(load_file(scene.adapters / "towers" / "adapter_model.safetensors"))
    same(open_source(folder, base=scene.bases["uneven"]), scene.open("towers"))


@pytest.mark.oracle
@pytest.mark.parametrize("files", ["pickled", "sharded"])
def test_an_adapter_in_other_files_is_the_same(scene: Scene, files: str) -> None:
    folder = scene.adapters / files
    assert not (folder / "adapter_model.safetensors").exists()
    same(open_source(folder, base=scene.bases["uneven"]), scene.open("decoder"))


@pytest.mark.oracle
@pytest.mark.parametrize("config", cases.CONFIGS)
def test_peft_loads_what_we_export(scene: Scene, config: str) -> None:
    name = f"exported_{config}"
    assert not scene.answer[f"{name}/missing"].size and not scene.answer[f"{name}/unexpected"].size
    source = dataclasses.replace(open_source(scene.bases[config]), lora=random_lora(config))
    check(logits(source.merged()), scene.answer[f"{name}/logits"], config, f"{config}, exported factors")


@pytest.mark.oracle
@pytest.mark.parametrize("config", cases.CONFIGS)
def test_transformers_loads_the_merged_export(scene: Scene, config: str) -> None:
    """With nothing missing and nothing unknown, which the oracle asserts."""
    merged, wanted = scene.answer[f"merged_{config}/logits"], scene.answer[f"exported_{config}/logits"]
    check(merged[cases.for_transformers(config, CASE)["attention_mask"] == 1], wanted, config, f"{config}, merged export in transformers")


@pytest.mark.oracle
def test_an_adapter_there_and_back_has_the_same_bits(scene: Scene, tmp_path: Path) -> None:
    """Through a checkpoint of ours, which keeps the factors beside the weights."""
    source = scene.open("towers")
    with whole_or_nothing(tmp_path / "ours", None) as (folder, journal):
        write_checkpoint(source, folder, journal)
    back = exported(open_source(tmp_path / "ours"), tmp_path / "back")
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (back, scene.adapters / "towers"))
    found, wanted = ({of_transformers_4(name): value for name, value in factors.items()} for factors in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, strict=True)
    same(open_source(back, base=scene.bases["uneven"]), source)


def test_factors_are_added_in_float32_to_weights_of_bfloat16(bases: dict[str, Path], tmp_path: Path) -> None:
    """And rounded once, when they are written; any rows of the sum are those of the whole."""
    source = dataclasses.replace(open_source(bases["uneven"]), lora=random_lora("uneven"))
    halved = {name: HeldTensor(name, tensor.read().astype(ml_dtypes.bfloat16)) for name, tensor in source.tensors.items()}
    source = dataclasses.replace(source, tensors=halved)
    name, lora = "model.layers.1.mlp.down_proj", source.lora
    assert lora
    first, second = (lora.factors[f"{name}.lora_{factor}.weight"].read().astype(np.float64) for factor in "AB")
    wanted = halved[f"{name}.weight"].values.astype(np.float64) + lora.config.scale * second @ first
    merged = source.merged().tensors[f"{name}.weight"]
    assert merged.read().dtype == np.float32 and merged.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(merged.read(), wanted, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(merged.read(3, 7), wanted[3:7], atol=1e-6 * np.abs(wanted).max())
    with whole_or_nothing(tmp_path / "ours", None) as (folder, journal):
        write_checkpoint(source.merged(), folder, journal)
    np.testing.assert_array_equal(open_source(tmp_path / "ours").tensors[f"{name}.weight"].read(), merged.read().astype(ml_dtypes.bfloat16))


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    """On the projections of every tower of "uneven", made without PEFT."""
    return exported(dataclasses.replace(open_source(bases["uneven"]), lora=random_lora("uneven")), tmp_path / "adapter")


def told(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOHA"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"layers_to_transform": [0, 1]},
        {"alora_invocation_tokens": [1, 2]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_not_plain_lora_is_refused(adapter: Path, bases: dict[str, Path], changes: dict[str, Any]) -> None:
    told(adapter, **changes)
    (key,) = changes
    with pytest.raises(
        ConversionError, match=rf"adapter_config\.json: {key} .*: only plain LoRA can be read; merge this adapter with PEFT"
    ):
        open_source(adapter, base=bases["uneven"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("layers.1.self_attn.q_proj", "layers.7.self_attn.q_proj"),
            r"layers\.7\.self_attn\.q_proj\.lora_A\.weight in .*adapter_model\.safetensors, ",
        ),
        (
            ("visual.blocks.0.attn.q.", "visual.merger.mlp.0."),
            r"takes .*base_model\.model\.model\.visual\.merger\.mlp\.0\.lora_A\.weight in ",
        ),
        (("model.layers.0.mlp.up_proj.lora_A.weight", "score.weight"), r"base_model\.model\.score\.weight are no LoRA factors"),
    ],
    ids=["layer", "part", "weight"],
)
def test_a_key_without_a_home_is_listed(adapter: Path, bases: dict[str, Path], tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        open_source(renamed(adapter, tmp_path / "renamed", lambda name: name.replace(*change)), base=bases["uneven"])


def test_two_spellings_of_one_factor_are_refused(adapter: Path, bases: dict[str, Path]) -> None:
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(factors | {name.replace("model.layers", "model.language_model.layers"): factors[name]}, file)
    with pytest.raises(ConversionError, match=r"are both model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight"):
        open_source(adapter, base=bases["uneven"])


def test_factors_that_do_not_fit_are_listed(adapter: Path, bases: dict[str, Path]) -> None:
    """LoRA on some layers alone, and ranks that the config does not say."""
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    one, other = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 2))
    del factors[one]
    save_file(factors | {other: factors[other][:1]}, file)
    with pytest.raises(
        ConversionError, match=r"1 missing: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight\n  1 misshapen: .* \(1, 56\)"
    ):
        open_source(adapter, base=bases["uneven"]).check()


def test_an_adapter_that_lacks_something_says_what(adapter: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    told(adapter, base_model_name_or_path="Qwen/Qwen2.5-Omni-7B")
    with pytest.raises(
        ConversionError, match=r"adapter holds LoRA factors only; .* \(it says 'Qwen/Qwen2\.5-Omni-7B'\): base=DIR in Python, --base"
    ):
        open_source(adapter)
    with whole_or_nothing(tmp_path / "kept", None) as (folder, journal):
        write_checkpoint(open_source(adapter, base=bases["uneven"]), folder, journal)
    with pytest.raises(ConversionError, match=r"kept has LoRA factors of its own; merge them first"):
        open_source(adapter, base=tmp_path / "kept")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"has adapter_config\.json but neither adapter_model\.safetensors nor adapter_model\.bin"):
        open_source(adapter, base=bases["uneven"])


def test_an_export_needs_factors(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has no LoRA factors"):
        exported(open_source(bases["uneven"]), tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": 3.9},
        {"r": float("inf")},
        {"r": "3"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": None},
    ],
    ids=str,
)
def test_a_rank_or_alpha_that_cannot_be_is_refused(adapter: Path, bases: dict[str, Path], changes: dict[str, Any]) -> None:
    told(adapter, **changes)
    with pytest.raises(ConversionError, match=r"adapter_config\.json does not say r and lora_alpha \(ValueError\(.a LoRA (rank|alpha) is"):
        open_source(adapter, base=bases["uneven"])


def test_an_adapter_without_factors_is_refused(adapter: Path, bases: dict[str, Path]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({}, file)
    with pytest.raises(ConversionError, match=r"adapter holds no LoRA factors of a thinker; left behind: nothing"):
        open_source(adapter, base=bases["uneven"])
    talker = "base_model.model.talker.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({talker: np.ones((3, 4), np.float32)}, file)
    with pytest.raises(ConversionError, match=rf"no LoRA factors of a thinker; left behind: {talker}"):
        open_source(adapter, base=bases["uneven"])


def test_an_adapter_is_read_from_its_files_and_those_of_its_base(adapter: Path, bases: dict[str, Path]) -> None:
    """Also when it is merged: work that goes on must find all of them unchanged."""
    source, base = open_source(adapter, base=bases["uneven"]), bases["uneven"]
    wanted = {adapter / "adapter_model.safetensors", adapter / "adapter_config.json", base / "model.safetensors", base / "config.json"}
    assert source.files == source.merged().files == wanted


def test_an_alpha_that_is_said_is_not_given_another(adapter: Path, bases: dict[str, Path]) -> None:
    assert open_source(adapter, base=bases["uneven"], lora_alpha=random_lora("uneven").config.alpha).lora
    with pytest.raises(ConversionError, match=r"which says that alpha is 6; leave out the 7 that was given \(lora_alpha\)"):
        open_source(adapter, base=bases["uneven"], lora_alpha=7)
