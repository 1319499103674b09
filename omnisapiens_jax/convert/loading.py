"""Any checkpoint of the family, ready to use: parameters read onto a mesh shard by shard, with the processor and the shapes beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, Sharding

from omnisapiens_jax.convert.checkpoint import put_params
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.names import Mapping as Row
from omnisapiens_jax.convert.names import lora_mappings, mappings
from omnisapiens_jax.convert.source import Params, Source
from omnisapiens_jax.models.bam import ResidualAdapter
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.heads import DomainHeads
from omnisapiens_jax.models.layers import LoraParam
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.parallel.mesh import make_mesh, shardings
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.processor import Processor
from omnisapiens_jax.processing.tensors import Tensor, read_finite
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
    lora_alpha: float | None = None,
    options: ProcessingConfig | None = None,
) -> Loaded:
    """Opens a checkpoint of any kind (see `kinds.open_source`) and reads it onto the devices of a mesh.

    A host reads what its own devices hold, each row once; of the whole model it never holds more than one array.

    Args:
      path: directory of the checkpoint, or its name on the hub, `OWNER/NAME`.
      mesh: of `parallel.mesh.make_mesh`; all devices, the parameters divided over them (`fsdp`), when None.
      dtype: to store and compute in; that of the checkpoint (the widest of them) when None.
      base: likewise named, what the checkpoint itself lacks.
      lora_alpha: of the LoRA factors in a trainer's state dict, which does not say it; twice the rank when None.
      options: how media are decoded and prompts built.

    Raises:
      ConversionError: there is no such checkpoint, it is broken, or has values that are not finite in `dtype`.
      FileNotFoundError: it has no tokenizer beside it.
      ValueError: its tokenizer is not the model's.
    """
    source = open_source(path, base=base, lora_alpha=lora_alpha)
    source.check()
    config = source.config
    processor = Processor(open_tokenizer(source.companions), config, options or ProcessingConfig())  # before the long work
    mesh = make_mesh(data=1, fsdp=len(jax.devices())) if mesh is None else mesh
    stored = jnp.dtype(jnp.result_type(*{tensor.dtype for tensor in source.tensors.values()}) if dtype is None else dtype)
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
    return Loaded(model, processor, config, heads, adapters)


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
      mesh: to lie on.
    """
    wanted, places = _by_path(which), _by_path(shardings(which, mesh))
    found = {row.ours: _read_array(row, tensors, places[row.ours], wanted[row.ours].dtype) for row in rows}
    return traverse_util.unflatten_dict(found)


def _by_path(state: nnx.State) -> dict[tuple[str, ...], Any]:
    return {tuple(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


Spans = tuple[tuple[int, int], ...]  # first and one past the last along each axis


def _read_array(row: Row, tensors: Mapping[str, Tensor], sharding: Sharding, dtype: Any) -> jax.Array:
    def spans(index: tuple[slice, ...] | None) -> Spans:
        return tuple(part.indices(size)[:2] for part, size in zip(index or (), row.shape, strict=True))

    mine = {spans(index) for index in sharding.addressable_devices_indices_map(row.shape).values()}
    shards = _read_shards(row, tensors, mine, dtype)
    return jax.make_array_from_callback(row.shape, sharding, lambda index: shards[spans(index)])


def _read_shards(row: Row, tensors: Mapping[str, Tensor], wanted: Iterable[Spans], dtype: Any) -> dict[Spans, np.ndarray]:
    """Parts of the array of a row of the table; of each stored tensor only the rows that they lie in are read, and those once."""
    shards = {spans: np.empty([stop - start for start, stop in spans], dtype) for spans in wanted}
    axis = 0 if row.layout == "same" else -1  # of ours: the rows of theirs
    for layer, name in enumerate(row.their_names):
        read: dict[tuple[int, int], np.ndarray] = {}
        for spans, shard in shards.items():
            (first, last), within = ((0, 1), spans) if row.layers is None else (spans[0], spans[1:])
            if not first <= layer < last:
                continue
            if within[axis] not in read:
                read[within[axis]] = row.to_ours(read_finite(tensors[name], *within[axis], np.dtype(dtype)))
            cut = [slice(*span) for span in within]
            cut[axis] = slice(None)
            shard[... if row.layers is None else layer - first] = read[within[axis]][tuple(cut)]
    return shards


def fill_parts(heads: DomainHeads | None, adapters: Mapping[str, ResidualAdapter], parts: Mapping[str, Tensor]) -> None:
    """Reads heads and adapters in float32."""

    def array(name: str) -> jax.Array:
        return jnp.asarray(read_finite(parts[name], 0, None, np.dtype(np.float32)))

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
