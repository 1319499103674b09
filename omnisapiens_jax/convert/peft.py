"""LoRA factors as a PEFT adapter directory."""

from __future__ import annotations

import json
from pathlib import Path

from omnisapiens_jax.convert.huggingface import Files, write_files
from omnisapiens_jax.convert.source import Progress, Source
from omnisapiens_jax.convert.unfinished import Journal
from omnisapiens_jax.models.layers import LORA_TARGETS
from omnisapiens_jax.processing.tensors import ConversionError

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Where a tower's layers are, in the names that transformers 4 and 5 give to modules. PEFT matches the whole name.
_LAYERS = {
    "decoder": r"(model\.language_model|model)\.layers\.\d+\.(self_attn|mlp)",
    "audio": r"(model\.)?audio_tower\.layers\.\d+(\.self_attn)?",
    "vision": r"(model\.)?visual\.blocks\.\d+\.(attn|mlp)",
}


def adapter_files(source: Source) -> Files:
    """What `write_adapter` writes, and where. Raises ConversionError if the source has no LoRA factors."""
    if source.lora is None:
        raise ConversionError(f"{source.path} has no LoRA factors")
    return {_spelled(name): (ADAPTER, tensor) for name, tensor in source.lora.factors.items()}


def alone(source: Source) -> Source:
    """The source without what an adapter of PEFT has no place for."""
    return source.without_parts("an adapter of PEFT holds LoRA factors alone")


def write_adapter(source: Source, folder: Path, journal: Journal, *, progress: Progress | None = None) -> None:
    """Writes `adapter_model.safetensors`, `adapter_config.json` and a receipt.

    The decoder's factors have the names of transformers 4, which PEFT finds in a thinker of transformers 5 too. Those of the encoders have
    the names of transformers 5: no spelling is found in both, and under transformers 4 PEFT warns that they are missing.

    Raises:
      ConversionError: the source has no LoRA factors.
    """
    write_files(alone(source), adapter_files(source), folder, journal, progress)
    assert source.lora is not None
    config = source.lora.config
    targets = (rf"{_LAYERS[tower]}\.({'|'.join(config.targets[tower])})" for tower in LORA_TARGETS if config.targets.get(tower))
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.stabilised,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": "|".join(targets),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2))


def _spelled(name: str) -> str:
    return _PREFIX + (f"model.{name}" if name.startswith(("audio_tower.", "visual.")) else name)
