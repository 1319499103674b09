"""Our checkpoint: an Orbax tree that Orbax itself reads, a receipt of every tensor, and the same bits back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from omnisapiens_jax.convert import checkpoint, huggingface
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.convert.source import FLOATS, Params, read_params
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.processing.tensors import ConversionError, HeldTensor
from tests.convert.test_huggingface import store, tensors
from tests.models import cases, ours

CONFIG = cases.CONFIGS["uneven"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full Omni checkpoint in bfloat16, in one file."""
    stored = {f"thinker.{name}": value for name, value in tensors("uneven", ml_dtypes.bfloat16).items()}
    stored |= {"talker.x": np.ones(2, np.float32), "token2wav.y": np.ones(3, np.float32)}
    return store(tmp_path_factory.mktemp("omni") / "hf", stored, {"model_type": "qwen2_5_omni", "thinker_config": CONFIG.to_hf()})


@pytest.fixture(params=["whole", "in_pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With chunks that hold a layer, and with some so small that most layers take several, the last of them shorter."""
    if request.param == "in_pieces":
        monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1_000)
    return request.param


def bring_in(source: Path, target: Path, dtype: np.dtype | None = None) -> Path:
    opened = huggingface.open_huggingface(source)
    with whole_or_nothing(target, {}) as (folder, journal):
        checkpoint.write_checkpoint(opened, folder, journal, dtype=dtype)
    return target


def take_out(source: Path, target: Path) -> Path:
    with whole_or_nothing(target, {}) as (folder, journal):
        huggingface.write_thinker(checkpoint.open_checkpoint(source), folder, journal, layout=checkpoint.file_layout(source))
    return target


def read(folder: Path) -> Params:
    return read_params(huggingface.open_huggingface(folder))


def same_bits(found: Params, wanted: Params) -> None:
    def equal(a: np.ndarray, b: np.ndarray) -> None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(equal, found, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_orbax_alone_restores_the_same_arrays(tmp_path: Path, dtype: str, pieces: str) -> None:
    """As numpy arrays, and onto eight devices, each holding its part, in another dtype."""
    stored = tensors("uneven", FLOATS[dtype])
    stored["visual.blocks.1.norm1.weight"] = np.zeros_like(stored["visual.blocks.1.norm1.weight"])  # nothing but zeros is stored as well
    stored["model.norm.weight"][:2] = [-0.0, np.finfo(np.float16).smallest_subnormal]
    folder = store(tmp_path / "hf", stored, CONFIG.to_hf())
    saved, wanted = bring_in(folder, tmp_path / "saved"), read(folder)
    handler = ocp.PyTreeCheckpointHandler
    with ocp.Checkpointer(handler()) as orbax:
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        same_bits(orbax.restore(saved / "params", args=ocp.args.PyTreeRestore(restore_args=args)), wanted)

        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
        other = jnp.bfloat16 if dtype == "float32" else jnp.float32

        def place(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
            divided = PartitionSpec(*("fsdp" if size % 8 == 0 and axis == leaf.ndim - 1 else None for axis, size in enumerate(leaf.shape)))
            return jax.ShapeDtypeStruct(leaf.shape, other, sharding=NamedSharding(mesh, divided))

        target = jax.tree.map(place, wanted)
        args = ocp.checkpoint_utils.construct_restore_args(target)
        restored = orbax.restore(saved / "params", args=ocp.args.PyTreeRestore(item=target, restore_args=args))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, target)
    assert restored["decoder"]["embed_tokens"].addressable_shards[0].data.shape == (72, 7)
    same_bits(restored, jax.tree.map(lambda leaf: leaf.astype(other), wanted))


def test_the_receipt_says_where_every_tensor_came_from(tmp_path: Path, source: Path, pieces: str) -> None:
    stored = load_file(source / "model.safetensors")
    manifest = json.loads((bring_in(source, tmp_path / "saved") / "manifest.json").read_text())
    assert manifest["kind"] == "a full Omni model of Hugging Face" and manifest["source"] == str(source) and manifest["lora"] is None
    assert manifest["dtypes"] == ["bfloat16"] and manifest["parameters"] == sum(value.size for value in tensors("uneven").values())
    wanted = {name: row for row in mappings(CONFIG) for name in row.their_names}
    assert [record["name"] for record in manifest["tensors"]] == list(wanted)
    for record in manifest["tensors"]:
        row, value = wanted[record["name"]], stored[record["stored_name"]]
        assert record == {
            "name": record["name"],
            "stored_name": f"thinker.{record['name']}",
            "file": "model.safetensors",
            "with": [],
            "tree": "params",
            "path": ".".join(row.ours),
            "layer": None if row.layers is None else row.their_names.index(record["name"]),
            "shape": list(value.shape),
            "dtype": "bfloat16",
            "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
        }
        assert (tmp_path / "saved" / "params" / record["path"] / ".zarray").is_file()
    why = "the speech side of a full Omni model"
    assert manifest["skipped"] == [{"name": name, "file": "model.safetensors", "why": why} for name in ("talker.x", "token2wav.y")]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("config", cases.CONFIGS)
def test_an_import_is_exported_as_the_files_it_came_from(tmp_path: Path, config: str, dtype: str, pieces: str) -> None:
    folder = tmp_path / "hf"
    store(folder, tensors(config, FLOATS[dtype]), cases.CONFIGS[config].to_hf(), shards=3)
    back = take_out(bring_in(folder, tmp_path / "saved"), tmp_path / "back")
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(files) == 3 and {path.name: path.read_bytes() for path in back.glob("*.safetensors")} == files
    index, wanted = (json.loads((where / huggingface.INDEX).read_text()) for where in (back, folder))
    assert index["weight_map"] == wanted["weight_map"]
    assert huggingface.open_huggingface(back).config == cases.CONFIGS[config]
    receipt, manifest = (json.loads(path.read_text()) for path in (back / huggingface.RECEIPT, tmp_path / "saved" / "manifest.json"))
    hashes = [{record["name"]: record["sha256"] for record in each["tensors"]} for each in (receipt, manifest)]
    assert hashes[0] == hashes[1]


def test_an_import_that_casts_rounds_once_and_says_so(tmp_path: Path) -> None:
    stored = tensors("uneven")
    saved = bring_in(store(tmp_path / "hf", stored, CONFIG.to_hf()), tmp_path / "saved", FLOATS["bfloat16"])
    back = load_file(take_out(saved, tmp_path / "back") / "model.safetensors")
    assert {name: value.tobytes() for name, value in back.items()} == {
        name: value.astype(ml_dtypes.bfloat16).tobytes() for name, value in stored.items()
    }
    record = next(record for record in checkpoint.load_manifest(saved)["tensors"] if record["name"] == "model.norm.weight")
    assert record["dtype"] == "bfloat16" and record["sha256"] == hashlib.sha256(back["model.norm.weight"].tobytes()).hexdigest()


def test_a_tensor_that_is_not_finite_is_named_on_the_way_in_and_out(tmp_path: Path) -> None:
    stored = tensors("uneven")
    good = bring_in(store(tmp_path / "good", stored, CONFIG.to_hf()), tmp_path / "saved")
    stored["audio_tower.layers.1.fc1.weight"][-1, -1] = np.nan
    bad = store(tmp_path / "bad", stored, CONFIG.to_hf())
    said = r"1 of 960 values read of audio_tower\.layers\.1\.fc1\.weight are infinite or NaN; a model with them answers nothing\."
    with pytest.raises(ConversionError, match=rf"bad/model\.safetensors: {said}"):
        bring_in(bad, tmp_path / "never")
    array = "audio.layers.block.fc1.kernel"
    chunk = good / "params" / array / "1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-4] + np.float32(np.inf).tobytes())
    with pytest.raises(ConversionError, match=rf"saved/params: {said}"):
        take_out(good, tmp_path / "never")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "saved"]


def test_a_file_that_is_missing_or_cut_is_named(tmp_path: Path, source: Path) -> None:
    """And is not read as zeros."""
    saved = bring_in(source, tmp_path / "saved")
    chunk = saved / "params" / "decoder.layers.block.mlp.up_proj.kernel" / "2.0.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-2])
    said = r"saved/params: model\.layers\.2\.mlp\.up_proj\.weight cannot be read \((.|\n)*up_proj\.kernel/2\.0\.0"
    with pytest.raises(ConversionError, match=said):
        read_params(checkpoint.open_checkpoint(saved))
    chunk.unlink()
    with pytest.raises(ConversionError, match=said.split(r" \(")[0]):
        read_params(checkpoint.open_checkpoint(saved))
    (chunk.parent / ".zarray").unlink()
    with pytest.raises(ConversionError, match=r"saved/params: decoder\.layers\.block\.mlp\.up_proj\.kernel is missing or broken"):
        checkpoint.open_checkpoint(saved)


def test_saved_parameters_come_back_bit_for_bit(tmp_path: Path, source: Path) -> None:
    params = read(source)
    checkpoint.save_params(tmp_path / "saved", params, CONFIG)
    assert checkpoint.load_config(tmp_path / "saved") == CONFIG
    same_bits(read_params(checkpoint.open_checkpoint(tmp_path / "saved")), params)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    params = read(source)
    bad = params | {"lm_head": {"kernel": params["lm_head"]["kernel"].T}}
    with pytest.raises(ConversionError, match=r"misshapen lm_head\.kernel \(72, 56\) instead of \(56, 72\)"):
        checkpoint.save_params(tmp_path / "saved", bad, CONFIG)
    monkeypatch.setattr(checkpoint.json, "dumps", lambda *_, **__: 1 / 0)  # dies after the arrays are written
    with pytest.raises(ZeroDivisionError):
        checkpoint.save_params(tmp_path / "saved", params, CONFIG)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    checkpoint.save_params(tmp_path / "saved", params, CONFIG)
    with pytest.raises(FileExistsError, match="saved exists; remove it or name another directory"):
        checkpoint.save_params(tmp_path / "saved", params, CONFIG)


def test_what_is_no_checkpoint_of_ours_is_said(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConversionError, match=rf"no checkpoint of ours .* tools/convert_weights\.py import {source} DIR"):
        checkpoint.open_checkpoint(source)
    checkpoint.save_params(tmp_path / "saved", read(source), CONFIG)
    manifest = tmp_path / "saved" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(ConversionError, match="'omnisapiens-jax thinker' version 99, not 'omnisapiens-jax thinker' 2"):
        checkpoint.open_checkpoint(tmp_path / "saved")


def test_put_and_take_leave_lora_alone() -> None:
    """Parameters go in, cast to the model's own dtype, and come out; the factors of an adapter stay as they were."""
    lora = LoraConfig(2, 4.0, {"decoder": ("q_proj",)})
    model = nnx.jit(lambda: Thinker(CONFIG, rngs=nnx.Rngs(3), lora=lora, param_dtype=jnp.bfloat16))()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, LoraParam)))
    params = nnx.to_pure_dict(nnx.state(ours.thinker("uneven"), nnx.Param))
    checkpoint.put_params(model, params)
    same_bits(checkpoint.take_params(model), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    same_bits(nnx.to_pure_dict(nnx.state(model, LoraParam)), before)
    with pytest.raises(ConversionError, match=r"missing decoder\.norm\.scale"):
        checkpoint.put_params(model, params | {"decoder": params["decoder"] | {"norm": {}}})


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with heads, imported from the full Omni one."""
    heads = {"heads.0.weight": np.ones((2, CONFIG.text.hidden_size), np.float32), "heads.0.bias": np.ones(2, np.float32)}
    opened = dataclasses.replace(
        huggingface.open_huggingface(source), parts={name: HeldTensor(name, value) for name, value in heads.items()}
    )
    target = tmp_path_factory.mktemp("ours") / "saved"
    with whole_or_nothing(target, None) as (folder, journal):
        checkpoint.write_checkpoint(opened, folder, journal)
    return target


def _all_in(file: Any) -> Any:
    return lambda manifest: [record.update(file=file) for record in manifest["tensors"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((_all_in(file), "which is no name of a file") for file in ("/tmp/x.safetensors", "../x.safetensors", "a/b", "..", "", "a\0b")),
        (_all_in(3), r"in tensors, .* does not say name, file, tree, sha256"),
        (lambda manifest: manifest["tensors"].insert(0, "x"), r"in tensors, 'x' does not say"),
        (lambda manifest: manifest["skipped"][0].pop("why"), r"in skipped, .* does not say name, file, why"),
        *((lambda manifest, key=key: manifest.pop(key), f"it does not say {key}") for key in ("kind", "lora", "tensors", "skipped")),
        *(
            (lambda manifest, key=key: manifest.update({key: 3}), f"it does not say {key}")
            for key in ("kind", "lora", "tensors", "skipped")
        ),
        *((lambda manifest, lora=lora: manifest.update(lora=lora), "describes no LoRA") for lora in ({"rank": 2}, {"targets": 3})),
        (lambda manifest: manifest.update(lora={"rank": 0, "alpha": 1.0, "targets": {}}), "a LoRA rank is a whole number from 1 on"),
        (lambda manifest: manifest["tensors"].pop(0), r"and the files beside it disagree about audio_tower\.conv1\.weight"),
    ],
)
def test_a_receipt_that_is_broken_is_told_and_nothing_in_it_believed(
    saved: Path, tmp_path: Path, change: Callable[[Any], None], said: str
) -> None:
    """A file in it could be anywhere, and an export writes there."""
    (tmp_path / "params").symlink_to(saved / "params")
    for name in ("config.json", "parts.safetensors"):
        shutil.copy(saved / name, tmp_path)
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConversionError, match=rf"manifest\.json.*{said}"):
        open_source(tmp_path)


def test_heads_that_were_lost_are_missed(saved: Path, tmp_path: Path) -> None:
    for name in ("params", "config.json", "manifest.json"):
        (tmp_path / name).symlink_to(saved / name)
    with pytest.raises(ConversionError, match=r"disagree about heads\.0\.bias, heads\.0\.weight; import the checkpoint again"):
        open_source(tmp_path)


def test_a_disk_that_fails_is_no_fault_of_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    """So that what is done of an export is kept, and the same command goes on."""
    shutil.copytree(saved, tmp_path / "saved")
    chunk = tmp_path / "saved" / "params" / "lm_head.kernel" / "0.0"
    chunk.unlink()
    chunk.symlink_to(chunk)
    with pytest.raises(OSError, match=r"saved/params: lm_head\.weight cannot be read \((.|\n)*Too many levels of symbolic links"):
        open_source(tmp_path / "saved").tensors["lm_head.weight"].read()


def test_what_a_kill_left_beside_the_arrays_is_cleared(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the making of the tree and the removal of the place where it was made."""
    rmdir = Path.rmdir

    def killed(self: Path) -> None:
        if self.name == "params.new":
            raise KeyboardInterrupt
        rmdir(self)

    monkeypatch.setattr(Path, "rmdir", killed)
    with pytest.raises(KeyboardInterrupt):
        bring_in(source, tmp_path / "saved")
    monkeypatch.undo()
    assert (tmp_path / ".saved.unfinished" / "params.new").is_dir()
    bring_in(source, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"params", "config.json", "manifest.json"}
