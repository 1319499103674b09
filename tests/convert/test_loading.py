"""Any checkpoint is loaded onto any mesh bit for bit, each row of it read once, with a processor that makes batches for it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from safetensors.numpy import load_file, save_file

import omnisapiens_jax
from omnisapiens_jax.convert import loading
from omnisapiens_jax.convert.checkpoint import take_params, write_checkpoint
from omnisapiens_jax.convert.huggingface import copy_companions
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.loading import read_params_onto
from omnisapiens_jax.convert.names import lora_mappings, mappings
from omnisapiens_jax.convert.source import read_params
from omnisapiens_jax.convert.unfinished import whole_or_nothing
from omnisapiens_jax.models.layers import LORA_TARGETS, LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.parallel.mesh import shardings
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tensors import ConversionError, Tensor
from tests import tiny
from tests.checkpoints import tiny_thinker, with_factors
from tests.training.world import mesh_of

README = Path(__file__).resolve().parents[2] / "README.md"
ONE, EIGHT = (1, 1, 1), (1, 4, 2)
LORA = LoraConfig(4, 6.0, LORA_TARGETS)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thinker of Hugging Face with a tokenizer, of the tiny shape."""
    return tiny_thinker(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def ours(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint of ours, in bfloat16, with factors beside the weights."""
    target = tmp_path_factory.mktemp("ours") / "checkpoint"
    with whole_or_nothing(target, None) as (folder, journal):
        write_checkpoint(with_factors(open_source(theirs), LORA), folder, journal, dtype=jnp.dtype(jnp.bfloat16))
        copy_companions(theirs, folder)
    return target


def same_bits(found: Any, wanted: Any) -> None:
    def equal(a: jax.Array, b: np.ndarray) -> None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(equal, found, wanted)


def lies_as_asked(model: Thinker, mesh: jax.sharding.Mesh) -> None:
    state = nnx.state(model)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings(state, mesh)


@pytest.mark.parametrize("shape", [ONE, EIGHT], ids=["one", "eight"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16], ids=["as stored", "bf16", "f16"])
def test_parameters_of_hugging_face_lie_on_the_mesh_bit_for_bit(theirs: Path, shape: tuple[int, int, int], dtype: Any) -> None:
    mesh = mesh_of(shape)
    loaded = omnisapiens_jax.load(theirs, mesh=mesh, dtype=dtype)
    assert loaded.config == tiny.TINY and loaded.heads is None and not loaded.adapters
    same_bits(take_params(loaded.model), read_params(open_source(theirs), dtype=jnp.dtype(dtype or jnp.float32)))
    lies_as_asked(loaded.model, mesh)


@pytest.mark.parametrize("shape", [ONE, EIGHT], ids=["one", "eight"])
def test_a_checkpoint_of_ours_keeps_its_dtype_and_its_factors(ours: Path, shape: tuple[int, int, int]) -> None:
    """Weights are bfloat16 as they are stored; what was trained stays float32."""
    mesh, source = mesh_of(shape), open_source(ours)
    loaded = omnisapiens_jax.load(ours, mesh=mesh)
    same_bits(take_params(loaded.model), read_params(source))
    assert loaded.model.decoder.embed_tokens.dtype == jnp.bfloat16 and source.lora
    factors = nnx.to_pure_dict(nnx.state(loaded.model, LoraParam))
    for row in lora_mappings(source.config, source.lora.config):
        found = factors
        for name in row.ours:
            found = found[name]
        same_bits([row.to_theirs(layer) for layer in np.asarray(found)], [source.lora.factors[name].read() for name in row.their_names])
    lies_as_asked(loaded.model, mesh)


def test_all_devices_share_a_model_unless_told_otherwise(theirs: Path) -> None:
    kernel = omnisapiens_jax.load(theirs).model.decoder.layers.block.self_attn.q_proj.kernel[...]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(kernel.sharding.device_set) == len(jax.devices()) == 8
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_the_widest_dtype_of_the_stored_ones_is_taken(theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path / "mixed")
    file = tmp_path / "mixed" / "model.safetensors"
    stored = load_file(file)
    save_file({name: value.astype(np.float16) if value.ndim > 1 else value for name, value in stored.items()}, file)
    scale = omnisapiens_jax.load(tmp_path / "mixed", mesh=mesh_of(ONE)).model.decoder.norm.scale[...]
    same_bits(scale, stored["model.norm.weight"])


@dataclasses.dataclass
class Watched:
    """A tensor that counts how often each of its rows is read."""

    tensor: Tensor
    reads: Counter[int] = dataclasses.field(default_factory=Counter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        self.reads.update(range(start, self.tensor.shape[0] if stop is None else stop))
        return self.tensor.read(start, stop)


def test_every_row_is_read_once_whatever_the_mesh(theirs: Path) -> None:
    source = with_factors(open_source(theirs), LORA)
    assert source.lora
    watched: dict[str, Any] = {name: Watched(tensor) for name, tensor in (*source.tensors.items(), *source.lora.factors.items())}
    lora = dataclasses.replace(source.lora, factors={name: watched[name] for name in source.lora.factors})
    source = dataclasses.replace(source, tensors={name: watched[name] for name in source.tensors}, lora=lora)
    model = nnx.eval_shape(lambda: Thinker(tiny.TINY, rngs=nnx.Rngs(0), lora=LORA))
    read_params_onto(source, model, mesh_of((1, 2, 4)))
    assert all(tensor.reads == Counter(range(tensor.shape[0])) for tensor in watched.values())


def test_a_host_reads_the_rows_of_its_own_devices_alone(theirs: Path) -> None:
    """Two devices hold the upper and the lower half of the first twelve rows; the other rows are for other hosts."""
    tensors: Any = {name: Watched(tensor) for name, tensor in open_source(theirs).tensors.items()}
    row = next(row for row in mappings(tiny.TINY) if row.theirs == "model.layers.{}.mlp.up_proj.weight")
    shards = loading._read_shards(row, tensors, [((0, 2), (half, half + 16), (0, 12)) for half in (0, 16)], np.float32)
    assert [shard.shape for shard in shards.values()] == [(2, 16, 12)] * 2
    assert all(tensors[name].reads == Counter(range(12)) for name in row.their_names)


@nnx.jit
def logits(model: Thinker, batch: dict[str, Any]) -> jax.Array:
    return model.logits(model(batch).last)


def test_from_a_wav_file_to_logits(theirs: Path, tmp_path: Path) -> None:
    """On all devices as on one: the batch is ready for the model as it is."""
    time = np.arange(24_000) / 16_000
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2000 * time * (1 + time)), 16_000)
    found = []
    for mesh in (mesh_of(ONE), mesh_of((1, 8, 1))):
        loaded = omnisapiens_jax.load(theirs, mesh=mesh, options=ProcessingConfig(audio_seconds=1.0))
        batch = loaded.processor("How does <audio> sound?", audios=[tmp_path / "tone.wav"])
        assert batch["tokens"].shape[0] == 1 and batch["audio_frames"].sum() == 100
        found.append(np.asarray(logits(loaded.model, batch)))
    assert found[0].shape == (*batch["tokens"].shape, tiny.TINY.text.vocab_size) and np.ptp(found[0]) > 1
    np.testing.assert_allclose(found[1], found[0], atol=1e-5 * np.abs(found[0]).max())
    assert loaded.processor.decode(loaded.processor.tokenizer.encode("happy")) == "happy"


def test_the_example_in_the_readme_runs(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "DST").symlink_to(theirs)
    soundfile.write(tmp_path / "clip.wav", np.sin(np.arange(16_000)), 16_000)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    made: dict[str, Any] = {}
    exec(example, made)
    assert isinstance(made["loaded"].model, Thinker) and made["batch"]["audio_frames"].sum() == 100


def test_numbers_that_are_not_finite_are_named(theirs: Path, tmp_path: Path) -> None:
    """Also those that become so in the dtype asked for."""
    folder = tmp_path / "bad"
    shutil.copytree(theirs, folder)
    stored, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    for value, dtype, said in ((np.nan, None, "; a model"), (1e30, jnp.float16, " as float16: they are too large for it")):
        stored[name][3, 2] = value
        save_file(stored, folder / "model.safetensors")
        with pytest.raises(ConversionError, match=rf"bad/model\.safetensors: 1 of [\d,]+ values read of {name} are infinite or NaN{said}"):
            omnisapiens_jax.load(folder, mesh=mesh_of(ONE), dtype=dtype)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def long_work(*_: object) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(loading, "read_params_onto", long_work)


@pytest.mark.usefixtures("no_work")
def test_what_is_wrong_is_told_before_the_long_work(theirs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(theirs, folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(
        ConversionError, match=r"bare is a thinker of Hugging Face, which has no LoRA factors; leave out the 3 that was given"
    ):
        omnisapiens_jax.load(folder, lora_alpha=3.0)
    with pytest.raises(
        FileNotFoundError, match=r"bare has neither tokenizer\.json nor tokenizer\.model; copy that of the model it was made from"
    ):
        omnisapiens_jax.load(folder)
    shutil.copy(theirs / "tokenizer.model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 11}))
    with pytest.raises(ValueError, match=r"the vocabulary's special tokens are TokenIds\(pad=0, .* the model's TokenIds\(pad=11, "):
        omnisapiens_jax.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | {"intermediate_size": 50}}))
    with pytest.raises(
        ConversionError,
        match=r"6 misshapen: model\.layers\.0\.mlp\.down_proj\.weight in model\.safetensors \(32, 48\) instead of \(32, 50\)",
    ):
        omnisapiens_jax.load(folder)
