"""The one table between Hugging Face's tensor names and our parameter paths; both directions of every conversion read it.

A row says where a tensor lies on their side (`{}` stands for the layer), where on ours, and how its axes change. Our layers are stacked:
the tensors of all layers of one row make one array with a leading `layers` axis. Shapes are not written down here; they follow from the
model itself (`Mapping.their_shape`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import flax.nnx as nnx
import jax
import numpy as np

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.layers import LoraConfig, LoraParam
from omnisapiens_jax.models.thinker import Thinker

Path = tuple[str, ...]

# same: as it is. linear: [out, in] <-> [in, out]. conv1d: [out, in, 3] <-> [3 * in, out]. conv3d: [out, 3, 2, 14, 14] <-> [1176, out].
Layout = Literal["same", "linear", "conv1d", "conv3d"]

_AUDIO_LAYER = "audio_tower.layers.{}."
_VISION_LAYER = "visual.blocks.{}."
_TEXT_LAYER = "model.layers.{}."


def _linear(theirs: str, ours: str, *, bias: bool) -> Iterator[tuple[str, str, Layout]]:
    yield f"{theirs}.weight", f"{ours}.kernel", "linear"
    if bias:
        yield f"{theirs}.bias", f"{ours}.bias", "same"


def _norm(theirs: str, ours: str, *, bias: bool = False) -> Iterator[tuple[str, str, Layout]]:
    yield f"{theirs}.weight", f"{ours}.scale", "same"
    if bias:
        yield f"{theirs}.bias", f"{ours}.bias", "same"


def _rows() -> Iterator[tuple[str, str, Layout]]:
    for conv in ("conv1", "conv2"):
        yield f"audio_tower.{conv}.weight", f"audio.{conv}.kernel", "conv1d"
        yield f"audio_tower.{conv}.bias", f"audio.{conv}.bias", "same"
    yield "audio_tower.audio_bos_eos_token.weight", "audio.audio_bos_eos_token", "same"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{_AUDIO_LAYER}self_attn.{name}", f"audio.layers.block.self_attn.{name}", bias=name != "k_proj")
    for name in ("fc1", "fc2"):
        yield from _linear(f"{_AUDIO_LAYER}{name}", f"audio.layers.block.{name}", bias=True)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        yield from _norm(f"{_AUDIO_LAYER}{name}", f"audio.layers.block.{name}", bias=True)
    yield from _norm("audio_tower.ln_post", "audio.ln_post", bias=True)
    yield from _linear("audio_tower.proj", "audio.proj", bias=True)

    yield "visual.patch_embed.proj.weight", "vision.patch_embed.kernel", "conv3d"
    for name in ("norm1", "norm2"):
        yield from _norm(f"{_VISION_LAYER}{name}", f"vision.blocks.block.{name}")
    for name in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        yield from _linear(f"{_VISION_LAYER}{name}", f"vision.blocks.block.{name}", bias=True)
    yield from _norm("visual.merger.ln_q", "vision.merger.ln_q")
    yield from _linear("visual.merger.mlp.0", "vision.merger.fc1", bias=True)
    yield from _linear("visual.merger.mlp.2", "vision.merger.fc2", bias=True)

    yield "model.embed_tokens.weight", "decoder.embed_tokens", "same"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from _linear(f"{_TEXT_LAYER}self_attn.{name}", f"decoder.layers.block.self_attn.{name}", bias=name != "o_proj")
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield from _linear(f"{_TEXT_LAYER}mlp.{name}", f"decoder.layers.block.mlp.{name}", bias=False)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield from _norm(f"{_TEXT_LAYER}{name}", f"decoder.layers.block.{name}")
    yield from _norm("model.norm", "decoder.norm")
    yield from _linear("lm_head", "lm_head", bias=False)


TABLE: tuple[tuple[str, Path, Layout], ...] = tuple((theirs, tuple(ours.split(".")), layout) for theirs, ours, layout in _rows())


@dataclasses.dataclass(frozen=True)
class Mapping:
    """One row of the table for one size of model."""

    theirs: str  # their name; `{}` stands for the layer when `layers` is not None
    ours: Path
    layout: Layout
    shape: tuple[int, ...]  # of our array, with the leading layers axis when there is one
    their_shape: tuple[int, ...]  # of each of their tensors
    layers: int | None

    @property
    def their_names(self) -> tuple[str, ...]:
        """Every tensor of theirs that this row stands for, in layer order."""
        return (self.theirs,) if self.layers is None else tuple(self.theirs.format(layer) for layer in range(self.layers))

    def place(self, layer: int, start: int, stop: int) -> tuple[int | slice, ...]:
        """Where in our array the rows `start` to `stop` (of the first axis) of their tensor of that layer lie."""
        rows = slice(start, stop)
        within = (rows,) if self.layout == "same" else (slice(None), rows)
        return within if self.layers is None else (layer, *within)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One of their tensors `their_shape`, or some rows of it, in our axes; a view where possible."""
        match self.layout:
            case "same":
                return tensor
            case "linear":
                return tensor.T
            case "conv1d":
                return tensor.transpose(2, 1, 0).reshape(-1, tensor.shape[0])
            case "conv3d":
                return tensor.reshape(tensor.shape[0], -1).T

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """One layer of our array, or what lies at a `place` in it, in their axes; inverse of `to_ours`."""
        match self.layout:
            case "same":
                return array
            case "linear":
                return array.T
            case "conv1d":
                return array.reshape(3, -1, array.shape[-1]).transpose(2, 1, 0)
            case "conv3d":
                return array.T.reshape(-1, *self.their_shape[1:])


