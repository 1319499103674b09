"""Any checkpoint of the family, ready to use: parameters read onto a mesh shard by shard, with the processor and the shapes beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, Sharding

from omnisapiens_jax.convert.checkpoint import put_params
from omnisapiens_jax.convert.hub import resolve
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.names import Mapping as Row
from omnisapiens_jax.convert.names import lora_mappings, mappings
from omnisapiens_jax.convert.source import Params, Source
from omnisapiens_jax.convert.tensors import Tensor
from omnisapiens_jax.models.bam import ResidualAdapter
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.heads import DomainHeads
from omnisapiens_jax.models.layers import LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.parallel.mesh import make_mesh, shardings
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.processor import Processor
from omnisapiens_jax.processing.tokenizers import open_tokenizer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
      model: the thinker, its LoRA factors kept beside the weights where the checkpoint keeps them.
      processor: makes batches for it.
      config: its shapes.
      heads: one for each domain of the label scheme, if the checkpoint has some.
      adapters: BAM adapters by modality, `video` and `audio`, as far as there are some.
    """

    model: Thinker
    processor: Processor
    config: ThinkerConfig
    heads: DomainHeads | None
    adapters: Mapping[str, ResidualAdapter]


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    base: str | Path | None = None,
    options: ProcessingConfig | None = None,
) -> Loaded:
    """Opens a checkpoint of any kind (`kinds.open_source`), or the hub's `OWNER/NAME`, and reads it onto the devices of a mesh.

    Every device reads its own shards, a layer at a time; the host holds little more than one of them.

    Args:
      path: directory of the checkpoint, or its name on the hub.
      mesh: of `parallel.mesh.make_mesh`; all devices, the parameters divided over them (`fsdp`), when None.
      dtype: to store and compute in; that of the checkpoint when None.
      base: a directory with what the checkpoint itself lacks.
      options: how media are decoded and prompts built.

    Raises:
      ConversionError: there is no such checkpoint, or it is broken.
      FileNotFoundError: it has no tokenizer beside it.
    """
    source = open_source(resolve(path), base=None if base is None else resolve(base))
    source.check()
    tokenizer = open_tokenizer(source.companions)  # before the long work
    mesh = make_mesh(data=1, fsdp=len(jax.devices())) if mesh is None else mesh
    config = source.config
    stored = jnp.dtype(source.tensors[mappings(config)[0].their_names[0]].dtype if dtype is None else dtype)
    lora = None if source.lora is None else source.lora.config
    model = nnx.eval_shape(lambda: Thinker(config, rngs=nnx.Rngs(0), lora=lora, dtype=stored, param_dtype=stored))
    put_params(model, *read_params_onto(source, model, mesh))
    shapes, width = source.part_shapes, config.text.hidden_size
    heads = DomainHeads(width, shapes.heads, rngs=nnx.Rngs(0)) if shapes.heads else None
    adapters = {
        modality: ResidualAdapter(shape.features, shape.hidden, width, normed=shape.normed, rngs=nnx.Rngs(0))
        for modality, shape in shapes.adapters.items()
    }
    fill_parts(heads, adapters, source.parts)
    return Loaded(model, Processor(tokenizer, config, options or ProcessingConfig()), config, heads, adapters)


def read_params_onto(source: Source, thinker: Thinker, mesh: Mesh) -> tuple[Params, Params | None]:
    """Parameters and, where a checked source has some, LoRA factors, in the dtypes of an abstract thinker; see `put_params`."""
    params = read_onto(nnx.state(thinker, nnx.All(nnx.Param, nnx.Not(LoraParam))), mappings(source.config), source.tensors, mesh)
    if source.lora is None:
        return params, None
    rows = lora_mappings(source.config, source.lora.config)
    return params, read_onto(nnx.state(thinker, LoraParam), rows, source.lora.factors, mesh)


def read_onto(which: nnx.State, rows: Sequence[Row], tensors: Mapping[str, Tensor], mesh: Mesh) -> Params:
    """The arrays of some rows of the name table, as a nested dict.

    Args:
      which: abstract state with a leaf for every row: its dtype and place on the mesh are those of the array.
      rows: of the table.
      tensors: a checked source's, by the rows' names.
      mesh: whose devices read their own shards, a layer at a time.
    """
    wanted = _by_path(which)
    places = _by_path(shardings(which, mesh))
    found = {row.ours: _read_array(row, tensors, places[row.ours].get_value(), wanted[row.ours].get_value().dtype) for row in rows}
    return traverse_util.unflatten_dict(found)


def _by_path(state: nnx.State) -> dict[tuple[str, ...], Any]:
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _read_array(row: Row, tensors: Mapping[str, Tensor], sharding: Sharding, dtype: Any) -> jax.Array:
    read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}  # copies of a shard are read once

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        spans = tuple(part.indices(size) for part, size in zip(index, row.shape, strict=True))
        if spans not in read:
            read[spans] = _read_shard(row, tensors, spans, dtype)
        return read[spans]

    return jax.make_array_from_callback(row.shape, sharding, shard)


def _read_shard(row: Row, tensors: Mapping[str, Tensor], spans: tuple[tuple[int, int, int], ...], dtype: Any) -> np.ndarray:
    (first, last, _), within = spans[0] if row.layers is not None else (0, 1, 1), spans if row.layers is None else spans[1:]
    rows = within[0] if row.layout == "same" else within[-1]  # what is their first axis
    others = tuple(slice(start, stop) for start, stop, _ in (within[1:] if row.layout == "same" else within[:-1]))
    cut = (..., *others) if row.layout == "same" else (*others, ...)
    shape = tuple(stop - start for start, stop, _ in within)
    shard = np.empty((last - first, *shape), dtype)
    for place, layer in enumerate(range(first, last)):
        values = tensors[row.their_names[layer]].read(rows[0], rows[1])
        shard[place] = row.to_ours(values)[cut]
    return shard if row.layers is not None else shard[0]


def fill_parts(heads: DomainHeads | None, adapters: Mapping[str, ResidualAdapter], parts: Mapping[str, Tensor]) -> None:
    """Reads heads and adapters in float32."""

    def array(name: str) -> jax.Array:
        return jnp.asarray(parts[name].read().astype(np.float32))

    if heads is not None:
        numbers = range(len(heads.labels))
        heads.affine.kernel.set_value(jnp.concatenate([array(f"heads.{number}.weight") for number in numbers]).T)
        assert heads.affine.bias is not None
        heads.affine.bias.set_value(jnp.concatenate([array(f"heads.{number}.bias") for number in numbers]))
    for modality, adapter in adapters.items():
        prefix = f"{modality}_adapter."
        for layer, number in ((adapter.fc1, 0), (adapter.fc2, 2)):
            layer.kernel.set_value(array(f"{prefix}mlp.{number}.weight").T)
            assert layer.bias is not None
            layer.bias.set_value(array(f"{prefix}mlp.{number}.bias"))
        adapter.alpha.set_value(array(f"{prefix}alpha"))
        if adapter.norm is not None:
            adapter.norm.scale.set_value(array(f"{prefix}ln_feats.weight"))
            adapter.norm.bias.set_value(array(f"{prefix}ln_feats.bias"))
