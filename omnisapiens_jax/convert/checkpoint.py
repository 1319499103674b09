"""Our checkpoint of a thinker: a directory with `params/` (Orbax), `config.json` (Hugging Face's spelling) and `manifest.json`."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from omnisapiens_jax.convert.huggingface import ConversionError, Params, check_params
from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.layers import LoraParam
from omnisapiens_jax.models.thinker import Thinker

FORMAT = "omnisapiens-jax thinker"
VERSION = 1


@contextmanager
def whole_or_nothing(target: str | Path) -> Iterator[Path]:
    """A new directory to write into that becomes `target` when the block ends well and vanishes when it does not.

    Raises FileExistsError when `target` is there already.
    """
    target = Path(target).resolve()
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another directory")
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_params(target: str | Path, params: Params, config: ThinkerConfig, *, origin: Mapping[str, Any] | None = None) -> None:
    """Makes a checkpoint, whole or not at all; `origin` is kept in its manifest to say where the parameters came from.

    Raises FileExistsError when `target` is there already, ConversionError when the parameters are not those of `config`.
    """
    with whole_or_nothing(target) as folder:
        write_params(folder, params, config, origin=origin)


def write_params(folder: Path, params: Params, config: ThinkerConfig, *, origin: Mapping[str, Any] | None = None) -> None:
    """Writes a checkpoint's files into an existing directory; as `save_params` otherwise."""
    check_params(params, config)
    leaves = jax.tree.leaves(params)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        "dtypes": sorted({str(leaf.dtype) for leaf in leaves}),
        "origin": dict(origin or {}),
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder / "params", args=ocp.args.PyTreeSave(params))
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def load_config(source: str | Path) -> ThinkerConfig:
    """The model's shapes, from a checkpoint of ours."""
    source = Path(source)
    manifest = source / "manifest.json"
    if not manifest.is_file():
        raise ConversionError(
            f"{source} is no checkpoint of ours (no manifest.json). A Hugging Face directory is first imported: "
            f"python tools/convert_weights.py import {source} NEW_DIRECTORY"
        )
    described = json.loads(manifest.read_text())
    if (described.get("format"), described.get("version")) != (FORMAT, VERSION):
        raise ConversionError(
            f"{manifest}: format {described.get('format')!r} version {described.get('version')!r}, expected {FORMAT!r} {VERSION}"
        )
    return ThinkerConfig.from_hf(source)


def load_params(source: str | Path, *, target: Any = None) -> Params:
    """Reads the parameters of a checkpoint.

    Args:
      source: the checkpoint's directory.
      target: a nested dict of `jax.ShapeDtypeStruct` that says in which dtype and sharding each array is wanted (every shard is then read
        only where it lives); numpy arrays as stored when None.
    """
    config = load_config(source)
    folder = Path(source).resolve() / "params"
    if target is None:
        flat = {row.ours: ocp.RestoreArgs(restore_type=np.ndarray) for row in mappings(config)}
        item = {row.ours: np.zeros((), np.float32) for row in mappings(config)}
        arguments = ocp.args.PyTreeRestore(traverse_util.unflatten_dict(item), restore_args=traverse_util.unflatten_dict(flat))
    else:
        arguments = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        params = reader.restore(folder, args=arguments)
    check_params(params, config)
    return params


def put_params(thinker: Thinker, params: Params) -> None:
    """Fills the parameters of `thinker`, cast to its own `param_dtype`. LoRA factors, which no checkpoint of a thinker has, are left alone.

    Raises ConversionError that names what does not fit.
    """
    check_params(params, thinker.config)
    variables = nnx.to_flat_state(nnx.state(thinker, nnx.All(nnx.Param, nnx.Not(LoraParam))))
    flat = traverse_util.flatten_dict(params)
    for path, variable in variables:
        variable.set_value(jnp.asarray(flat[tuple(map(str, path))], variable.get_value().dtype))


def take_params(thinker: Thinker) -> Params:
    """The parameters of `thinker` without LoRA factors, as `put_params` takes and `save_params` saves them."""
    return nnx.to_pure_dict(nnx.state(thinker, nnx.All(nnx.Param, nnx.Not(LoraParam))))
