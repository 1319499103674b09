"""Hugging Face directories in and out: bit-identical, whatever the prefix and the shards; what does not fit is listed by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omnisapiens_jax.convert import huggingface
from omnisapiens_jax.convert.huggingface import INDEX, SINGLE
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.source import FLOATS, Params, Source, read_params
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.tensors import ConversionError
from tests.models import cases
from tests.oracle import run_oracle

Tensors = dict[str, np.ndarray]
AS_TRANSFORMERS = {"format": "pt"}  # what it writes into the header of every file


def tensors(config: str, dtype: type | np.dtype = np.float32) -> Tensors:
    return {name: value.astype(dtype) for name, value in cases.their_tensors(cases.CONFIGS[config]).items()}


def store(folder: Path, stored: Tensors, config: dict, *, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(stored)
    if shards == 1:
        save_file(stored, folder / SINGLE, AS_TRANSFORMERS)
        return folder
    where = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}  # layers torn apart
    for file in set(where.values()):
        save_file({name: stored[name] for name in names if where[name] == file}, folder / file, AS_TRANSFORMERS)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def read(folder: Path, dtype: np.dtype | None = None) -> Params:
    return read_params(huggingface.open_huggingface(folder), dtype=dtype)


def write(source: Source, target: Path, shard_bytes: int = huggingface.SHARD_BYTES) -> None:
    with whole_or_nothing(target, {}) as (folder, journal):
        huggingface.write_thinker(source, folder, journal, shard_bytes=shard_bytes)


def full_omni(config: ThinkerConfig) -> dict:
    """The nested file of a full Omni model, in transformers 4's spelling."""
    return {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": config.to_hf(), "talker_config": {}}


def read_back(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_bits(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("config", cases.CONFIGS)
def test_there_and_back_is_bit_identical(tmp_path: Path, config: str, dtype: type) -> None:
    stored = tensors(config, dtype)
    stored["model.norm.weight"][:2] = np.array(
        [np.finfo(np.float16).smallest_subnormal, -0.0], dtype
    )  # values that arithmetic may not keep
    source = store(tmp_path / "hf", stored, cases.CONFIGS[config].to_hf())
    assert huggingface.open_huggingface(source).config == cases.CONFIGS[config]
    huggingface.save_thinker(read(source), cases.CONFIGS[config], tmp_path / "back")
    assert_same_bits(read_back(tmp_path / "back"), stored)
    assert json.loads((tmp_path / "back" / "config.json").read_text()).items() >= cases.CONFIGS[config].to_hf().items()


def test_a_full_omni_checkpoint_gives_its_thinker(tmp_path: Path) -> None:
    stored = tensors("uneven", ml_dtypes.bfloat16)
    speech = {"talker.model.norm.weight": np.ones(3, np.float32), "token2wav.x": np.ones(2, np.float32), "talker.y": np.ones(1, np.float32)}
    source = store(
        tmp_path / "hf", {f"thinker.{name}": value for name, value in stored.items()} | speech, full_omni(cases.CONFIGS["uneven"]), shards=3
    )
    opened = huggingface.open_huggingface(source)
    assert {skipped.name for skipped in opened.skipped} == speech.keys()
    assert opened.config == cases.CONFIGS["uneven"]
    huggingface.save_thinker(read_params(opened), opened.config, tmp_path / "back")
    assert_same_bits(read_back(tmp_path / "back"), stored)


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path) -> None:
    stored = tensors("tied")
    opened = huggingface.open_huggingface(store(tmp_path / "hf", stored, cases.CONFIGS["tied"].to_hf()))
    limit = 100_000
    write(opened, tmp_path / "back", shard_bytes=limit)
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 5 and {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        held = load_file(file)
        assert {name: index["weight_map"][name] for name in held} == dict.fromkeys(held, file.name)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= limit
    assert_same_bits(read_back(tmp_path / "back"), stored)
    again = read(tmp_path / "back")
    np.testing.assert_array_equal(again["decoder"]["embed_tokens"], stored["model.embed_tokens.weight"])


def test_a_dtype_can_be_asked_for(tmp_path: Path) -> None:
    stored = tensors("tied")
    source = store(tmp_path / "hf", stored, cases.CONFIGS["tied"].to_hf())
    scale = read(source, FLOATS["bfloat16"])["decoder"]["norm"]["scale"]
    assert scale.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(scale, stored["model.norm.weight"].astype(ml_dtypes.bfloat16))


def _one_missing(stored: Tensors) -> None:
    del stored["audio_tower.conv2.bias"]


def _misnamed(stored: Tensors) -> None:
    stored["model.layers.0.self_attn.q_proj.wieght"] = stored.pop("model.layers.0.self_attn.q_proj.weight")


def _turned(stored: Tensors) -> None:
    stored["visual.blocks.1.mlp.up_proj.weight"] = np.ascontiguousarray(stored["visual.blocks.1.mlp.up_proj.weight"].T)
    stored["audio_tower.ln_post.weight"] = np.ones(7, np.float32)


def _one_layer_more(stored: Tensors) -> None:
    stored["model.layers.3.input_layernorm.weight"] = stored["model.layers.2.input_layernorm.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_one_missing, r"1 missing: audio_tower\.conv2\.bias"),
        (
            _misnamed,
            r"1 unknown: model\.layers\.0\.self_attn\.q_proj\.wieght in model\.safetensors\n"
            r"  1 missing: model\.layers\.0\.self_attn\.q_proj\.weight",
        ),
        (
            _turned,
            r"2 misshapen: audio_tower\.ln_post\.weight in model\.safetensors \(7,\) instead of \(24,\), "
            r"visual\.blocks\.1\.mlp\.up_proj\.weight in model\.safetensors \(40, 52\) instead of \(52, 40\)",
        ),
        (_one_layer_more, r"1 unknown: model\.layers\.3\.input_layernorm\.weight"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path: Path, change: Callable[[Tensors], None], said: str) -> None:
    stored = tensors("uneven")
    change(stored)
    source = store(tmp_path / "hf", stored, cases.CONFIGS["uneven"].to_hf())
    with pytest.raises(ConversionError, match=said):
        read(source)


def test_a_name_without_the_prefix_of_the_others_is_unknown(tmp_path: Path) -> None:
    """Else a stray `model.norm.weight` could silently take the place of `thinker.model.norm.weight`."""
    stored = {f"thinker.{name}": value for name, value in tensors("uneven").items()}
    stored["model.norm.weight"] = stored["thinker.model.norm.weight"]
    source = store(tmp_path / "hf", stored, full_omni(cases.CONFIGS["uneven"]))
    with pytest.raises(ConversionError, match=r"1 unknown: model\.norm\.weight in model\.safetensors$"):
        read(source)


def test_mixed_dtypes_in_a_stack_are_refused_unless_one_is_named(tmp_path: Path) -> None:
    stored = tensors("uneven")
    name = "model.layers.1.mlp.up_proj.weight"
    stored[name] = stored[name].astype(np.float16)
    source = store(tmp_path / "hf", stored, cases.CONFIGS["uneven"].to_hf())
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is float16, the layers before it float32"):
        read(source)
    assert read(source, np.dtype(np.float32))["decoder"]["norm"]["scale"].dtype == np.float32


def test_a_broken_directory_says_what_is_wrong(tmp_path: Path) -> None:
    config = cases.CONFIGS["uneven"]
    with pytest.raises(ConversionError, match=r"nowhere is not a directory\. It must hold config\.json"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"empty has no config\.json"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config.to_hf()))
    with pytest.raises(ConversionError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json; it holds config\.json"):
        read(tmp_path / "empty")

    cut = store(tmp_path / "cut", tensors("uneven"), config.to_hf())
    content = (cut / SINGLE).read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 0):
        (cut / SINGLE).write_bytes(content[:length])
        with pytest.raises(ConversionError, match=r"model\.safetensors(: the header is broken| is truncated)"):
            read(cut)

    lost = store(tmp_path / "lost", tensors("uneven"), config.to_hf(), shards=3)
    (lost / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"model-00002-of-00003\.safetensors is named in .* but is not there"):
        read(lost)

    for index, said in (
        ("[]", r"is no index of shards"),
        ('{"weight_map": ["a"]}', r"is no index of shards"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"a lies in '\.\./model\.safetensors', which is no file beside it"),
        ('{"weight_map": {"a": ".."}}', r"a lies in '\.\.', which is no file beside it"),
        ('{"weight_map": {"a": 3}}', r"a lies in 3, which is no file beside it"),
    ):
        (lost / INDEX).write_text(index)
        with pytest.raises(ConversionError, match=rf"index\.json.*{said}"):
            read(lost)

    double = store(tmp_path / "double", tensors("uneven"), config.to_hf(), shards=2)
    shards = [double / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file(load_file(shards[1]) | dict([next(iter(load_file(shards[0]).items()))]), shards[1], AS_TRANSFORMERS)
    with pytest.raises(ConversionError, match=r"is given twice: in .*model-00001-of-00002\.safetensors and in .*model-00002-of-00002"):
        read(double)

    lying = store(tmp_path / "lying", tensors("uneven"), config.to_hf(), shards=2)
    index = json.loads((lying / INDEX).read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    (lying / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"index\.json and its shards disagree about model\.ghost"):
        read(lying)


def test_parameters_of_another_model_are_not_written(tmp_path: Path) -> None:
    params = read(store(tmp_path / "hf", tensors("uneven"), cases.CONFIGS["uneven"].to_hf()))
    with pytest.raises(ConversionError, match=r"unknown lm_head\.kernel, misshapen audio\.conv1\.kernel \(36, 24\) instead of \(30, 32\)"):
        huggingface.save_thinker(params, cases.CONFIGS["tied"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_head_is_tied_only_where_the_config_says_so(tmp_path: Path) -> None:
    """Else a checkpoint whose head was lost would answer with its embeddings."""
    stored = tensors("uneven")
    head = stored.pop("lm_head.weight")
    folder = store(tmp_path / "hf", stored, cases.CONFIGS["uneven"].to_hf())
    with pytest.raises(ConversionError, match=r"1 missing: lm_head\.weight$"):
        read(folder)
    (folder / "config.json").write_text(json.dumps(cases.CONFIGS["uneven"].to_hf() | {"tie_word_embeddings": True}))
    assert huggingface.open_huggingface(folder).config.tie_head
    own = store(tmp_path / "own", stored | {"lm_head.weight": head}, json.loads((folder / "config.json").read_text()))
    assert not huggingface.open_huggingface(own).config.tie_head  # a head that is there is used


def test_a_manifest_of_others_does_not_make_it_a_checkpoint_of_ours(tmp_path: Path) -> None:
    folder = store(tmp_path / "hf", tensors("uneven"), cases.CONFIGS["uneven"].to_hf())
    (folder / "manifest.json").write_text('{"name": "my app"}')
    assert open_source(folder).kind == "a thinker of Hugging Face"


def test_a_full_omni_model_has_what_its_base_has_and_nothing_more(tmp_path: Path) -> None:
    """Its config and voices, but no heads, adapters or index of other files."""
    thinker = tensors("uneven")
    source = huggingface.open_huggingface(store(tmp_path / "hf", thinker, cases.CONFIGS["uneven"].to_hf()))
    stored = {f"thinker.{name}": -value for name, value in thinker.items()} | {"talker.x": np.ones(2, np.float32)}
    base = store(tmp_path / "base", stored, full_omni(cases.CONFIGS["uneven"]))
    for name in ("heads.bin", "adapter_config.json", INDEX, "generation_config.json"):
        (base / name).write_text("{}")

    def written(target: Path) -> set[str]:
        with whole_or_nothing(target, None) as (folder, journal):
            huggingface.write_omni(source, base, folder, journal)
        return {path.name for path in target.iterdir()}

    with pytest.raises(ConversionError, match=r"base has no spk_dict\.pt, without which transformers loads no full Omni model"):
        written(tmp_path / "out")
    (base / "spk_dict.pt").write_bytes(b"voices")
    assert written(tmp_path / "out") == {SINGLE, "config.json", "spk_dict.pt", "generation_config.json", huggingface.RECEIPT}
    assert_same_bits(
        read_back(tmp_path / "out"), {f"thinker.{name}": value for name, value in thinker.items()} | {"talker.x": stored["talker.x"]}
    )


@pytest.mark.oracle
@pytest.mark.parametrize("config", cases.CONFIGS)
def test_what_we_write_transformers_reads_and_the_other_way_round(tmp_path: Path, config: str) -> None:
    """Our bfloat16 export -> transformers, which finds every tensor -> its own shards and config spelling -> ours: the same bits."""
    stored = tensors(config, ml_dtypes.bfloat16)
    opened = huggingface.open_huggingface(store(tmp_path / "hf", stored, cases.CONFIGS[config].to_hf()))
    write(opened, tmp_path / "ours", shard_bytes=100_000)
    report = run_oracle("save_thinker", source=str(tmp_path / "ours"), target=str(tmp_path / "theirs"), dtype="bfloat16", shard="100KB")
    assert {kind: names.tolist() for kind, names in report.items() if names.size} == {}
    again = huggingface.open_huggingface(tmp_path / "theirs")
    assert again.config == opened.config
    write(again, tmp_path / "back")
    assert_same_bits(read_back(tmp_path / "back"), stored)
