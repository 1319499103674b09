"""Classification heads and behavioural adapters (BAM) beside a thinker: checked, brought into today's form, written as they are released.

Their names are those of the released files: `heads.0.weight` in `heads.bin`, `video_adapter.mlp.0.weight` in `adapters.bin`. A checkpoint of
ours keeps both in one safetensors file under the same names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnisapiens_jax.convert.tensors import ConversionError, HeldTensor, SafetensorsWriter, Tensor, as_bytes, check_finite, some
from omnisapiens_jax.convert.torch_files import write_torch_file

HEADS, ADAPTERS = "heads.bin", "adapters.bin"
OURS = "parts.safetensors"
MODALITIES = ("video", "audio")  # in the order in which their deltas are added
_HEAD = re.compile(r"heads\.(\d+)\.(weight|bias)")
_ADAPTER = re.compile(rf"({'|'.join(MODALITIES)})_adapter\.(.+)")
_CONFIDENCES = 3  # scalars that the first adapters were given after the descriptor, always zero


def is_part(name: str) -> bool:
    """Whether a canonical name is that of a head or an adapter."""
    return name.startswith(("heads.", *(f"{modality}_adapter." for modality in MODALITIES)))


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """Widths of one adapter."""

    features: int  # of the descriptor
    hidden: int
    normed: bool  # LayerNorm over the descriptor


@dataclasses.dataclass(frozen=True)
class PartShapes:
    """What heads and adapters there are.

    Attributes:
      heads: labels of each head, in the order of the heads.
      adapters: by modality.
    """

    heads: tuple[int, ...] = ()
    adapters: Mapping[str, AdapterShape] = dataclasses.field(default_factory=dict)


def part_shapes(parts: Mapping[str, Tensor], width: int, where: Path) -> PartShapes:
    """Reads off and checks what parts there are.

    Args:
      parts: by released names, in today's form (`modern`).
      width: of the thinker's hidden states.
      where: named in errors.

    Raises:
      ConversionError: lists every part that is unknown, missing or misshapen.
    """
    heads = {int(match[1]) for name in parts if (match := _HEAD.fullmatch(name))}
    shapes, problems = {}, []
    if heads and heads != set(range(len(heads))):
        problems.append(f"the heads are numbered {some(sorted(heads))}, not from 0 on")
    labels = [_axis(parts, f"heads.{number}.weight", 0) for number in sorted(heads)]
    for number, count in zip(sorted(heads), labels, strict=True):
        shapes |= {f"heads.{number}.weight": (count, width), f"heads.{number}.bias": (count,)}
    adapters = {}
    for modality in MODALITIES:
        prefix = f"{modality}_adapter."
        if any(name.startswith(prefix) for name in parts):
            hidden, features = _axis(parts, f"{prefix}mlp.0.weight", 0), _axis(parts, f"{prefix}mlp.0.weight", 1)
            normed = any(name.startswith(f"{prefix}ln_feats.") for name in parts)
            adapters[modality] = AdapterShape(features, hidden, normed)
            wanted = {"mlp.0.weight": (hidden, features), "mlp.0.bias": (hidden,), "mlp.2.weight": (width, hidden), "mlp.2.bias": (width,)}
            wanted |= {"alpha": (1,)} | ({"ln_feats.weight": (features,), "ln_feats.bias": (features,)} if normed else {})
            shapes |= {prefix + name: shape for name, shape in wanted.items()}
    problems += [f"{name} is unknown" for name in sorted(parts.keys() - shapes.keys())]
    problems += [f"{name} is missing" for name in sorted(shapes.keys() - parts.keys())]
    problems += [
        f"{name} has shape {parts[name].shape}, not {shape}" for name, shape in shapes.items() if name in parts and parts[name].shape != shape
    ]
    problems += [f"{name} is {tensor.dtype}" for name, tensor in parts.items() if tensor.dtype.kind not in "fV"]
    if problems:
        raise ConversionError(f"the heads and adapters in {where} are not those of a model of width {width}: {some(problems)}")
    return PartShapes(tuple(labels), adapters)


def _axis(parts: Mapping[str, Tensor], name: str, axis: int) -> int:
    tensor = parts.get(name)
    return tensor.shape[axis] if tensor is not None and len(tensor.shape) == 2 else 0


def modern(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parts without what the first adapters had besides.

    Their MLP was given three confidences after the descriptor, which were zero in every run, behind a LayerNorm of their own where there was
    one: its bias was then a constant input, and goes into the bias of the first layer, `b1 + W1[:, D:] ln_conf.bias`.
    """
    found = dict(parts)
    for modality in MODALITIES:
        prefix = f"{modality}_adapter."
        weight, normed = found.get(f"{prefix}mlp.0.weight"), found.get(f"{prefix}ln_feats.weight")
        extra = {name.removeprefix(prefix): found.pop(name) for name in parts if re.match(rf"{prefix}(ln_conf\.|conf_gain)", name)}
        if weight is None or len(weight.shape) != 2:
            continue
        widths = [tensor.shape[0] for tensor in (normed,) if tensor is not None and tensor.shape]
        widths += [weight.shape[1] - _CONFIDENCES] if extra else []
        if not widths or weight.shape[1] != widths[0] + _CONFIDENCES:
            continue
        matrix, bias = weight.read(), found[f"{prefix}mlp.0.bias"]
        if "ln_conf.bias" in extra:
            shift = matrix[:, widths[0] :].astype(np.float32) @ extra["ln_conf.bias"].read().astype(np.float32)
            folded = (bias.read().astype(np.float32) + shift).astype(bias.dtype)
            found[f"{prefix}mlp.0.bias"] = HeldTensor(bias.name, folded, bias.file)
        found[f"{prefix}mlp.0.weight"] = HeldTensor(weight.name, np.ascontiguousarray(matrix[:, : widths[0]]), weight.file)
    return found


def write_parts(parts: Mapping[str, Tensor], folder: Path) -> list[dict[str, Any]]:
    """Writes them into a checkpoint of ours; returns what its receipt says of them."""
    records = []
    if parts:
        shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in parts.items()}
        with SafetensorsWriter(folder / OURS, shapes) as writer:
            for name in writer.order:
                tensor = parts[name]
                values = tensor.read()
                check_finite(values, tensor)
                writer.write(values)
                record = {"name": name, "stored_name": tensor.name, "file": tensor.file.name, "tree": "parts", "path": name, "layer": None}
                record |= {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": hashlib.sha256(as_bytes(values)).hexdigest()}
                records.append(record)
    return records


def write_released(parts: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Writes `heads.bin` and `adapters.bin`, as far as there is something for them; returns their names."""
    written = []
    for file, mine in ((HEADS, _HEAD), (ADAPTERS, _ADAPTER)):
        if chosen := {name: tensor.read() for name, tensor in parts.items() if mine.fullmatch(name)}:
            write_torch_file(folder / file, chosen)
            written.append(file)
    return written