@functools.cache
def mappings(config: ThinkerConfig) -> tuple[Mapping, ...]:
    """The table for a model of `config`, checked against the model: every parameter has exactly one row."""
    shapes = abstract_params(config)
    found = []
    for theirs, ours, layout in TABLE:
        if ours == ("lm_head", "kernel") and config.tie_head:
            continue
        shape = shapes.pop(ours).shape
        layers = shape[0] if "{}" in theirs else None
        found.append(Mapping(theirs, ours, layout, shape, _their_shape(layout, shape if layers is None else shape[1:], config), layers))
    if shapes:
        raise AssertionError(f"parameters without a row in the name table: {sorted('.'.join(path) for path in shapes)}")
    return tuple(found)


def lora_mappings(config: ThinkerConfig, lora: LoraConfig) -> tuple[Mapping, ...]:
    """The rows of the LoRA factors on the projections of `lora`: PEFT's `lora_A.weight` [r, in] and `lora_B.weight` [out, r]."""
    found = []
    for row in mappings(config):
        if row.layout == "linear" and row.ours[-2] in lora.targets.get(row.ours[0], ()):
            module, path = row.theirs.removesuffix(".weight"), row.ours[:-1]
            (out, into), stack = row.their_shape, row.shape[:-2]
            factors = (("lora_A", "lora_a", (lora.rank, into)), ("lora_B", "lora_b", (out, lora.rank)))
            for theirs, ours, shape in factors:
                found.append(Mapping(f"{module}.{theirs}.weight", (*path, ours), "linear", (*stack, *shape[::-1]), shape, row.layers))
    return tuple(found)


def abstract_params(config: ThinkerConfig) -> dict[Path, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every parameter (but LoRA factors) of a model of `config`, without making it."""
    model = nnx.eval_shape(lambda: Thinker(config, rngs=nnx.Rngs(0)))
    return {
        tuple(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(LoraParam))))
    }


def _their_shape(layout: Layout, ours: tuple[int, ...], config: ThinkerConfig) -> tuple[int, ...]:
    match layout:
        case "same":
            return ours
        case "linear":
            return ours[::-1]
        case "conv1d":
            return (ours[1], ours[0] // 3, 3)
        case "conv3d":
            vision = config.vision
            return (ours[1], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
