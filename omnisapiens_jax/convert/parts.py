"""Classification heads and behavioural adapters (BAM) beside a thinker: checked, brought into today's form, written as they are released.

Their names are those of the released files: `heads.0.weight` in `heads.bin`, `video_adapter.mlp.0.weight` in `adapters.bin`. A checkpoint
of ours keeps both in one safetensors file under the same names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omnisapiens_jax.processing.tensors import ConversionError, HeldTensor, SafetensorsWriter, Tensor, as_bytes, origin, read_finite, some
from omnisapiens_jax.processing.torch_files import write_torch_file

HEADS, ADAPTERS = "heads.bin", "adapters.bin"
OURS = "parts.safetensors"
MODALITIES = ("video", "audio")  # in the order in which their deltas are added
_HEAD = re.compile(r"heads\.(\d+)\.(weight|bias)")
_ADAPTER = re.compile(rf"({'|'.join(MODALITIES)})_adapter\.(.+)")
_CONFIDENCES = 3  # scalars that the first adapters were given after the descriptor
_OF_CONFIDENCES = ("ln_conf.weight", "ln_conf.bias")


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
    wanted: dict[str, tuple[int | str, ...]] = {}  # words where the parts themselves do not tell
    numbers = sorted({int(match[1]) for name in parts if (match := _HEAD.fullmatch(name))})
    labels = [_sizes(parts, f"heads.{number}.weight", ("labels", width))[0] for number in numbers]
    for number, count in zip(numbers, labels, strict=True):
        wanted |= {f"heads.{number}.weight": (count, width), f"heads.{number}.bias": (count,)}
    adapters = {}
    for modality in MODALITIES:
        prefix = f"{modality}_adapter."
        if any(name.startswith(prefix) for name in parts):
            hidden, features = _sizes(parts, f"{prefix}mlp.0.weight", ("hidden", "features"))
            normed = any(name.startswith(f"{prefix}ln_feats.") for name in parts)
            adapters[modality] = AdapterShape(features, hidden, normed)
            shapes = {"mlp.0.weight": (hidden, features), "mlp.0.bias": (hidden,), "mlp.2.weight": (width, hidden), "mlp.2.bias": (width,)}
            shapes |= {"alpha": (1,)} | ({"ln_feats.weight": (features,), "ln_feats.bias": (features,)} if normed else {})
            wanted |= {prefix + name: shape for name, shape in shapes.items()}
    problems = [] if numbers == list(range(len(numbers))) else [f"the heads are numbered {some(numbers)}, not from 0 on"]
    problems += [f"{name} is unknown" for name in sorted(parts.keys() - wanted.keys())]
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - parts.keys())]
    problems += [
        f"{name} has shape ({', '.join(map(str, parts[name].shape))}), not ({', '.join(map(str, shape))})"
        for name, shape in wanted.items()
        if name in parts and parts[name].shape != shape
    ]
    problems += [f"{name} is empty: {tensor.shape}" for name, tensor in parts.items() if 0 in tensor.shape]
    problems += [f"{name} is {tensor.dtype}, no floating number" for name, tensor in parts.items() if tensor.dtype.kind not in "fV"]
    if problems:
        raise ConversionError(f"the heads and adapters in {where} are not those of a model of width {width}: {some(problems)}")
    return PartShapes(tuple(labels), adapters)


def _sizes(parts: Mapping[str, Tensor], name: str, otherwise: tuple[Any, Any]) -> tuple[Any, Any]:
    """The axes of a matrix, or words for them where it is none."""
    shape = parts[name].shape if name in parts else ()
    return (shape[0], shape[1]) if len(shape) == 2 else otherwise


def modern(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parts without what early adapters had besides.

    Their MLP takes three confidences after the descriptor, zero in every run. Behind a LayerNorm these are its bias, a constant, which goes
    into the bias of the first layer: `b1 + W1[:, D:] ln_conf.bias`, in float32. An `alpha` of shape [] becomes one of shape [1].

    An adapter without any LayerNorm does not show how wide its descriptor was, and stays as it is: with zeros after the descriptor it gives
    what it gave. A `conf_gain`, which some may have, stays too and is refused as unknown: where it entered is not published.
    """
    found = dict(parts)
    for modality in MODALITIES:
        prefix = f"{modality}_adapter."
        adapter = {name.removeprefix(prefix): tensor for name, tensor in parts.items() if name.startswith(prefix)}
        extra = {name: adapter[name] for name in _OF_CONFIDENCES if name in adapter}
        if "alpha" in adapter and adapter["alpha"].shape == ():
            found[f"{prefix}alpha"] = _held(adapter["alpha"], adapter["alpha"].read().reshape(1))
        if _has_confidences(adapter, extra):
            for name in extra:
                del found[prefix + name]
            first, bias = adapter["mlp.0.weight"], adapter["mlp.0.bias"]
            weight = first.read()
            found[f"{prefix}mlp.0.weight"] = _held(first, weight[:, :-_CONFIDENCES])
            if "ln_conf.bias" in extra:
                shift = weight[:, -_CONFIDENCES:].astype(np.float32) @ extra["ln_conf.bias"].read().astype(np.float32)
                found[f"{prefix}mlp.0.bias"] = _held(bias, bias.read().astype(np.float32) + shift)
    return found


def _has_confidences(adapter: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> bool:
    """Whether an adapter is one of the first, and whole."""
    weight, bias = (adapter[name].shape if name in adapter else () for name in ("mlp.0.weight", "mlp.0.bias"))
    if len(weight) != 2 or bias != weight[:1] or any(tensor.shape != (_CONFIDENCES,) for tensor in extra.values()):
        return False
    if "ln_feats.weight" in adapter:
        return adapter["ln_feats.weight"].shape == (weight[1] - _CONFIDENCES,)
    return bool(extra) and weight[1] > _CONFIDENCES


def _held(tensor: Tensor, values: np.ndarray) -> HeldTensor:
    return HeldTensor(tensor.name, np.ascontiguousarray(values), tensor.file)


def write_parts(parts: Mapping[str, Tensor], folder: Path) -> list[dict[str, Any]]:
    """Writes them into a checkpoint of ours; returns what its receipt says of them."""
    records = []
    if parts:
        shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in parts.items()}
        with SafetensorsWriter(folder / OURS, shapes) as writer:
            for name in writer.order:
                tensor = parts[name]
                values = read_finite(tensor, 0, None, tensor.dtype)
                writer.write(values)
                record = {"name": name, "file": tensor.file.name, **origin(tensor), "tree": "parts", "path": name, "layer": None}
                record |= {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": hashlib.sha256(as_bytes(values)).hexdigest()}
                records.append(record)
    return records


def write_released(parts: Mapping[str, Tensor], folder: Path) -> list[dict[str, Any]]:
    """Writes `heads.bin` and `adapters.bin`, as far as there is something for them; returns what a receipt says of their tensors."""
    records = []
    for file, mine in ((HEADS, _HEAD), (ADAPTERS, _ADAPTER)):
        values = {name: read_finite(tensor, 0, None, tensor.dtype) for name, tensor in parts.items() if mine.fullmatch(name)}
        if values:
            write_torch_file(folder / file, values)
        for name, value in values.items():
            record = {"name": name, "file": file, "source": str(parts[name].file), **origin(parts[name])}
            records.append(
                record | {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": hashlib.sha256(as_bytes(value)).hexdigest()}
            )
    return records
