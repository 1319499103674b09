"""Answers of a checkpoint to the test split, and its tables. `--config.model.weights` names it; `--config=evaluate:7b` selects the size."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    config = defaults.base(size)
    config.job = "evaluate"
    config.model.lora.rank = 0  # of a checkpoint that keeps its factors apart: those that it has
    config.model.heads = ()  # answers are generated; defaults.HEADS: read off the heads of the checkpoint
    return config
