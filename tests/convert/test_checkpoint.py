"""Our checkpoint: the same bits back, on any mesh and in any dtype; whole or not there; and the command line over it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from omnisapiens_jax.convert import checkpoint, huggingface
from omnisapiens_jax.convert.source import Params, read_params
from omnisapiens_jax.convert.tensors import ConversionError
from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker
from tests.models import cases, ours

REPO = Path(__file__).resolve().parents[2]
CONFIG = cases.CONFIGS["uneven"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full Omni checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("hf")
    stored = {f"thinker.{name}": value.astype(ml_dtypes.bfloat16) for name, value in cases.their_tensors(CONFIG).items()}
    save_file(stored | {"talker.x": np.ones(2, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": CONFIG.to_hf()}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def read(folder: Path) -> Params:
    return read_params(huggingface.open_huggingface(folder))


def same_bits(found: Params, wanted: Params) -> None:
    def equal(a: np.ndarray, b: np.ndarray) -> None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(equal, found, wanted)


def test_saved_parameters_come_back_bit_for_bit(tmp_path: Path, source: Path) -> None:
    params = read(source)
    checkpoint.save_params(tmp_path / "saved", params, CONFIG)
    assert checkpoint.load_config(tmp_path / "saved") == CONFIG
    same_bits(read_params(checkpoint.open_checkpoint(tmp_path / "saved")), params)
    manifest = json.loads((tmp_path / "saved" / "manifest.json").read_text())
    assert manifest["dtypes"] == ["bfloat16"] and len(manifest["tensors"]) == len(cases.their_tensors(CONFIG))
    assert manifest["parameters"] == sum(value.size for value in cases.their_tensors(CONFIG).values())


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


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, REPO / "tools" / "convert_weights.py", *map(str, arguments)]
    return subprocess.run(done, cwd=REPO, capture_output=True, text=True, check=False)


def test_the_command_imports_and_exports(tmp_path: Path, source: Path) -> None:
    done = command("import", source, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "left behind: 1 tensors of the talker" in done.stderr and "187,136 parameters in bfloat16" in done.stderr
    done = command("export", tmp_path / "ours", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    found, wanted = load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert {f"thinker.{name}" for name in found} | {"talker.x"} == wanted.keys()
    assert all(found[name].tobytes() == wanted[f"thinker.{name}"].tobytes() for name in found)

    again = command("import", source, tmp_path / "ours")
    assert again.returncode == 1 and "exists; remove it or name another directory" in again.stderr
    nothing = command("import", tmp_path / "nowhere", tmp_path / "new")
    assert nothing.returncode == 1 and "nowhere is not a directory" in nothing.stderr and "Traceback" not in nothing.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours"]
