"""What a run of ours has learnt, as a source: the newest (supervised: the best) state of a stage, on the weights that it began with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from omnisapiens_jax.atlas.labels import SCHEMES
from omnisapiens_jax.convert.checkpoint import stored_tensors
from omnisapiens_jax.convert.names import Mapping, lora_mappings, mappings
from omnisapiens_jax.convert.source import Lora, Source
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.layers import LoraConfig
from omnisapiens_jax.processing.tensors import ConversionError, HeldTensor, Tensor
from omnisapiens_jax.resources import resource

CONFIG = "config.json"  # of the run, beside the folders of its stages
_KEPT = ("best", "state")  # where a stage keeps checkpoints; a supervised stage keeps its best one apart
_UNUSED = "audio_tower.audio_bos_eos_token.weight"  # no forward reads it, so no run trains it


def is_stage(path: Path) -> bool:
    """Whether a directory is that of a stage of a run, such as `runs/rl/rl`."""
    return (path.parent / CONFIG).is_file() and any((path / kept).is_dir() for kept in _KEPT)


def stages(path: Path) -> list[Path]:
    """The stages of a run, if `path` is that of one."""
    return sorted(child for child in path.iterdir() if child.is_dir() and is_stage(child))


def open_stage(path: Path, open_base: Callable[[str], Source]) -> Source:
    """Opens the directory of a stage.

    Args:
      path: of the stage.
      open_base: opens `config.model.weights`.

    Raises:
      ConversionError: there is no checkpoint in it, the run's config is broken, or the weights it began with are no longer there.
    """
    state = _newest(path) / "state"
    try:
        run = json.loads((path.parent / CONFIG).read_text())
        model = run["model"]
        weights, preset, lora, labels = str(model["weights"]), str(model["preset"]), model["lora"], tuple(map(int, model["heads"]))
        only_head, scheme = model["trains"] == "lm_head", SCHEMES[run["atlas"]["scheme"]] if labels else None
        made = LoraConfig(lora["rank"], lora["alpha"], lora["targets"], lora["stabilised"]) if lora["rank"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise ConversionError(f"{path.parent / CONFIG} is not the config of a run ({reason!r})") from reason
    try:
        base = open_base(weights) if weights else None
        if base is not None:  # heads and adapters read what lies below the LM head
            base = base.untied() if only_head else base.without_parts("it reads states that the run has changed")
    except ConversionError as reason:
        raise ConversionError(f"{path.parent} began with the weights {weights} (config.model.weights): {reason}") from reason
    config = base.config if base else ThinkerConfig.preset(preset)
    settings = (path.parent / CONFIG, *(base.settings if base else ()))

    def spec(place: tuple[str, ...]) -> dict[str, Any]:
        thinker = ("thinker",) if labels and place[0] != "heads" else ()  # below its heads
        inside = f"{'/'.join(('trainable', *thinker, *place, 'value'))}/"
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state.resolve()}/"}, "path": inside}}

    kind = f"step {state.parent.name} of a run of ours"
    parts = _heads(labels, config.text.hidden_size, state, spec) if labels else {}
    if only_head:
        if base is None:
            raise ConversionError(f"{path.parent / CONFIG}: the run trained an LM head on random weights, which it did not keep")
        head = stored_tensors(tuple(row for row in mappings(config) if row.theirs == "lm_head.weight"), state, spec)
        kind, tensors = f"{kind} on {base.kind}", {**base.tensors, **head}
        return dataclasses.replace(base, path=path, kind=kind, tensors=tensors, settings=settings, base=base.path)
    if made is not None:
        if base is None:
            raise ConversionError(f"{path.parent / CONFIG}: the run trained LoRA factors on random weights, which it did not keep")
        factors = stored_tensors(lora_mappings(config, made), state, spec)
        kind, lora = f"{kind} on {base.kind}", Lora(made, factors)
        return dataclasses.replace(base, path=path, kind=kind, lora=lora, parts=parts, settings=settings, base=base.path, scheme=scheme)
    tensors = stored_tensors(tuple(row for row in mappings(config) if row.theirs != _UNUSED), state, spec)
    unused = next(row for row in mappings(config) if row.theirs == _UNUSED)
    tensors[_UNUSED] = base.tensors[_UNUSED] if base else HeldTensor(_UNUSED, np.zeros(unused.their_shape, np.float32), state)
    if base is None:
        return Source(path, kind, config, tensors, None, parts, (), resource("data/mini"), settings, scheme=scheme)
    return dataclasses.replace(
        base, path=path, kind=kind, tensors=tensors, lora=None, parts=parts, settings=settings, base=base.path, scheme=scheme
    )


def _heads(labels: tuple[int, ...], width: int, state: Path, spec: Callable[[tuple[str, ...]], dict[str, Any]]) -> dict[str, Tensor]:
    """The heads of `labels` each, which lie side by side in one affine map, by their released names."""
    total = sum(labels)
    rows = (
        Mapping("weight", ("heads", "affine", "kernel"), "linear", (width, total), (total, width), None),
        Mapping("bias", ("heads", "affine", "bias"), "same", (total,), (total,), None),
    )
    stored, ends = stored_tensors(rows, state, spec), np.cumsum(labels).tolist()
    parts: dict[str, Tensor] = {}
    for number, (count, end) in enumerate(zip(labels, ends, strict=True)):
        for what, tensor in stored.items():
            name = f"heads.{number}.{what}"
            parts[name] = HeldTensor(name, tensor.read(end - count, end), state)
    return parts


def _newest(path: Path) -> Path:
    for kept in _KEPT:
        steps = [folder for folder in (path / kept).glob("[0-9]*") if folder.name.isdecimal() and (folder / "state").is_dir()]
        if steps:
            return max(steps, key=lambda folder: int(folder.name))
    raise ConversionError(f"{path} has no whole checkpoint yet")
