"""Answers of a checkpoint to the test split, and its tables. `--config.model.weights` names it; `--config=evaluate:7b` selects the size.

Heads and LoRA factors are those that it has.
"""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    config = defaults.base(size)
    config.job = "evaluate"
    config.model.lora.rank = 0  # unless the checkpoint keeps its factors apart
    config.processing.format_prompt = ""  # none with heads, which were trained so; else think
    return config
