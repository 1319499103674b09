"""Supervised fine-tuning on responses to all of the training split, to the minimum of the validation loss: where RL may begin."""

from ml_collections import ConfigDict

from omnisapiens_jax import defaults


def get_config(size: str = "mini") -> ConfigDict:
    config = defaults.base(size)
    config.job = "generative"
    if size == "mini":
        config.atlas.training.word_dropout = 0.3  # as in configs/rl.py
    config.generative = defaults.supervised(size)
    return config
