"""Supervised fine-tuning on all of the training split, to the minimum of the validation loss."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    config = defaults.base(size)
    config.job = "sft"
    config.sft = ConfigDict({"rows": "all", **defaults.sft(size)})
    return config
