"""What has been learnt on a frozen thinker, as files: adapters and heads as they are released, behaviour attention in a form of ours.

Behaviour attention lies in `behaviour.safetensors`: a tensor for every parameter by its path in `models.behaviour.BehaviourAttention`
(`layers.0.q_proj.kernel [in, out]`, `encoders.landmarks.mean`), float32, and the shapes as JSON in the header's metadata (`config`). What
was trained of the thinker itself lies in `tail.safetensors` under the names of the published checkpoints, whose tensors it replaces.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.convert.parts import write_released
from omnisapiens_jax.models.bam import ResidualAdapters
from omnisapiens_jax.models.behaviour import AttentionConfig, BehaviourAttention
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.decoder import DecoderLayer
from omnisapiens_jax.models.heads import DomainHeads
from omnisapiens_jax.models.layers import Linear
from omnisapiens_jax.processing.tensors import ConversionError, HeldTensor, SafetensorsWriter, read_finite, read_safetensors, some

ATTENTION, TAIL = "behaviour.safetensors", "tail.safetensors"


def released_parts(heads: DomainHeads | None, adapters: ResidualAdapters | None, where: Path) -> dict[str, HeldTensor]:
    """Heads and adapters by their released names, in float32; the reverse of `loading.fill_parts`. `where` is named in errors."""
    values: dict[str, Any] = {}
    if heads is not None:
        assert heads.affine.bias is not None
        kernel, bias, first = np.asarray(heads.affine.kernel[...]), np.asarray(heads.affine.bias[...]), 0
        for number, count in enumerate(heads.labels):
            values |= {f"heads.{number}.weight": kernel[:, first : first + count].T, f"heads.{number}.bias": bias[first : first + count]}
            first += count
    for modality, adapter in (adapters.adapters() if adapters else {}).items():
        prefix = f"{modality}_adapter."
        for layer, number in ((adapter.fc1, 0), (adapter.fc2, 2)):
            assert layer.bias is not None
            values |= {f"{prefix}mlp.{number}.weight": layer.kernel[...].T, f"{prefix}mlp.{number}.bias": layer.bias[...]}
        values[f"{prefix}alpha"] = adapter.alpha[...]
        if adapter.norm is not None:
            values |= {f"{prefix}ln_feats.weight": adapter.norm.scale[...], f"{prefix}ln_feats.bias": adapter.norm.bias[...]}
    return {name: HeldTensor(name, np.ascontiguousarray(np.asarray(value, np.float32)), where) for name, value in values.items()}


def write_behaviour(folder: Path, behaviour: ResidualAdapters | BehaviourAttention, heads: DomainHeads | None) -> None:
    """Writes `adapters.bin` or `behaviour.safetensors`, and `heads.bin` where there are heads.

    Raises:
      ConversionError: a value is not finite.
    """
    adapters = behaviour if isinstance(behaviour, ResidualAdapters) else None
    write_released(released_parts(heads, adapters, folder), folder)
    if isinstance(behaviour, BehaviourAttention):
        flat = {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(behaviour))}
        _write(folder / ATTENTION, flat, {"config": json.dumps(dataclasses.asdict(behaviour.config))})


def write_tail(folder: Path, thinker: ThinkerConfig, block: DecoderLayer, lm_head: Linear) -> None:
    """Writes the last layer of a decoder and its LM head as `tail.safetensors`.

    Raises:
      ConversionError: a value is not finite.
    """
    layers = ("decoder", "layers", "block")
    values: dict[tuple[str, ...], Any] = {
        (*layers, *map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(block))
    }
    values[("lm_head", "kernel")] = lm_head.kernel[...]
    rows = {row.ours: row for row in mappings(thinker) if row.ours in values}
    assert rows.keys() == values.keys()
    _write(folder / TAIL, {row.their_names[-1]: row.to_theirs(np.asarray(values[path])) for path, row in rows.items()}, {})


def _write(path: Path, values: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    tensors = {name: HeldTensor(name, np.ascontiguousarray(np.asarray(value, np.float32)), path) for name, value in values.items()}
    draft = path.with_name(f".{path.name}.part")
    with SafetensorsWriter(draft, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata) as writer:
        for name in writer.order:
            writer.write(read_finite(tensors[name], 0, None, np.dtype(np.float32)))
    os.replace(draft, path)


def read_behaviour(folder: Path, thinker: ThinkerConfig) -> BehaviourAttention:
    """The behaviour attention that `write_behaviour` wrote, for a thinker of these shapes.

    Raises:
      ConversionError: the file is missing or broken, or belongs to another thinker.
    """
    path = folder / ATTENTION
    tensors = read_safetensors(path)
    try:
        with safe_open(path, framework="np") as file:
            described = json.loads((file.metadata() or {})["config"])
        config = AttentionConfig(**{**described, "depths": tuple(described["depths"]), "streams": tuple(map(tuple, described["streams"]))})
        made = nnx.eval_shape(lambda: BehaviourAttention(config, thinker, rngs=nnx.Rngs(0)))
    except (SafetensorError, KeyError, TypeError, ValueError) as reason:
        raise ConversionError(f"{path} does not describe behaviour attention for this thinker ({reason})") from reason
    places = {_name(path): variable for path, variable in nnx.to_flat_state(nnx.state(made))}
    wrong = [f"{name} is unknown" for name in sorted(tensors.keys() - places.keys())]
    wrong += [f"{name} is missing" for name in sorted(places.keys() - tensors.keys())]
    wrong += [
        f"{name} has shape {tensors[name].shape}, not {variable.get_value().shape}"
        for name, variable in places.items()
        if name in tensors and tensors[name].shape != variable.get_value().shape
    ]
    if wrong:
        raise ConversionError(f"{path} is not what it says, or of another thinker: {some(wrong)}")
    for name, variable in places.items():
        variable.set_value(jnp.asarray(read_finite(tensors[name], 0, None, np.dtype(np.float32))))
    graph = nnx.graphdef(made)
    return nnx.merge(graph, nnx.from_flat_state([(path, variable) for path, variable in nnx.to_flat_state(nnx.state(made))]))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
